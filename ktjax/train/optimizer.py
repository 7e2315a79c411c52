"""Clipping and AdamW of optax, in a form that XLA computes in place.

Between the backward pass and the update all gradients are alive, and with the state
they are most of what a step of a large model needs. optax's own chain would take as
much again: a clipped copy of the gradients, which both moments read, and a copy of the
first moment, which its update and the parameters' both read.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ktjax.train.config import TrainConfig

_B1, _B2, _EPS = 0.9, 0.999, 1e-8


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
    """Clipping by the global norm, then AdamW under the schedule.

    The state is that of `optax.chain(optax.clip_by_global_norm, optax.adamw)`.
    """
    adamw = optax.chain(
        _scale_by_adam(config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config)),
    )
    return optax.chain(_clip_by_global_norm(config.clip_norm), adamw)


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """As optax's, by a factor: products are computed where they are used."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # 1 also for gradients of zeros; NaN stays NaN.
        factor = jnp.minimum(1.0, most / optax.tree.norm(updates))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by_adam(moment_dtype: str) -> optax.GradientTransformation:
    """As optax's, but directions come from the moments as they are stored.

    So the old ones are read once, and the new ones can take their place at once.
    """
    adam = optax.scale_by_adam(_B1, _B2, _EPS, mu_dtype=moment_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        _, state = adam.update(updates, state)
        count = state.count.astype(jnp.float32)
        first, second = (1 - b**count for b in (_B1, _B2))

        def direction(mu: jax.Array, nu: jax.Array) -> jax.Array:
            mean = mu.astype(nu.dtype) / first
            return mean / (jnp.sqrt(nu / second) + _EPS)

        return jax.tree.map(direction, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)
