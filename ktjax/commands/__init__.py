"""What the commands do: plan, generate, chat, convert, export, merge, inspect."""

from ktjax.commands.chat import run_chat
from ktjax.commands.config import (
    ChatConfig,
    ConvertConfig,
    ExportConfig,
    GenerateConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
)
from ktjax.commands.convert import run_convert
from ktjax.commands.export import run_export
from ktjax.commands.generate import run_generation
from ktjax.commands.inspect import run_inspect
from ktjax.commands.merge import run_merge
from ktjax.commands.plan import run_plan

__all__ = [
    "ChatConfig",
    "ConvertConfig",
    "ExportConfig",
    "GenerateConfig",
    "InspectConfig",
    "MergeConfig",
    "PlanConfig",
    "run_chat",
    "run_convert",
    "run_export",
    "run_generation",
    "run_inspect",
    "run_merge",
    "run_plan",
]
