"""Trainings in processes of their own, which can be killed or run out of space."""

from __future__ import annotations

import multiprocessing
import resource
from pathlib import Path
from typing import Any

import jax
from train_standin import Silent, StandIn, make_config, make_examples

from ktjax.train.checkpoint import list_checkpoints
from ktjax.train.loop import fit

# A server that has imported everything forks a process in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ktjax.train", "train_process"])

SETTINGS: dict[str, Any] = {"steps": 300, "eval_every": 7, "checkpoint_every": 1}


def run(directory: Path, observer: Any = None) -> None:
    """Train the stand-in to the end, from wherever `directory` is."""
    # The same programs twenty times over: compile them once.
    jax.config.update("jax_compilation_cache_dir", str(directory.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    started = bool(list_checkpoints(directory / "checkpoints"))
    config = make_config(**SETTINGS, output_dir=directory, resume=started)
    evaluation = make_examples(6, seed=9)
    observer = observer or Silent()
    fit(StandIn(), make_examples(40), evaluation, config, directory, observer)


def start(directory: Path) -> Any:
    """A process that does `run`."""
    process = CONTEXT.Process(target=run, args=(directory,))
    process.start()
    return process


class Filling(Silent):
    """Lets no file grow beyond `limit(directory)` bytes once three steps are saved."""

    def __init__(self, directory: Path, metrics_only: bool):
        super().__init__()
        self._directory, self._metrics_only = directory, metrics_only

    def on_step(self, metrics: dict[str, float]) -> None:
        if metrics["step"] == 4 and not self._metrics_only:
            self._limit(1024)  # room for metrics, not for AdamW's state

    def on_checkpoint(self, path: Path) -> None:
        if path.name == "step-00000003" and self._metrics_only:
            self._limit((self._directory / "metrics.jsonl").stat().st_size + 10)

    def _limit(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_out_of_space(directory: Path, metrics_only: bool, connection: Any) -> None:
    """`run` on a disk that fills; sends the error's type and text."""
    try:
        run(directory, Filling(directory, metrics_only))
    except Exception as error:
        connection.send((type(error).__name__, str(error)))
    else:
        connection.send(("", ""))
