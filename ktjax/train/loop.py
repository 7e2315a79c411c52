"""The training loop: steps, evaluation, metrics, checkpoints, and an orderly exit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from ktjax.train import checkpoint
from ktjax.train.batching import START, Batcher, BatchStream, Position
from ktjax.train.config import TrainConfig
from ktjax.train.data import Example, fingerprint
from ktjax.train.step import (
    SplitModel,
    TrainState,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    split_model,
)


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Observer(Protocol):
    """What wants to know how the training goes (see ktjax.train.report)."""

    def on_step(self, metrics: dict[str, float]) -> None:
        """After every step; `metrics` is the line that went to metrics.jsonl."""

    def on_evaluation(self, step: int, loss: float) -> None:
        """After an evaluation."""

    def on_checkpoint(self, path: Path) -> None:
        """After a checkpoint is complete."""


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a training ended.

    Attributes:
      step: optimizer steps done in all.
      interrupted: whether Ctrl-C ended it early.
      losses: the training loss of every step that this call did.
      checkpoint: the newest checkpoint.
    """

    step: int
    interrupted: bool
    losses: list[float]
    checkpoint: Path


def fit(
    model: nnx.Module,
    train: Sequence[Example],
    evaluation: Sequence[Example],
    config: TrainConfig,
    output_dir: Path,
    observer: Observer,
) -> FitResult:
    """Train the `nnx.LoRAParam`s of `model` in place.

    Ctrl-C finishes the step, saves, and returns; a second Ctrl-C raises
    KeyboardInterrupt at once.

    Args:
      model: has `token_losses(input_ids, targets, positions=, segment_ids=)`, as
        `ktjax.models.Decoder`.
      train: the examples to learn.
      evaluation: examples for the evaluation loss, may be empty.
      config: see `TrainConfig`.
      output_dir: receives metrics.jsonl and checkpoints/.
      observer: is told of every step, evaluation and checkpoint.

    Raises:
      TrainingError: the loss or the gradient is not finite (names the step), the
        directory holds another run's checkpoints, or there is none to resume.
      CheckpointError: a checkpoint does not fit, or cannot be written.
    """
    split = split_model(model)
    root, data = output_dir / "checkpoints", fingerprint(train)
    state = init_state(split, make_optimizer(config))
    start = START
    if config.resume:
        state, start = _resume(root, state, config, data)
    elif checkpoint.list_checkpoints(root):
        raise TrainingError(
            f"{output_dir} holds checkpoints of an earlier run; continue it with "
            "resume, or choose another output directory"
        )
    batcher = Batcher.from_config(config, config.batch_size * config.accumulation)
    stream = BatchStream(train, batcher, config.seed, start)
    train_step = make_train_step(split.graph, config)
    evaluate = Evaluator(model, split, evaluation, config)
    log = MetricsLog(output_dir / "metrics.jsonl", int(state.step))
    losses: list[float] = []
    step = saved = int(state.step)

    def save() -> None:
        nonlocal saved
        if step > saved:
            observer.on_checkpoint(_save(root, state, stream.position, config, data))
            saved = step

    with _deferred_interrupt() as interrupted:
        while step < config.steps and not interrupted.is_set():
            began = time.monotonic()
            batch = stream.next()
            state, raw = train_step(state, split.frozen, batch)
            metrics = {name: float(value) for name, value in raw.items()}
            step += 1
            _check_finite(metrics, step, root)
            tokens = int(np.count_nonzero(batch.segment_ids))
            seconds = time.monotonic() - began
            line = {"step": step, **metrics, "tokens": tokens, "seconds": seconds}
            log.write(line)
            losses.append(metrics["loss"])
            observer.on_step(line)
            if evaluation and _due(step, config.eval_every, config.steps):
                loss = evaluate(state)
                log.write({"step": step, "eval_loss": loss})
                observer.on_evaluation(step, loss)
            if _due(step, config.checkpoint_every, config.steps):
                save()
        save()
    nnx.update(model, state.lora, state.random)
    _, newest = checkpoint.list_checkpoints(root)[-1]
    return FitResult(step, step < config.steps, losses, newest)


class Evaluator:
    """The mean loss of the evaluation examples under a state's adapters."""

    def __init__(
        self,
        model: nnx.Module,
        split: SplitModel,
        examples: Sequence[Example],
        config: TrainConfig,
    ):
        self._split = split
        self._examples = examples
        self._batcher = Batcher.from_config(config, config.eval_batch)
        model.eval()
        self._step = make_eval_step(nnx.graphdef(model))
        model.train()

    def __call__(self, state: TrainState) -> float:
        """The mean loss over all learnt tokens."""
        total = count = 0.0
        for batch in self._batcher.once(self._examples):
            loss, tokens = self._step(
                state.lora, state.random, self._split.frozen, batch
            )
            total, count = total + float(loss), count + float(tokens)
        return total / count


class MetricsLog:
    """An append-only JSONL file; lines after the step that a run resumes at go."""

    def __init__(self, path: Path, step: int):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        kept = [
            line for line in path.read_text().splitlines() if _step_of(line) <= step
        ]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_finite(metrics: dict[str, float], step: int, root: Path) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if not bad:
        return
    saved = checkpoint.list_checkpoints(root)
    rescue = (
        f"the last good checkpoint is {saved[-1][1]}" if saved else "nothing is saved"
    )
    raise TrainingError(
        f"step {step}: {bad[0]} is {metrics[bad[0]]}; lower learning_rate or clip_norm "
        f"({rescue})"
    )


def _save(
    root: Path,
    state: TrainState,
    position: Position,
    config: TrainConfig,
    data: str,
) -> Path:
    trees = {
        "lora": state.lora,
        "random": state.random,
        "optimizer": state.optimizer,
    }
    meta = {
        "model": str(config.model_path.resolve()),
        "position": position._asdict(),
        "data": data,
        "config": config.trajectory(),
    }
    step = int(state.step)
    return checkpoint.save_checkpoint(root, step, trees, meta, config.keep_checkpoints)


def _resume(
    root: Path, state: TrainState, config: TrainConfig, data: str
) -> tuple[TrainState, Position]:
    saved = checkpoint.list_checkpoints(root)
    if not saved:
        raise TrainingError(f"nothing to resume: there is no checkpoint in {root}")
    step, path = saved[-1]
    meta = checkpoint.read_meta(path)
    now = {**config.trajectory(), "data": data}
    then = {**meta["config"], "data": meta["data"]}
    for name, value in now.items():
        if then.get(name) != value:
            raise TrainingError(
                f"cannot resume {path}: it was made with {name} = {then.get(name)}, "
                f"now it is {value}"
            )
    state = TrainState(
        checkpoint.load_tree(path, "lora", state.lora),
        checkpoint.load_tree(path, "random", state.random),
        checkpoint.load_tree(path, "optimizer", state.optimizer),
        jax.numpy.asarray(step, jax.numpy.int32),
    )
    return state, Position(**meta["position"])


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises KeyboardInterrupt.

    Signal handlers exist in the main thread only; elsewhere the event stays unset.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def handle(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)
