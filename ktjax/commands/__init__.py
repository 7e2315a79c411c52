"""What the commands about files do: convert, export, merge, inspect."""

from ktjax.commands.config import (
    ConvertConfig,
    ExportConfig,
    InspectConfig,
    MergeConfig,
)
from ktjax.commands.convert import run_convert
from ktjax.commands.export import run_export
from ktjax.commands.inspect import run_inspect
from ktjax.commands.merge import run_merge

__all__ = [
    "ConvertConfig",
    "ExportConfig",
    "InspectConfig",
    "MergeConfig",
    "run_convert",
    "run_export",
    "run_inspect",
    "run_merge",
]
