"""Dropout of the adapters' inputs where a kernel applies it: only a seed passes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.ops.dropout import check_rate

Array = Any


class AdapterDropout(nnx.Dropout):
    """An `nnx.Dropout` that gives seeds for the masks of `ktjax.moe`.

    It is switched as any other: off after `model.eval()`, on after `model.train()` and
    at first. Its stream is `dropout` of the `nnx.Rngs`, and counts the calls, so that
    every call has a mask of its own and a saved `nnx.RngState` brings all of them back.
    """

    def __init__(self, rate: float, *, rngs: nnx.Rngs | None, where: str) -> None:
        """Fork the stream, unless the rate is 0.

        Args:
          rate: the share of values that is dropped; at least 0 and below 1.
          rngs: source of the stream; needed with a rate above 0.
          where: whose dropout it is, for errors.

        Raises:
          ValueError: a rate out of its range, or above 0 without rngs.
        """
        check_rate(rate, where=f"{where}: dropout")
        if rate > 0 and rngs is None:
            raise ValueError(f"{where}: dropout needs rngs to draw seeds from")
        super().__init__(rate, rngs=rngs if rate > 0 else None)

    def seed(self) -> Array | None:
        """A new seed, `uint32[2]`; None when nothing is to be dropped."""
        if self.rate == 0 or self.deterministic:
            return None
        return jax.random.bits(self.rngs(), (2,), jnp.uint32)
