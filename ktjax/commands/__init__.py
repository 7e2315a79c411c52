"""What the commands about files do: export, merge, inspect."""

from ktjax.commands.config import ExportConfig, InspectConfig, MergeConfig
from ktjax.commands.export import run_export
from ktjax.commands.inspect import run_inspect
from ktjax.commands.merge import run_merge

__all__ = [
    "ExportConfig",
    "InspectConfig",
    "MergeConfig",
    "run_export",
    "run_inspect",
    "run_merge",
]
