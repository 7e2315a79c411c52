"""The program that a training would run, from config.json alone: shapes and XLA's view.

Models are built as shapes, with stores that hold nothing, or the same few random ones
in every layer. So a step can be compiled, or run, without the weights of a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from ktjax.models import Decoder, ModelConfig
from ktjax.models.loading import stored_projections
from ktjax.models.targets import adapt_projections, experts_name
from ktjax.nn import FrozenLinear, RoutedExperts
from ktjax.quant.formats import Encoding
from ktjax.store import ExpertStore, Geometry
from ktjax.store_linear import LinearGeometry, LinearStore
from ktjax.train.batching import Batch
from ktjax.train.config import TrainConfig
from ktjax.train.optimizer import make_optimizer
from ktjax.train.step import (
    SplitModel,
    TrainState,
    init_state,
    make_train_step,
    split_model,
)

# Random numbers that larger arrays repeat; a prime, so that rows differ.
_BLOCK = 1_000_003
# Code is not run here: it need not be fast, and buffers are the same.
_QUICK = {"xla_backend_optimization_level": 0}
# Outputs of two small stores, from which the bytes of large ones follow.
_FEW_OUTPUTS = (128, 256)

LinearOf = Callable[[LinearGeometry], LinearStore]


def compiled_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """What XLA allocates for a step beside its arguments and results."""
    split, state = abstract(model, config)
    rows = config.batch_size * config.accumulation
    shape = (rows, config.sequence_length)
    kinds = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    shapes: Any = (jax.ShapeDtypeStruct(shape, kind) for kind in kinds)
    step: Any = make_train_step(split.graph, config)
    program = step.lower(state, split.frozen, Batch(*shapes)).compile(_QUICK)
    return int(program.memory_analysis().temp_size_in_bytes)


def abstract(model: ModelConfig, config: TrainConfig) -> tuple[SplitModel, TrainState]:
    """The parts of a model and of the state that trains it, as shapes alone."""
    encoding = encoding_of(config)
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
    nowhere = np.zeros(2, np.uint32)
    store = ExpertStore(nowhere, geometry)
    split = split_model(
        skeleton(model, config, store, lambda kind: LinearStore(nowhere, kind))
    )

    def start(lora: nnx.State, random: nnx.State) -> TrainState:
        parts = dataclasses.replace(split, lora=lora, random=random)
        return init_state(parts, make_optimizer(config))

    return split, jax.eval_shape(start, split.lora, split.random)


def skeleton(
    model: ModelConfig, config: TrainConfig, store: ExpertStore, linear: LinearOf
) -> Decoder:
    """The model as shapes alone, with the same store of experts in every layer.

    Handles, and adapters of projections, are arrays.
    """

    def experts(index: int) -> RoutedExperts:
        name = experts_name(index)
        own, adapts = config.lora.of_module(name), config.lora.adapts(name)
        return RoutedExperts(
            store,
            lora_rank=own.rank if adapts else None,
            lora_alpha=own.scaling * own.rank,
            dropout=own.dropout if adapts else 0.0,
            activation_policy=config.activation_policy,
            rngs=nnx.Rngs(0),
        )

    def build() -> Decoder:
        return Decoder(
            model, experts, dtype=config.dtype, remat=config.remat, rngs=nnx.Rngs(0)
        )

    decoder = nnx.eval_shape(build)
    # As `from_pretrained` would, of a checkpoint in bfloat16.
    for projection, format in stored_projections(decoder, config.dense):
        module = projection.module
        kind = _linear_geometry(format, *module.kernel.shape[::-1])
        stored = FrozenLinear(linear(kind), module.bias)
        setattr(projection.owner, projection.part, stored)
    adapt_projections(decoder, config.lora, nnx.Rngs(0))
    return decoder


def encoding_of(config: TrainConfig) -> Encoding:
    """How the experts are stored."""
    format = config.experts or "bf16"
    return Encoding.of(format, config.group_size, config.zero_point, where="plan")


def _linear_geometry(format: str, outputs: int, inputs: int) -> LinearGeometry:
    encoding = Encoding.of(format, where="plan")
    encoding.check_depth(inputs, where="plan: dense")
    return LinearGeometry(
        format, outputs, inputs, encoding.group_size, encoding.zero_point
    )


def shallow(model: ModelConfig, depth: int) -> ModelConfig:
    """The model with so many layers, all with experts."""
    return dataclasses.replace(model, num_hidden_layers=depth, dense_layers=())


def store_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of the store of one layer's experts: as many times those of one expert."""
    sizes = model.hidden_size, model.moe_intermediate_size
    with random_store(encoding_of(config), 1, *sizes) as store:
        return store.nbytes * model.num_experts


def linear_bytes(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of all stores of projections."""
    kinds: list[LinearGeometry] = []

    def note(kind: LinearGeometry) -> LinearStore:
        kinds.append(kind)
        return LinearStore(np.zeros(2, np.uint32), kind)

    encoding = encoding_of(config)
    sizes = (model.num_experts, model.hidden_size, model.moe_intermediate_size)
    nowhere = ExpertStore(np.zeros(2, np.uint32), Geometry(encoding.format, *sizes))
    skeleton(model, config, nowhere, note)
    return sum(_linear_bytes(kind) * kinds.count(kind) for kind in set(kinds))


def _linear_bytes(kind: LinearGeometry) -> int:
    """Of a small matrix those of its store; beyond, as much for every output more."""
    few, more = _FEW_OUTPUTS
    if kind.out_features <= more:
        return _with_outputs(kind, kind.out_features)
    fixed = _with_outputs(kind, few)
    each = (_with_outputs(kind, more) - fixed) / (more - few)
    return round(fixed + each * (kind.out_features - few))


def _with_outputs(kind: LinearGeometry, outputs: int) -> int:
    store = random_linear(kind._replace(out_features=outputs))
    try:
        return store.nbytes
    finally:
        store.close()


@contextmanager
def random_store(
    encoding: Encoding, experts: int, hidden: int, width: int
) -> Iterator[ExpertStore]:
    """A store of `experts` experts with random weights, closed at the end."""
    wide = _random((experts, width, hidden))
    tall = wide.reshape(experts, hidden, width)
    store = ExpertStore.from_arrays(
        wide,
        wide,
        tall,
        format=encoding.format,
        group_size=encoding.group_size or None,
        zero_point=encoding.zero_point,
    )
    del wide, tall
    try:
        yield store
    finally:
        store.close()


def random_linear(kind: LinearGeometry) -> LinearStore:
    """A store of random weights, for its owner to close."""
    weight = _random((kind.out_features, kind.in_features))
    return LinearStore.from_array(weight, format=kind.format)


def _random(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * 0.05
    return np.resize(block.astype(ml_dtypes.bfloat16), shape)


def fill(arrays: nnx.State, store: ExpertStore) -> nnx.State:
    """Random numbers for every shape; the store's handle for handles.

    What is an array already stays.
    """
    block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * 0.05

    def value(leaf: Any) -> jax.Array:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if leaf.dtype == jnp.uint32:
            return jnp.array(store.handle)
        return jnp.asarray(np.resize(block.astype(leaf.dtype), leaf.shape))

    return jax.tree.map(value, arrays)


def random_batch(model: ModelConfig, config: TrainConfig) -> Batch:
    """A batch of random tokens, one segment a row, all of them learnt."""
    shape = (config.batch_size, config.sequence_length)
    ids = np.random.default_rng(1).integers(0, model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    return Batch(ids, ids, ones.astype(np.float32), positions, ones)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
