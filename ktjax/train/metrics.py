"""Where the numbers of a training go: metrics.jsonl, and TensorBoard if asked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class MetricsError(RuntimeError):
    """Metrics that cannot be written."""


class Log(Protocol):
    """Anything that takes a line of metrics."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take numbers by name; "step" is one of them."""

    def close(self) -> None:
        """Write what is not written yet."""


class MetricsLog:
    """An append-only JSONL file; lines after the step that a run resumes at go."""

    def __init__(self, path: Path, step: int):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                return
            kept = [line for line in _lines(path) if _step_of(line) <= step]
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        except OSError as error:
            raise MetricsError(f"cannot write {path}: {error}") from error

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
          MetricsError: the system refuses, for instance because the disk is full.
        """
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MetricsError(f"cannot write {self._path}: {error}") from error

    def close(self) -> None:
        """Nothing is left to write."""


class TensorBoardLog:
    """Event files for TensorBoard; steps after the one that a run resumes at go."""

    def __init__(self, directory: Path, step: int):
        """Open a writer in `directory`.

        Raises:
          MetricsError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MetricsError(
                "tensorboard needs the package tensorboardX: "
                "pip install 'ktjax[tensorboard]', or leave the option out"
            ) from None
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """A scalar for every number but the step."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(_tag(name), value, line["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def read_metrics(path: Path, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one metric in a metrics.jsonl, in its order."""
    rows = (json.loads(line) for line in _lines(path) if _step_of(line) < math.inf)
    return [(row["step"], row[name]) for row in rows if name in row]


def _tag(name: str) -> str:
    """TensorBoard's sections: train, eval and router."""
    section, _, rest = name.partition("_")
    return f"{section}/{rest}" if section in ("eval", "router") else f"train/{name}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
