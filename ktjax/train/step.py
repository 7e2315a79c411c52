"""The optimizer step: a pure, jitted function of (state, frozen, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ktjax.nn import Routing, load_balancing_loss, load_shares, routing_statistics
from ktjax.train.batching import Batch
from ktjax.train.config import TrainConfig
from ktjax.train.objective import SFT, Objective, objective_of
from ktjax.train.optimizer import make_optimizer, make_schedule

Metrics = dict[str, jax.Array]

# In which order XLA:CPU computes: by default so that much can run at once, which holds
# up to twice as much memory at a time as the order that frees most.
_LESS_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Sums(NamedTuple):
    """What micro-batches add up to.

    Attributes:
      loss: float32 scalar, the mean over what the whole batch holds to learn.
      extras: other means of the objective, by name.
      router_aux: float32 scalar, the mean of the load-balancing losses.
      routings: one per layer with experts, the means over the micro-batches.
    """

    loss: jax.Array
    extras: Metrics
    router_aux: jax.Array
    routings: tuple[Routing, ...]


class EvalSums(NamedTuple):
    """What evaluation tells of a batch.

    Attributes:
      loss: float32 scalar, the sum of the objective.
      extras: other sums of the objective, by name.
      parts: float32 scalar, over how many they are.
      load: `[layers, experts]` float32, as `ktjax.nn.load_shares`; None when no layer
        has experts.
    """

    loss: jax.Array
    extras: Metrics
    parts: jax.Array
    load: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training.

    Attributes:
      lora: the model's `nnx.LoRAParam`s, the only trained parameters.
      random: the model's `nnx.RngState`, for instance of dropout.
      optimizer: optax's state.
      step: int32 scalar, the optimizer steps done.
    """

    lora: nnx.State
    random: nnx.State
    optimizer: Any
    step: jax.Array


class Frozen(NamedTuple):
    """What a step reads and never changes.

    Attributes:
      base: all of the model but its adapters and its random state.
      reference: adapters of the reference policy over the same base, or None.
    """

    base: nnx.State
    reference: nnx.State | None


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model in parts: static graph, changing lora and random, constant frozen."""

    graph: nnx.GraphDef
    lora: nnx.State
    random: nnx.State
    frozen: Frozen


def split_model(model: nnx.Module, *, keep_reference: bool = False) -> SplitModel:
    """Take `model` apart.

    Args:
      model: the model, with adapters.
      keep_reference: whether its present adapters become the reference policy, for
        `Objective.needs_reference`. Of the base weights there is one copy all the same.

    Raises:
      ValueError: the model has no `nnx.LoRAParam`, so nothing could be trained.
    """
    parts: Any = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)
    graph, lora, random, frozen = parts
    if not jax.tree.leaves(lora):
        raise ValueError(
            "train: the model has no nnx.LoRAParam; load it with a LoRA configuration"
        )
    reference = jax.tree.map(lambda leaf: leaf, lora) if keep_reference else None
    return SplitModel(graph, lora, random, Frozen(frozen, reference))


def init_state(
    split: SplitModel, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; copies, so that donating it spares the model."""
    lora, random = jax.tree.map(jnp.copy, (split.lora, split.random))
    return TrainState(lora, random, optimizer.init(lora), jnp.zeros((), jnp.int32))


def make_train_step(
    graph: nnx.GraphDef, config: TrainConfig
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; it donates the state.

    The batch's rows are cut into `config.accumulation` micro-batches, which a scan runs
    one after the other. Each adds its sum of losses, divided by what the whole batch
    holds to learn, so the gradient is that of the whole batch however that is spread.
    If the loss or the gradient is not finite, adapters and random state stay as they
    were.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`; metrics are scalars: loss (the
      mean over learnt tokens, or what else the objective says), the objective's extras,
      router_aux, what `ktjax.nn.routing_statistics` tells, grad_norm (before clipping),
      learning_rate, and bad_gradient: the first leaf of the gradient, in the order of
      `jax.tree.leaves(state.lora)`, with a norm that is not finite, or -1.
    """
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    objective, count = objective_of(config), config.accumulation

    def loss_fn(
        lora: nnx.State, random: nnx.State, frozen: Frozen, batch: Batch, total: Any
    ) -> tuple[jax.Array, tuple[Sums, nnx.State]]:
        model = nnx.merge(graph, lora, random, frozen.base, copy=True)
        losses, routings = _token_losses(model, batch)
        reference = _reference_losses(graph, random, frozen, batch)
        loss, extras = objective.total(losses, reference, batch)
        balance = load_balancing_loss(routings) if routings else jnp.zeros(())
        sums = Sums(
            loss / total,
            {name: value / total for name, value in extras.items()},
            balance / count,
            jax.tree.map(lambda mean: mean / count, routings),
        )
        wanted = sums.loss + config.router_aux_weight * sums.router_aux
        return wanted, (sums, nnx.state(model, nnx.RngState))

    def step(
        state: TrainState, frozen: Frozen, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        total = jnp.maximum(objective.count(batch), 1.0)

        def differentiate(random: nnx.State, micro: Batch) -> tuple[Any, Sums, Any]:
            (_, (sums, random)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.lora, random, frozen, micro, total
            )
            return grads, sums, random

        def accumulate(carry: Any, micro: Batch) -> tuple[Any, Sums]:
            grads, random = carry
            more, sums, random = differentiate(random, micro)
            return (jax.tree.map(jnp.add, grads, more), random), sums

        if count == 1:  # nothing to add to: one copy of the gradient is enough
            grads, sums, random = differentiate(state.random, batch)
        else:
            micro_batches = jax.tree.map(
                lambda array: array.reshape(count, -1, *array.shape[1:]), batch
            )
            start = (jax.tree.map(jnp.zeros_like, state.lora), state.random)
            (grads, random), parts = jax.lax.scan(accumulate, start, micro_batches)
            sums = jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.lora)
        squares = jnp.stack(
            [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
        )
        bad = ~jnp.isfinite(squares)
        norm = jnp.sqrt(jnp.sum(squares))
        good = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        lora, random = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(state.lora, updates), random),
            (state.lora, state.random),
        )
        metrics = {
            "loss": sums.loss,
            **sums.extras,
            "router_aux": sums.router_aux,
            **routing_statistics(sums.routings),
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "bad_gradient": jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
        }
        return TrainState(lora, random, opt_state, state.step + 1), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        compiler_options=_LESS_MEMORY if config.remat else None,
    )


def make_eval_step(
    graph: nnx.GraphDef, objective: Objective = SFT
) -> Callable[[nnx.State, nnx.State, Frozen, Batch], EvalSums]:
    """The jitted `(lora, random, frozen, batch) -> EvalSums`."""

    @jax.jit
    def step(
        lora: nnx.State, random: nnx.State, frozen: Frozen, batch: Batch
    ) -> EvalSums:
        model = nnx.merge(graph, lora, random, frozen.base)
        losses, routings = _token_losses(model, batch)
        reference = _reference_losses(graph, random, frozen, batch)
        return EvalSums(
            *objective.total(losses, reference, batch),
            objective.count(batch),
            load_shares(routings) if routings else None,
        )

    return step


def _token_losses(model: Any, batch: Batch) -> tuple[jax.Array, tuple[Routing, ...]]:
    """The loss of every token of `batch`, and a `Routing` per layer with experts."""
    return model.token_losses(
        batch.input_ids,
        batch.targets,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )


def _reference_losses(
    graph: nnx.GraphDef, random: nnx.State, frozen: Frozen, batch: Batch
) -> jax.Array | None:
    """The tokens' losses under the reference policy: its adapters, the same base."""
    if frozen.reference is None:
        return None
    model = nnx.merge(graph, frozen.reference, random, frozen.base, copy=True)
    model.eval()
    return jax.lax.stop_gradient(_token_losses(model, batch)[0])
