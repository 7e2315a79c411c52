"""What a training will need, from config.json alone: memory by part, and what fits.

Nothing of the model is loaded. Stores and arrays have known sizes. What a step needs on
top is a formula in batch, length, rank and depth, whose few constants come from XLA's
own figures for the very program that would run, compiled for two and three layers of
the true sizes. So what fits is found without compiling anything more.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ktjax.config import MAX_LORA_RANK
from ktjax.models import ModelConfig
from ktjax.models.loading import module_names, shapes_of
from ktjax.models.targets import check_targets, experts_name
from ktjax.nn.vocabulary import CHUNK_VALUES
from ktjax.train.config import TrainConfig
from ktjax.train.plan_adapters import layer_adapters
from ktjax.train.plan_program import (
    abstract,
    compiled_bytes,
    linear_bytes,
    shallow,
    store_bytes,
    tree_bytes,
)
from ktjax.train.plan_time import SMALL_VOCABULARY, Timing, measure_time

__all__ = [
    "Largest",
    "Memory",
    "MemoryPlan",
    "Timing",
    "available_memory",
    "measure_time",
    "plan_memory",
    "resident_memory",
]

# What a token keeps of the adapters is padded to so many columns.
_RANK_BLOCK = 32
# Lengths are planned in multiples of this.
_ROUND = 16
_LONGEST = 1 << 20
# What compiling and running leave in a process, at first and for every layer: code, and
# JAX's and XLA's descriptions of it. Measured with jax 0.10.2 and 2 to 4 layers; the
# compiler's threads meet at peaks that differ by 50 MB, of which this is the median.
_PROGRAM = 220 << 20
_PROGRAM_LAYER = 8 << 20


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a training by part.

    Attributes:
      stores: the frozen experts.
      dense: everything else that is frozen.
      adapters: the trained adapters.
      optimizer: AdamW's two moments.
      gradients: those of the adapters, all alive between backward pass and update.
      step: what a step needs on top: activations, logits, the kernels' workspace.
      process: Python, JAX and the compiled program.
    """

    stores: int
    dense: int
    adapters: int
    optimizer: int
    gradients: int
    step: int
    process: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest value that fits, of each with the others as planned; 0 = none."""

    rank: int
    batch_size: int
    sequence_length: int


class Size(NamedTuple):
    """What a training's memory depends on beside the model."""

    rank: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.length


@dataclasses.dataclass(frozen=True)
class StepModel:
    """Bytes of a step beside its arguments and results.

    Layers keep something until their backward pass, each gradient is there from then
    on. So the most is needed at one of two ends: at the loss, where all that is kept
    is alive together with logits or the temporaries of the last layer; or at the
    bottom, where all gradients are, with the temporaries of the first layer. Between
    them it changes in proportion to the layers.

    Attributes:
      layers: how many the backward pass goes through; those below keep nothing.
      kept: bytes that a layer keeps, per token and per token and length.
      low_rank: bytes that the low-rank values of a layer's experts take per token and
        column.
      low_rank_layers: how many layers keep those.
      temporary: bytes of a layer at work: fixed, per token, per token and length, and
        as a share of the layer's gradients.
      logit: bytes per token of a chunk of the loss.
      vocabulary: its size.
      layer_gradients: bytes of the largest layer's gradients per rank.
      gradients: of all layers, per rank.
    """

    layers: int
    kept: tuple[float, float]
    low_rank: float
    low_rank_layers: int
    temporary: tuple[float, float, float]
    logit: float
    vocabulary: int
    layer_gradients: float
    gradients: float

    def bytes(self, size: Size) -> float:
        """What a step of this size needs."""
        kept = _dot(self.kept, size)
        columns = self.low_rank * _round_up(size.rank, _RANK_BLOCK) * size.tokens
        per_token, per_square, share = self.temporary
        work = _dot((per_token, per_square), size) + columns
        work += share * self.layer_gradients * size.rank
        kept = self.layers * kept + self.low_rank_layers * columns
        logits = self.logit * chunk_tokens(size.tokens, self.vocabulary)
        at_loss = kept + max(logits, work)
        return max(at_loss, self.gradients * size.rank + work)


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Tokens whose logits exist at a time, as `ktjax.nn.token_losses` has it."""
    chunk = max(1, CHUNK_VALUES // vocab_size)
    return -(-tokens // -(-tokens // chunk))


def fit_step(
    model: ModelConfig,
    config: TrainConfig,
    compiled: Callable[[ModelConfig, TrainConfig], int] = compiled_bytes,
) -> StepModel:
    """The formula of a model's step, from four or six small programs.

    Args:
      model: the geometry.
      config: its batch, length and rank are where the formula is exact, if all layers
        with experts have the same adapters. If not, each that the backward pass goes
        through counts as the one with the largest.
      compiled: bytes of a step of just this model.

    Raises:
      ValueError: no module has adapters.
    """
    adapters = layer_adapters(model, config)
    config = adapters.config
    planned = Size(config.lora_rank, config.batch_size, config.sequence_length)
    # With next to no gradients, what grows with the tokens shows.
    here = planned._replace(rank=1)
    long = here._replace(length=2 * here.length)
    ranked = here._replace(rank=max(planned.rank, 1 + _RANK_BLOCK))
    # What the small programs below have, with one rank in all modules.
    alike = dataclasses.replace(config, lora_rank=1, rank_pattern={})
    layer = tree_bytes(abstract(shallow(model, 1), alike)[1].lora)
    small = dataclasses.replace(model, vocab_size=SMALL_VOCABULARY)
    itemsize = np.dtype(np.float32).itemsize if config.dtype == "float32" else 2
    slots = model.num_experts_per_tok
    # Three projections, each in the forward and as what the backward makes of it.
    saves = config.activation_policy == "save"
    adapted = any(map(config.lora.adapts, map(experts_name, range(3))))
    low_rank = 2.0 * 6 * slots if saves and adapted else 0.0

    @functools.cache
    def measure(depth: int, size: Size, kind: ModelConfig = small) -> int:
        options = dataclasses.replace(
            config,
            lora_rank=size.rank,
            rank_pattern={},
            batch_size=size.batch,
            sequence_length=size.length,
            accumulation=1,
        )
        return compiled(shallow(kind, depth), options)

    def columns(size: Size) -> float:
        return low_rank * _round_up(size.rank, _RANK_BLOCK) * size.tokens

    if config.remat:
        kept = (float(model.hidden_size * itemsize), 0.0)
    else:
        points = []
        for size in (here, long):
            grown = measure(3, size) - measure(2, size)
            points.append((size, max(grown, 0) - columns(size)))
        kept = _solve(points)
    keeps = saves and not config.remat

    def at_work(size: Size) -> float:
        per_layer = max(
            _dot(kept, size) + (columns(size) if keeps else 0.0), layer * size.rank
        )
        return measure(2, size) - 2 * per_layer - columns(size)

    base = at_work(here)
    wider = at_work(ranked)
    share = (wider - base) / (layer * (ranked.rank - here.rank))
    share = min(max(share, 0.0), 2.0)

    def without(size: Size, work: float) -> float:
        return max(work - share * layer * size.rank, 0.0)

    per_token, per_square = _solve(
        [(here, without(here, base)), (long, without(long, at_work(long)))]
    )
    chunk = chunk_tokens(here.tokens, model.vocab_size)
    found = StepModel(
        layers=adapters.depth,
        kept=kept,
        low_rank=low_rank,
        low_rank_layers=adapters.with_experts if keeps else 0,
        temporary=(per_token, per_square, share),
        logit=0.0,
        vocabulary=model.vocab_size,
        layer_gradients=adapters.largest / planned.rank,
        gradients=adapters.total / planned.rank,
    )
    # Logits show where they are more than what a layer needs.
    whole = measure(2, here, model)
    two = dataclasses.replace(
        found,
        layers=2,
        low_rank_layers=2 if keeps else 0,
        layer_gradients=layer,
        gradients=2 * layer,
    )
    if whole > two.bytes(here):
        below = 2 * (_dot(kept, here) + (columns(here) if keeps else 0.0))
        return dataclasses.replace(found, logit=max(whole - below, 0.0) / chunk)
    # Else they are at least an array of logits and one of their gradient.
    return dataclasses.replace(found, logit=8.0 * model.vocab_size)


def _dot(factors: tuple[float, float], size: Size) -> float:
    return size.tokens * (factors[0] + factors[1] * size.length)


def _solve(points: list[tuple[Size, float]]) -> tuple[float, float]:
    """The bytes per token, and per token and length, that two lengths show."""
    (one, first), (two, second) = points
    first, second = first / one.tokens, second / two.tokens
    slope = max((second - first) / (two.length - one.length), 0.0)
    return max(first - slope * one.length, 0.0), slope


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training, as a formula in its size.

    Attributes:
      size: what was asked for.
      stores, dense, process: bytes that do not depend on the size.
      adapters, optimizer: bytes per rank.
      step: of a step.
    """

    size: Size
    stores: int
    dense: int
    process: int
    adapters: float
    optimizer: float
    step: StepModel

    def memory(self, size: Size | None = None) -> Memory:
        """By part; of the planned size by default."""
        size = self.size if size is None else size
        gradients = round(self.step.gradients * size.rank)
        return Memory(
            stores=self.stores,
            dense=self.dense,
            adapters=round(self.adapters * size.rank),
            optimizer=round(self.optimizer * size.rank),
            gradients=gradients,
            step=max(round(self.step.bytes(size)) - gradients, 0),
            process=self.process,
        )

    def largest(self, available: int) -> Largest:
        """The largest rank, batch and length that fit into `available` bytes."""

        def most(name: str, top: int, unit: int = 1) -> int:
            def fits(count: int) -> bool:
                size = self.size._replace(**{name: count * unit})
                return self.memory(size).total <= available

            low, high = 0, top // unit  # low fits, or is 0
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle) else (low, middle - 1)
            return low * unit

        return Largest(
            rank=most("rank", MAX_LORA_RANK),
            batch_size=most("batch", _LONGEST),
            sequence_length=most("length", _LONGEST, _ROUND),
        )


def plan_memory(model: ModelConfig, config: TrainConfig) -> MemoryPlan:
    """The memory of a training.

    Args:
      model: the geometry of the model.
      config: the options that count are `experts` (a storage format) and its own,
        `dense`, those of the adapters and batches (without accumulation), and `dtype`,
        `activation_policy`, `remat`, `moment_dtype`.

    Raises:
      FrozenTargetError: a target fits nothing that can have adapters.
      ValueError: the sizes do not fit the format.
    """
    shapes = shapes_of(model, dtype=config.dtype)
    check_targets(shapes, config.lora, module_names(shapes))
    # Before anything is compiled here: the constants have what a training compiles.
    process = resident_memory() + _PROGRAM
    split, state = abstract(model, config)
    layers = sum(model.is_moe_layer(i) for i in range(model.num_hidden_layers))
    return MemoryPlan(
        size=Size(config.lora_rank, config.batch_size, config.sequence_length),
        stores=layers * store_bytes(model, config),
        dense=tree_bytes(split.frozen) + linear_bytes(model, config),
        process=process + model.num_hidden_layers * _PROGRAM_LAYER,
        adapters=tree_bytes(state.lora) / config.lora_rank,
        optimizer=tree_bytes(state.optimizer) / config.lora_rank,
        step=fit_step(model, config),
    )


def available_memory() -> int:
    """MemAvailable of /proc/meminfo, in bytes: what can be had without swapping.

    Raises:
      RuntimeError: the kernel does not say.
    """
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def resident_memory() -> int:
    """The resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
