"""What a training will need, from config.json alone: memory, and seconds per step.

Nothing of the model is loaded. Memory of the step is what XLA says of the very program
that would run, compiled for two and for three layers of the true sizes; the layers
after them are alike. Time is that of one and two layers with random weights.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from ktjax import _native
from ktjax.config import MAX_LORA_RANK
from ktjax.models import Decoder, ModelConfig
from ktjax.models.loading import module_names, shapes_of
from ktjax.models.targets import adapt_projections, check_targets, experts_name
from ktjax.nn import RoutedExperts
from ktjax.quant.formats import Encoding
from ktjax.store import ExpertStore, Geometry
from ktjax.train.batching import Batch
from ktjax.train.config import TrainConfig
from ktjax.train.step import (
    SplitModel,
    TrainState,
    init_state,
    make_optimizer,
    make_train_step,
    split_model,
)

# Random numbers that larger arrays repeat; a prime, so that rows differ.
_BLOCK = 1_000_003
# What a token keeps of the adapters is padded to so many columns.
_RANK_BLOCK = 32
# Lengths are planned in multiples of this.
_ROUND = 16
# Tokens of a vocabulary whose logits are next to nothing.
_SMALL_VOCABULARY = 8
# The layer that is measured may take this share of the memory that is there.
_MEASURED_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a training by part.

    Attributes:
      stores: the frozen experts.
      dense: everything else that is frozen.
      adapters: the trained adapters.
      optimizer: AdamW's two moments.
      step: what a step needs on top: activations, gradients, logits.
      process: Python, JAX and the compiled program.
    """

    stores: int
    dense: int
    adapters: int
    optimizer: int
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


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    Attributes:
      step: the whole step's.
      layer: one decoder layer's, forward and backward.
      rest: embeddings, head, loss and the update's fixed part.
      measured_experts: experts that were measured; fewer than the layer has, with as
        many tokens fewer, where a layer takes too much memory.
    """

    step: float
    layer: float
    rest: float
    measured_experts: int


def available_memory() -> int:
    """MemAvailable of /proc/meminfo, in bytes: what can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def resident_memory() -> int:
    """The resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def plan_memory(model: ModelConfig, config: TrainConfig) -> Memory:
    """The memory of a training by part.

    Args:
      model: the geometry of the model.
      config: the options that count are `experts` (a storage format) and its own, those
        of the adapters and batches, and `dtype`, `activation_policy`, `remat`,
        `moment_dtype`.

    Raises:
      FrozenTargetError: a target fits nothing that can have adapters.
      ValueError: the sizes do not fit the format, or no layer has experts.
    """
    shapes = shapes_of(model, dtype=config.dtype)
    check_targets(shapes, config.lora, module_names(shapes))
    split, state = _abstract(model, config)
    step = step_bytes(model, config)
    return Memory(
        stores=len(_moe_layers(model)) * store_bytes(model, config),
        dense=_bytes(split.frozen),
        adapters=_bytes(state.lora),
        optimizer=_bytes(state.optimizer),
        step=step,
        # This process has started JAX and compiled such programs, as training will.
        process=resident_memory(),
    )


def store_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of the store of one layer's experts: as many times those of one expert."""
    with _random_store(model, config, experts=1) as store:
        return store.nbytes * model.num_experts


def find_largest(
    model: ModelConfig, config: TrainConfig, memory: Memory, available: int
) -> Largest:
    """The largest rank, batch and length that fit into `available` bytes.

    The memory of a step grows in proportion with rows and rank, and with the square of
    the length at most; so few programs need to be compiled.

    Args:
      model, config: as in `plan_memory`.
      memory: its result.
      available: bytes.
    """
    rank, batch, length = config.lora_rank, config.batch_size, config.sequence_length
    fixed = memory.total - memory.step - memory.adapters - memory.optimizer

    def total(**changes: Any) -> int:
        other = dataclasses.replace(config, **changes)
        ratio = other.lora_rank / rank
        scaled = ratio * (memory.adapters + memory.optimizer)
        return round(fixed + scaled + step_bytes(model, other))

    lengths = np.array([length, 2 * length, 4 * length])
    points = [memory.total, *(total(sequence_length=int(x)) for x in lengths[1:])]
    curve = np.polyfit(lengths, points, 2)
    candidates = np.arange(_ROUND, 1 << 20, _ROUND, dtype=np.float64)
    # Only where it rises: rounding may bend the curve down far away.
    rising = np.maximum.accumulate(np.polyval(curve, candidates))
    fitting = candidates[rising <= available * (1 + 1e-9)]  # the fit rounds
    two = total(batch_size=2 * batch)
    return Largest(
        rank=_largest_rank(rank, memory.total, lambda r: total(lora_rank=r), available),
        batch_size=_reach(batch, memory.total, 2 * batch, two, available),
        sequence_length=int(fitting.max()) if fitting.size else 0,
    )


def _largest_rank(
    rank: int, here: int, total: Callable[[int], int], available: int
) -> int:
    """The largest rank; what a token keeps grows in blocks of `_RANK_BLOCK` ranks."""
    top = -(-rank // _RANK_BLOCK) * _RANK_BLOCK
    at_top = here if top == rank else total(top)
    if at_top > available:
        # Within the block that `rank` is in.
        return rank if top == rank else _reach(rank, here, top, at_top, available)
    if top == MAX_LORA_RANK:
        return top
    step = total(top + _RANK_BLOCK) - at_top
    blocks = (available - at_top) // step if step > 0 else MAX_LORA_RANK
    return min(MAX_LORA_RANK, top + int(blocks) * _RANK_BLOCK)


def _reach(x: int, y: int, other_x: int, other_y: int, limit: int) -> int:
    """The whole x at which the line through two points is at `limit`, at least 0."""
    slope = (other_y - y) / (other_x - x)
    if slope <= 0:
        return x if y <= limit else 0
    return max(0, int(x + (limit - y) / slope))


def measure_time(
    model: ModelConfig, config: TrainConfig, available: int, repeats: int = 4
) -> tuple[Timing, int]:
    """Seconds of a step, and bytes of the kernels' workspace, from one random layer.

    Args:
      model, config: as in `plan_memory`.
      available: bytes that may be used; a layer that needs too large a part of them is
        measured with fewer experts and as many tokens fewer.
      repeats: steps after the first, whose fastest counts.

    Raises:
      ValueError: not even one expert with its tokens fits.
      RuntimeError: others keep the machine so busy that nothing can be told.
    """
    measured, rows, share = _measurable(model, config, available)
    config = dataclasses.replace(config, batch_size=rows, accumulation=1)
    # Without logits, whose time would hide that of a layer.
    small = dataclasses.replace(measured, vocab_size=_SMALL_VOCABULARY)
    with _random_store(model, config, measured.num_experts) as store:
        one, two, whole = (
            _time_steps(_shallow(kind, depth), config, store, repeats)
            for kind, depth in ((small, 1), (small, 2), (measured, 1))
        )
        workspace = _native.workspace_bytes()
    if two <= one:
        raise RuntimeError(
            "the machine is too busy to measure a step: two layers took no longer than "
            "one; try again, or leave the measurement out with --no-measure"
        )
    layer = (two - one) / share
    rest = max(whole / share - layer, 0.0)
    step = rest + layer * model.num_hidden_layers
    return Timing(step, layer, rest, measured.num_experts), workspace


def _measurable(
    model: ModelConfig, config: TrainConfig, available: int
) -> tuple[ModelConfig, int, float]:
    """The layer to measure, its batch, and which share of the real work that is."""
    experts, rows = model.num_experts, config.batch_size
    per_expert = 3 * model.hidden_size * model.moe_intermediate_size
    # The weights in bfloat16, and the store made of them.
    while 4 * per_expert * experts > _MEASURED_SHARE * available:
        if experts % 2 or rows % 2 or experts // 2 < model.num_experts_per_tok:
            raise ValueError(
                f"a layer of {experts} experts takes "
                f"{4 * per_expert * experts / (1 << 30):.1f} GiB to measure, too much "
                f"of the {available / (1 << 30):.1f} GiB that are there; leave the "
                "measurement out, or give a batch_size that is a power of two"
            )
        experts, rows = experts // 2, rows // 2
    if experts == model.num_experts:
        return model, rows, 1.0
    share = experts / model.num_experts
    # Groups of experts would not divide; how they are chosen costs next to nothing.
    rule = dataclasses.replace(model.routing, groups=1, groups_per_tok=1, group_top=1)
    return dataclasses.replace(model, num_experts=experts, routing=rule), rows, share


def _time_steps(
    model: ModelConfig, config: TrainConfig, store: ExpertStore, repeats: int
) -> float:
    """Seconds of the fastest of some steps, compilation left out."""
    graph, arrays = nnx.split(_skeleton(model, config, store))
    split = split_model(nnx.merge(graph, _fill(arrays, store)))
    state = init_state(split, make_optimizer(config))
    step = make_train_step(split.graph, config)
    batch = _random_batch(model, config)
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        state, metrics = step(state, split.frozen, batch)
        jax.block_until_ready((state.lora, metrics))
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _fill(arrays: nnx.State, store: ExpertStore) -> nnx.State:
    """Random numbers for every array; the store's handle for handles."""
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * 0.05

    def value(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.uint32:
            return jnp.array(store.handle)
        return jnp.asarray(np.resize(block, leaf.shape), leaf.dtype)

    return jax.tree.map(value, arrays)


def _random_batch(model: ModelConfig, config: TrainConfig) -> Batch:
    shape = (config.batch_size, config.sequence_length)
    ids = np.random.default_rng(1).integers(0, model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    return Batch(ids, ids, ones.astype(np.float32), positions, ones)


@contextmanager
def _random_store(
    model: ModelConfig, config: TrainConfig, experts: int
) -> Iterator[ExpertStore]:
    """A store of `experts` experts with random weights, closed at the end."""
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * 0.05
    block = block.astype(ml_dtypes.bfloat16)
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    wide = np.resize(block, (experts, inner, hidden))
    tall = wide.reshape(experts, hidden, inner)
    store = ExpertStore.from_arrays(
        wide,
        wide,
        tall,
        format=config.experts or "bf16",
        group_size=config.group_size,
        zero_point=config.zero_point,
    )
    try:
        yield store
    finally:
        store.close()


def step_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """What a step needs beside its arguments and results, from shallow models.

    The most is needed either at the loss, with the logits and what the layers have
    kept, or at the end of the backward pass, with the gradients of all layers. Either
    grows with the layers, but one may hide the other in a shallow model. Without logits
    to speak of, the other shows.
    """
    small = dataclasses.replace(model, vocab_size=_SMALL_VOCABULARY)
    return max(_deep_bytes(kind, config) for kind in (model, small))


def _deep_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """The line through two and three layers, at as many as the model has.

    The first layer is not like the others: its input needs no gradient.
    """
    depth = model.num_hidden_layers
    if depth <= 3:
        return compiled_bytes(_shallow(model, depth), config)
    two, three = (compiled_bytes(_shallow(model, depth), config) for depth in (2, 3))
    return two + (depth - 2) * max(three - two, 0)


def compiled_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """What XLA allocates for a step of just this model, all layers compiled."""
    split, state = _abstract(model, config)
    rows = config.batch_size * config.accumulation
    shape = (rows, config.sequence_length)
    kinds = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    abstract: Any = (jax.ShapeDtypeStruct(shape, kind) for kind in kinds)
    batch = Batch(*abstract)
    step: Any = make_train_step(split.graph, config)
    analysis = step.lower(state, split.frozen, batch).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _abstract(model: ModelConfig, config: TrainConfig) -> tuple[SplitModel, TrainState]:
    """The parts of a model and of the state that trains it, as shapes alone."""
    encoding = Encoding.of(
        config.experts or "bf16",
        config.group_size,
        config.zero_point,
        where="plan",
    )
    for depth in (model.hidden_size, model.moe_intermediate_size):
        encoding.check_depth(depth, where="plan: hidden or intermediate size")
    geometry = Geometry(
        encoding.format,
        model.num_experts,
        model.hidden_size,
        model.moe_intermediate_size,
        encoding.group_size,
        encoding.zero_point,
    )
    nowhere = ExpertStore(np.zeros(2, np.uint32), geometry)
    split = split_model(_skeleton(model, config, nowhere))

    def start(lora: nnx.State, random: nnx.State) -> TrainState:
        parts = dataclasses.replace(split, lora=lora, random=random)
        return init_state(parts, make_optimizer(config))

    return split, jax.eval_shape(start, split.lora, split.random)


def _skeleton(model: ModelConfig, config: TrainConfig, store: ExpertStore) -> Decoder:
    """The model as shapes alone, with the same store in every layer."""

    def experts(index: int) -> RoutedExperts:
        name = experts_name(index)
        own = config.lora.of_module(name)
        return RoutedExperts(
            store,
            lora_rank=own.rank if config.lora.adapts(name) else None,
            lora_alpha=own.scaling * own.rank,
            activation_policy=config.activation_policy,
            rngs=nnx.Rngs(0),
        )

    def build() -> Decoder:
        decoder = Decoder(
            model, experts, dtype=config.dtype, remat=config.remat, rngs=nnx.Rngs(0)
        )
        adapt_projections(decoder, config.lora, nnx.Rngs(0))
        return decoder

    return nnx.eval_shape(build)


def _shallow(model: ModelConfig, depth: int) -> ModelConfig:
    """The model with so many layers, all with experts."""
    return dataclasses.replace(model, num_hidden_layers=depth, dense_layers=())


def _moe_layers(model: ModelConfig) -> list[int]:
    return [i for i in range(model.num_hidden_layers) if model.is_moe_layer(i)]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
