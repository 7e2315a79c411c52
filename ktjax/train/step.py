"""The optimizer step: a pure, jitted function of (state, frozen, batch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ktjax.nn import Routing, load_balancing_loss
from ktjax.train.batching import Batch
from ktjax.train.config import TrainConfig
from ktjax.train.loss import weigh

Metrics = dict[str, jax.Array]


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


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model in parts: static graph, changing lora and random, constant frozen."""

    graph: nnx.GraphDef
    lora: nnx.State
    random: nnx.State
    frozen: nnx.State


def split_model(model: nnx.Module) -> SplitModel:
    """Take `model` apart.

    Raises:
      ValueError: the model has no `nnx.LoRAParam`, so nothing could be trained.
    """
    parts: Any = nnx.split(model, nnx.LoRAParam, nnx.RngState, ...)
    graph, lora, random, frozen = parts
    if not jax.tree.leaves(lora):
        raise ValueError(
            "train: the model has no nnx.LoRAParam; load it with a LoRA configuration"
        )
    return SplitModel(graph, lora, random, frozen)


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then a cosine down to `final_rate` of it."""
    return optax.warmup_cosine_decay_schedule(
        # Not from 0, or the first step would be lost.
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_rate,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW under the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(make_schedule(config), weight_decay=config.weight_decay),
    )


def init_state(
    split: SplitModel, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; copies, so that donating it spares the model."""
    lora, random = jax.tree.map(jnp.copy, (split.lora, split.random))
    return TrainState(lora, random, optimizer.init(lora), jnp.zeros((), jnp.int32))


def make_train_step(
    graph: nnx.GraphDef, config: TrainConfig
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; it donates the state.

    The batch's rows are cut into `config.accumulation` micro-batches, which a scan runs
    one after the other. Each adds its sum of losses, divided by the learnt tokens of
    the whole batch, so the gradient is that of the whole batch however the tokens are
    spread.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`; metrics are float32 scalars:
      loss (mean over learnt tokens), router_aux, grad_norm (before clipping) and
      learning_rate.
    """
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    count = config.accumulation

    def loss_fn(
        lora: nnx.State, random: nnx.State, frozen: nnx.State, batch: Batch, total: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, nnx.State]]:
        model = nnx.merge(graph, lora, random, frozen, copy=True)
        losses, routings = _token_losses(model, batch)
        loss = jnp.sum(weigh(losses, batch.weights)) / total
        balance = load_balancing_loss(routings) if routings else jnp.zeros(())
        aux = balance / count
        objective = loss + config.router_aux_weight * aux
        return objective, (loss, aux, nnx.state(model, nnx.RngState))

    def step(
        state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        total = jnp.maximum(jnp.sum(batch.weights), 1.0)
        micro_batches = jax.tree.map(
            lambda array: array.reshape(count, -1, *array.shape[1:]), batch
        )

        def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
            grads, loss, aux, random = carry
            (_, (more_loss, more_aux, random)), more_grads = jax.value_and_grad(
                loss_fn, has_aux=True
            )(state.lora, random, frozen, micro, total)
            grads = jax.tree.map(jnp.add, grads, more_grads)
            return (grads, loss + more_loss, aux + more_aux, random), None

        zero = jnp.zeros(())
        start = (jax.tree.map(jnp.zeros_like, state.lora), zero, zero, state.random)
        (grads, loss, aux, random), _ = jax.lax.scan(accumulate, start, micro_batches)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        metrics = {
            "loss": loss,
            "router_aux": aux,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(lora, random, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(
    graph: nnx.GraphDef,
) -> Callable[[nnx.State, nnx.State, nnx.State, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted `(lora, random, frozen, batch) -> (sum of losses, learnt tokens)`."""

    @jax.jit
    def step(
        lora: nnx.State, random: nnx.State, frozen: nnx.State, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, lora, random, frozen)
        losses, _ = _token_losses(model, batch)
        return jnp.sum(weigh(losses, batch.weights)), jnp.sum(batch.weights)

    return step


def _token_losses(model: Any, batch: Batch) -> tuple[jax.Array, tuple[Routing, ...]]:
    """The loss of every token of `batch`, and a `Routing` per layer with experts."""
    return model.token_losses(
        batch.input_ids,
        batch.targets,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
