"""What the commands do: one module and one configuration each."""

from ktjax.commands.bench import run_bench
from ktjax.commands.chat import run_chat
from ktjax.commands.config import (
    BenchConfig,
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
    "BenchConfig",
    "ChatConfig",
    "ConvertConfig",
    "ExportConfig",
    "GenerateConfig",
    "InspectConfig",
    "MergeConfig",
    "PlanConfig",
    "run_bench",
    "run_chat",
    "run_convert",
    "run_export",
    "run_generation",
    "run_inspect",
    "run_merge",
    "run_plan",
]
