"""What a person sees of a training: progress, tables and sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ktjax.train.answers import Answer

# Weight of the newest step in the smoothed tokens per second.
SMOOTHING = 0.1


class ProgressReport:
    """A `ktjax.train.loop.Observer` that draws a progress bar; a context manager."""

    def __init__(self, console: Console, steps: int):
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("train", total=steps, status="compiling")
        self._rate: float | None = None
        self._compiled = False

    def __enter__(self) -> ProgressReport:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_step(self, metrics: dict[str, float]) -> None:
        """Move the bar; the first step compiles and does not count for the speed."""
        rate = metrics["tokens"] / metrics["seconds"]
        if self._compiled:
            old = rate if self._rate is None else self._rate
            self._rate = old + SMOOTHING * (rate - old)
        self._compiled = True
        speed = "" if self._rate is None else f"  {self._rate:,.0f} tokens/s"
        status = f"loss {metrics['loss']:.4f}{speed}"
        self._progress.update(self._task, completed=metrics["step"], status=status)

    def on_evaluation(self, step: int, loss: float) -> None:
        """A line with the evaluation loss."""
        self._progress.console.print(f"step {step}: evaluation loss {loss:.4f}")

    def on_checkpoint(self, path: Path) -> None:
        """A line with the checkpoint's path."""
        self._progress.console.print(f"saved {path}", highlight=False, soft_wrap=True)


def bytes_text(size: int) -> str:
    """1536 as "1.5 KiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{size} B"


def match_table(before: Sequence[Answer], after: Sequence[Answer]) -> Table:
    """Exact match per group, before and after."""
    table = Table(title="exact match on the evaluation set")
    table.add_column("group")
    for name in ("chats", "before", "after"):
        table.add_column(name, justify="right")
    groups = list(dict.fromkeys(answer.chat.group for answer in before))
    # The groups that gained most come first: they are what was trained.
    rows = [(group, _share(before, group), _share(after, group)) for group in groups]
    for group, old, new in sorted(rows, key=lambda row: row[1] - row[2]):
        count = sum(answer.chat.group == group for answer in before)
        style = "bold green" if new > old else "bold red" if new < old else ""
        table.add_row(group, str(count), f"{old:.3f}", Text(f"{new:.3f}", style))
    return table


def sample_table(
    before: Sequence[Answer], after: Sequence[Answer], count: int = 6
) -> Table:
    """A few prompts with the wanted answer and the two given, changed ones first."""
    table = Table(title="some answers")
    for name in ("prompt", "wanted", "before", "after"):
        table.add_column(name)
    pairs = sorted(
        zip(before, after, strict=True), key=lambda pair: pair[0].text == pair[1].text
    )
    for old, new in pairs[:count]:
        table.add_row(
            Text(new.chat.prompt[-1]["content"]),
            Text(new.chat.answer),
            Text(old.text, "" if old.right else "red"),
            Text(new.text, "green" if new.right else "red"),
        )
    return table


def _share(answers: Sequence[Answer], group: str) -> float:
    chosen = [answer.right for answer in answers if answer.chat.group == group]
    return sum(chosen) / len(chosen)
