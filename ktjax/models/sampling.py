"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to choose; validated when built.

    Attributes:
      temperature: divides the logits; 0 = always the most probable token.
      top_k: choose among the k most probable tokens only; None = all.
      top_p: choose among the fewest tokens whose probabilities reach p; None = all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature must be zero or positive, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@functools.partial(jax.jit, static_argnums=2)
def select(logits: Array, key: Array | None, sampler: Sampler) -> Array:
    """Choose a token for each row.

    Args:
      logits: `[batch, vocab]` float32.
      key: a PRNG key; unused, so it may be None, when the temperature is 0.
      sampler: how to choose.

    Returns:
      `[batch]` int32.
    """
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampler.temperature
    if sampler.top_k is not None:
        k = min(sampler.top_k, logits.shape[-1])
        least = jax.lax.top_k(logits, k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampler.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it fall short of p: the first always does.
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < sampler.top_p, ordered, jnp.inf)
        least = jnp.min(kept, axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    assert key is not None
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
