"""Seconds of a step, from layers of random weights that are timed for ten seconds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import jax
from flax import nnx

from ktjax import _native, backend
from ktjax.models import ModelConfig
from ktjax.store import ExpertStore
from ktjax.store_linear import LinearGeometry, LinearStore
from ktjax.train.config import TrainConfig
from ktjax.train.optimizer import make_optimizer
from ktjax.train.plan_adapters import layer_adapters
from ktjax.train.plan_program import (
    encoding_of,
    fill,
    random_batch,
    random_linear,
    random_store,
    shallow,
    skeleton,
)
from ktjax.train.step import init_state, make_train_step, split_model

# How long steps are timed, and how often each at least.
SECONDS = 10.0
_LEAST_ROUNDS = 3
# The deeper of the two models whose difference is the time of a layer.
_DEEP = 3
# Tokens of a vocabulary whose logits are next to nothing.
SMALL_VOCABULARY = 8
# The layer that is measured may take this share of the memory that is there.
_MEASURED_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    Attributes:
      step: the whole step's.
      layer: one decoder layer's, forward, backward and update.
      rest: embeddings, head and loss.
      measured_experts: experts that were measured; fewer than the layer has, with as
        many tokens fewer, where a layer takes too much memory.
    """

    step: float
    layer: float
    rest: float
    measured_experts: int


def measure_time(
    model: ModelConfig, config: TrainConfig, available: int
) -> tuple[Timing, int]:
    """Seconds of a step, and bytes of the kernels' workspace.

    Steps of one layer, of three, and of one with the whole vocabulary take turns for
    `SECONDS`; the fastest of each counts, which what others do to the machine distorts
    least. Where layers have different adapters, all count as the layer with experts
    whose adapters are largest.

    Args:
      model, config: as in `plan_memory`.
      available: bytes that may be used; a layer that needs too large a part of them is
        measured with fewer experts and as many tokens fewer.

    Raises:
      ValueError: not even one expert with its tokens fits.
      RuntimeError: others keep the machine so busy that nothing can be told.
    """
    measured, rows, share = measurable(model, config, available)
    config = layer_adapters(model, config).config
    # Dropout costs next to nothing, and its state is no array of random numbers.
    config = dataclasses.replace(
        config, batch_size=rows, accumulation=1, lora_dropout=0.0
    )
    # Without logits, whose time would hide that of a layer.
    small = dataclasses.replace(measured, vocab_size=SMALL_VOCABULARY)
    linears: dict[LinearGeometry, LinearStore] = {}

    def linear(kind: LinearGeometry) -> LinearStore:
        if kind not in linears:
            linears[kind] = random_linear(kind)
        return linears[kind]

    try:
        with random_store(
            encoding_of(config),
            measured.num_experts,
            measured.hidden_size,
            measured.moe_intermediate_size,
        ) as store:
            kinds = ((small, 1), (small, _DEEP), (measured, 1))
            steps = [
                _prepare(shallow(kind, depth), config, store, linear)
                for kind, depth in kinds
            ]
            one, deep, whole = _fastest(steps)
            workspace = _native.workspace_bytes()
    finally:
        for held in linears.values():
            held.close()
        backend.trim_memory()
    if deep <= one:
        raise RuntimeError(
            f"the machine is too busy to measure a step: {_DEEP} layers took no longer "
            "than one; try again, or leave the measurement out with --no-measure"
        )
    layer = (deep - one) / (_DEEP - 1) / share
    rest = max(whole / share - layer, 0.0)
    return (
        Timing(
            rest + layer * model.num_hidden_layers, layer, rest, measured.num_experts
        ),
        workspace,
    )


def measurable(
    model: ModelConfig, config: TrainConfig, available: int
) -> tuple[ModelConfig, int, float]:
    """The layer to measure, its batch, and which share of the real work that is."""
    experts, rows = model.num_experts, config.batch_size
    per_expert = 3 * model.hidden_size * model.moe_intermediate_size
    # The weights in bfloat16, and the store made of them.
    fits = max(1, int(_MEASURED_SHARE * available) // (4 * per_expert))
    halvings = max(0, math.ceil(math.log2(experts / fits)))
    parts = 2**halvings
    if experts % parts or experts // parts < model.num_experts_per_tok:
        raise ValueError(
            f"a layer of {experts} experts takes "
            f"{4 * per_expert * experts / (1 << 30):.1f} GiB to measure, too much of "
            f"the {available / (1 << 30):.1f} GiB that are there; leave the "
            "measurement out with --no-measure"
        )
    if rows % parts:
        raise ValueError(
            f"a layer of {experts} experts takes too much memory to measure, so one "
            f"of {parts} parts of it is, with as many rows fewer; give a batch_size "
            f"that is a multiple of {parts}, not {rows}, or leave the measurement out "
            "with --no-measure"
        )
    experts, rows = experts // parts, rows // parts
    if experts == model.num_experts:
        return model, rows, 1.0
    share = experts / model.num_experts
    # Groups of experts would not divide; how they are chosen costs next to nothing.
    rule = dataclasses.replace(model.routing, groups=1, groups_per_tok=1, group_top=1)
    return dataclasses.replace(model, num_experts=experts, routing=rule), rows, share


def _prepare(
    model: ModelConfig,
    config: TrainConfig,
    store: ExpertStore,
    linear: Callable[[LinearGeometry], LinearStore],
) -> Callable[[], float]:
    """A function that does a step and returns its seconds; it has done two."""
    graph, arrays = nnx.split(skeleton(model, config, store, linear))
    split = split_model(nnx.merge(graph, fill(arrays, store)))
    state = init_state(split, make_optimizer(config))
    step = make_train_step(split.graph, config)
    batch = random_batch(model, config)

    def run() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, split.frozen, batch)
        jax.block_until_ready((state.lora, metrics))
        return time.perf_counter() - began

    # The first compiles, the second still finds memory that nobody has touched.
    run()
    run()
    return run


def _fastest(steps: list[Callable[[], float]]) -> list[float]:
    """The fastest of each, in turns."""
    best = [float("inf")] * len(steps)
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
        best = [min(b, step()) for b, step in zip(best, steps, strict=True)]
        rounds += 1
    return best
