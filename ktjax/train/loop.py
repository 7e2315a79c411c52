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

from ktjax import backend
from ktjax.train import checkpoint
from ktjax.train.batching import START, Batch, Batcher, BatchStream, Position
from ktjax.train.config import TrainConfig
from ktjax.train.data import Example, fingerprint, fingerprint_arrays
from ktjax.train.evaluate import Best, Evaluator
from ktjax.train.metrics import Log, MetricsError, MetricsLog, TensorBoardLog
from ktjax.train.objective import objective_of
from ktjax.train.optimizer import make_optimizer
from ktjax.train.step import (
    Frozen,
    Metrics,
    TrainState,
    init_state,
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

    When it ends in an error, KeyboardInterrupt included, the model has the adapters of
    the last step whose loss and gradient were finite. A step that fails while it is
    computed takes them with it: then those of the newest checkpoint, and a note on the
    exception says so.

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
    graph, frozen = split.graph, split.frozen
    # The model's own adapters would be a second copy; it gets the trained ones back.
    nnx.update(model, at.state.lora)
    del split
    if config.resume:
        at = _resume(root, at.state, config, data)
    else:
        refuse_old_run(output_dir)
    state, best = at.state, at.best
    batcher = Batcher.from_config(config, config.batch_size * config.accumulation)
    stream = BatchStream(train, batcher, config.seed, at.position)
    compiled = _compiler(make_train_step(graph, config))
    evaluate = Evaluator(model, frozen, evaluation, config)
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

    nnx.update(model, state.lora)
    backend.trim_memory()
    with (
        _given_back(model, lambda: state, root),
        _open_logs(config, output_dir, step) as log,
        _deferred_interrupt() as interrupt,
        _explained(root, lambda: step),
    ):
        while step < config.steps and not interrupt.requested and not is_hopeless():
            began = time.monotonic()
            batch = stream.next()
            program = compiled(state, frozen, batch)
            with interrupt.held():  # `state` is donated: none is left in between
                state, raw = program(state, frozen, batch)
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


Program = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]


def _compiler(step: Any) -> Callable[[TrainState, Frozen, Batch], Program]:
    """A function that gives the jitted `step`, compiled for the shape of a batch.

    Between compiling and running, what the compiler has used goes back to the system:
    of a large model hundreds of megabytes, when the step is about to need the most.
    """
    programs: dict[tuple[int, ...], Program] = {}

    def compiled(state: TrainState, frozen: Frozen, batch: Batch) -> Program:
        shape = batch.input_ids.shape
        if shape not in programs:
            programs[shape] = step.lower(state, frozen, batch).compile()
            backend.trim_memory()
        return programs[shape]

    return compiled


@contextmanager
def _given_back(
    model: nnx.Module, state: Callable[[], TrainState], root: Path
) -> Iterator[None]:
    """However the block ends, `model` gets the adapters and the random state.

    Steps donate them, so without that it would be left with arrays that are gone.
    """
    changed = None
    try:
        yield
    except Exception as error:
        changed = _survived(state(), root, error)
        raise
    finally:
        nnx.update(model, *(changed or (state().lora, state().random)))


def _survived(
    state: TrainState, root: Path, error: Exception
) -> tuple[nnx.State, nnx.State]:
    """`state`'s adapters and random state; the newest checkpoint's if they are gone.

    They are when a step fails while it is computed: what it took is donated, and what
    it should give does not exist. A note on `error` then says what the model has.
    """
    changed = state.lora, state.random
    try:
        return jax.block_until_ready(changed)
    except RuntimeError:
        saved = checkpoint.list_checkpoints(root)
    if not saved:
        error.add_note(
            "the step that failed has taken the model's adapters with it, and no "
            "checkpoint is saved yet: load the model again"
        )
        return changed
    _, newest = saved[-1]
    error.add_note(
        "the step that failed has taken the model's adapters with it: the model has "
        f"those of {newest}"
    )
    lora, random = changed
    return (
        checkpoint.load_tree(newest, "lora", lora),
        checkpoint.load_tree(newest, "random", random),
    )


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
        raise TrainingError(
            f"nothing to resume: there is no checkpoint in {root}; start without resume"
        )
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


class _Interrupt:
    """Ctrl-C: the first is a request, the second raises KeyboardInterrupt.

    Attributes:
      requested: whether there was one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._held = self._again = False

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if self.requested and not self._held:
            raise KeyboardInterrupt
        self._again = self.requested
        self.requested = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """A second Ctrl-C within the block raises at its end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._again:
            raise KeyboardInterrupt


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    """Listens to Ctrl-C, in the main thread: elsewhere there are no signal handlers."""
    interrupt = _Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
