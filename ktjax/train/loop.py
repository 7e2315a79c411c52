"""The training loop: steps, evaluation, metrics, checkpoints, and an orderly exit."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from ktjax.train import checkpoint
from ktjax.train.batching import START, Batcher, BatchStream, Position
from ktjax.train.config import TrainConfig
from ktjax.train.data import Example, fingerprint, fingerprint_arrays
from ktjax.train.evaluate import Best, Evaluator
from ktjax.train.metrics import Log, MetricsError, MetricsLog, TensorBoardLog
from ktjax.train.objective import objective_of
from ktjax.train.step import (
    TrainState,
    init_state,
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
      stopped_early: whether evaluations without a better loss ended it.
      losses: the training loss of every step that this call did.
      checkpoint: the one whose adapters the model has now: with `patience` the best,
        else the newest.
    """

    step: int
    interrupted: bool
    stopped_early: bool
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

    With the objective "dpo" the reference policy has the adapters that the model comes
    with.

    Ctrl-C finishes the step, saves, and returns; a second Ctrl-C, or one before the
    first step, raises KeyboardInterrupt at once. With `config.patience`, evaluations
    decide when to stop, and the model ends with the adapters that had the best
    evaluation loss.

    Args:
      model: has `token_losses(input_ids, targets, positions=, segment_ids=)`, as
        `ktjax.models.Decoder`.
      train: the examples to learn.
      evaluation: examples for the evaluation loss, may be empty.
      config: see `TrainConfig`.
      output_dir: receives metrics.jsonl, checkpoints/, and tensorboard/ if asked.
      observer: is told of every step, evaluation and checkpoint.

    Raises:
      TrainingError: the loss or the gradient is not finite (names the step and the
        tensor), metrics or a checkpoint cannot be written (names the last good one),
        the directory holds another run's checkpoints, or there is none to resume.
      CheckpointError: a checkpoint does not fit.
      MetricsError: TensorBoard is asked for and not installed.
    """
    objective = objective_of(config)
    split = split_model(model, keep_reference=objective.needs_reference)
    root = output_dir / "checkpoints"
    data: dict[str, str | None] = {"data": fingerprint(train), "start": None}
    if config.init_adapter is not None:
        data["start"] = fingerprint_arrays(split.lora)
    if config.patience:  # then evaluations decide when to stop
        data["evaluation_data"] = fingerprint(evaluation)
    # Says what Hugging Face calls the modules.
    kind = {"model_type": getattr(getattr(model, "config", None), "model_type", None)}
    at = _Point(init_state(split, make_optimizer(config)), START, Best())
    if config.resume:
        at = _resume(root, at.state, config, data)
    else:
        refuse_old_run(output_dir)
    state, best = at.state, at.best
    batcher = Batcher.from_config(config, config.batch_size * config.accumulation)
    stream = BatchStream(train, batcher, config.seed, at.position)
    train_step = make_train_step(split.graph, config)
    evaluate = Evaluator(model, split, evaluation, config)
    losses: list[float] = []
    step = saved = int(state.step)

    def save() -> None:
        nonlocal saved
        if step > saved:
            now = _Point(state, stream.position, best)
            observer.on_checkpoint(_save(root, now, config, {**data, **kind}))
            saved = step

    def is_hopeless() -> bool:
        return 0 < config.patience <= best.since

    # The model's own adapters would be a second copy; it gets the trained ones back.
    nnx.update(model, state.lora)
    with (
        _open_logs(config, output_dir, step) as log,
        _deferred_interrupt() as interrupted,
        _explained(root, lambda: step),
    ):
        while step < config.steps and not interrupted.is_set() and not is_hopeless():
            began = time.monotonic()
            batch = stream.next()
            state, raw = train_step(state, split.frozen, batch)
            metrics = {name: float(value) for name, value in raw.items()}
            step += 1
            _check_finite(metrics, int(metrics.pop("bad_gradient")), step, state, root)
            tokens = int(np.count_nonzero(batch.segment_ids))
            seconds = time.monotonic() - began
            line = {"step": step, **metrics, "tokens": tokens, "seconds": seconds}
            log(line)
            losses.append(metrics["loss"])
            observer.on_step(line)
            if evaluation and _due(step, config.eval_every, config.steps):
                evaluated = evaluate(state)
                log({"step": step, **evaluated})
                observer.on_evaluation(step, evaluated["eval_loss"])
                if config.patience:
                    best = best.after(evaluated["eval_loss"], step)
            if _due(step, config.checkpoint_every, config.steps) or best.step == step:
                save()
        save()
    if step == 0:
        raise KeyboardInterrupt  # before the first step: there is nothing to save
    nnx.update(model, state.lora, state.random)
    used = chosen_checkpoint(root)
    if best.step not in (0, step):
        nnx.update(model, checkpoint.load_tree(used, "lora", state.lora))
    early = step < config.steps and is_hopeless()
    return FitResult(step, step < config.steps and not early, early, losses, used)


def refuse_old_run(output_dir: Path) -> None:
    """See that a new run does not mix with one that `output_dir` holds.

    Raises:
      TrainingError: there are checkpoints.
    """
    if checkpoint.list_checkpoints(output_dir / "checkpoints"):
        raise TrainingError(
            f"{output_dir} holds checkpoints of an earlier run; continue it with "
            "resume, or choose another output directory"
        )


def chosen_checkpoint(root: Path) -> Path:
    """The checkpoint that a run's user wants: the best if it looked for it.

    Args:
      root: directory with at least one checkpoint.

    Raises:
      CheckpointError: the newest checkpoint cannot be read.
    """
    saved = checkpoint.list_checkpoints(root)
    _, newest = saved[-1]
    best = Best.from_json(checkpoint.read_meta(newest).get("best"))
    return dict(saved).get(best.step, newest)


@dataclasses.dataclass(frozen=True)
class _Point:
    """Where a run is: what a checkpoint must bring back."""

    state: TrainState
    position: Position
    best: Best


@contextmanager
def _open_logs(
    config: TrainConfig, output_dir: Path, step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes a line of metrics to everywhere they go."""
    logs: list[Log] = [MetricsLog(output_dir / "metrics.jsonl", step)]
    if config.tensorboard:
        logs.append(TensorBoardLog(output_dir / "tensorboard", step))

    def write(line: Mapping[str, Any]) -> None:
        for log in logs:
            log.write(line)

    try:
        yield write
    finally:
        for log in logs:
            log.close()


@contextmanager
def _explained(root: Path, step: Callable[[], int]) -> Iterator[None]:
    """Files that cannot be written become a TrainingError that says what is safe."""
    try:
        yield
    except (MetricsError, checkpoint.CheckpointError) as error:
        raise TrainingError(
            f"step {step()}: {error}; {_rescue(root)}; make room and go on with resume"
        ) from error


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_finite(
    metrics: Mapping[str, float],
    bad_gradient: int,
    step: int,
    state: TrainState,
    root: Path,
) -> None:
    """Stop at a loss or a gradient that is not finite, and name it."""
    if not math.isfinite(metrics["loss"]):
        what = f"loss is {metrics['loss']}"
    elif bad_gradient >= 0:
        name = checkpoint.leaf_names(state.lora)[bad_gradient].removesuffix(".value")
        what = f"the gradient of {name} is not finite"
    elif not math.isfinite(metrics["grad_norm"]):
        what = f"grad_norm is {metrics['grad_norm']}, though no tensor's is"
    else:
        return
    raise TrainingError(
        f"step {step}: {what}; lower learning_rate or clip_norm ({_rescue(root)})"
    )


def _rescue(root: Path) -> str:
    saved = checkpoint.list_checkpoints(root)
    return f"the last good checkpoint is {saved[-1][1]}" if saved else "none is saved"


def _save(
    root: Path, point: _Point, config: TrainConfig, data: Mapping[str, str | None]
) -> Path:
    state, best = point.state, point.best
    trees = {
        "lora": state.lora,
        "random": state.random,
        "optimizer": state.optimizer,
    }
    meta = {
        "model": str(config.model_path.resolve()),
        "position": point.position._asdict(),
        **data,
        "best": best.to_json(),
        "config": config.trajectory(),
    }
    return checkpoint.save_checkpoint(
        root, int(state.step), trees, meta, config.keep_checkpoints, spare=best.step
    )


def _resume(
    root: Path, state: TrainState, config: TrainConfig, data: Mapping[str, str | None]
) -> _Point:
    saved = checkpoint.list_checkpoints(root)
    if not saved:
        raise TrainingError(f"nothing to resume: there is no checkpoint in {root}")
    step, path = saved[-1]
    meta = checkpoint.read_meta(path)
    now = {**config.trajectory(), **data}
    # An option that is younger than the checkpoint had its default then.
    then = {**TrainConfig().trajectory(), **meta["config"]}
    then |= {name: meta.get(name) for name in data}
    for name, value in now.items():
        if then[name] != value:
            raise TrainingError(
                f"cannot resume {path}: it was made with {name} = {then[name]}, "
                f"now it is {value}"
            )
    state = TrainState(
        checkpoint.load_tree(path, "lora", state.lora),
        checkpoint.load_tree(path, "random", state.random),
        checkpoint.load_tree(path, "optimizer", state.optimizer),
        jax.numpy.asarray(step, jax.numpy.int32),
    )
    best = Best.from_json(meta.get("best"))
    return _Point(state, Position(**meta["position"]), best)


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
