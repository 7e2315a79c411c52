"""Adapters merged into models."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from ktjax.commands.config import MergeConfig
from ktjax.io.merge import merge_checkpoint
from ktjax.train.adapters import read_run_or_adapter


def run_merge(config: MergeConfig, console: Console) -> None:
    """Merge with a progress bar on `console`.

    Raises:
      AdapterError, CheckpointError, FileNotFoundError, FileExistsError, OSError: each
      says what is wrong and where.
    """
    adapter = read_run_or_adapter(config.adapter)
    columns = ("merge", BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("merge", total=None)
        merge_checkpoint(
            config.model,
            adapter,
            config.out,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(
        f"wrote   {config.out}: {config.model} with the adapter's weights, scaled by "
        f"{adapter.scaling:g}, in {adapter.summary()}",
        highlight=False,
        soft_wrap=True,
    )
