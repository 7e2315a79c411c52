"""Models with their experts converted."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from ktjax.commands.config import ConvertConfig
from ktjax.experts_convert import convert_checkpoint
from ktjax.io.adapters import ranges


def run_convert(config: ConvertConfig, console: Console) -> None:
    """Convert with a progress bar on `console`.

    Raises:
      CheckpointError, FileNotFoundError, FileExistsError, ValueError, OSError: each
      says what is wrong and where.
    """
    columns = ("convert", BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("convert", total=None)
        layers = convert_checkpoint(
            config.model,
            config.out,
            config.experts,
            config.group_size,
            config.zero_point,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"wrote   {config.out}: {config.model} with the experts of layers "
        f"{ranges(layers)} in {config.experts}",
        highlight=False,
        soft_wrap=True,
    )
