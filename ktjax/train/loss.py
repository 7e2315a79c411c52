"""The training loss, from the losses of the tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def weigh(losses: jax.Array, weights: jax.typing.ArrayLike) -> jax.Array:
    """`losses * weights`, and 0 where the weight is 0, whatever the loss.

    Not a product: a masked position that overflowed would give 0 * inf = NaN. Summed up
    and not averaged, so that micro-batches with unequal numbers of learnt tokens add up
    to exactly the loss of one big batch.

    Args:
      losses: `[batch, sequence]` float32, as `ktjax.nn.token_losses` gives them.
      weights: `[batch, sequence]` float32.

    Returns:
      `[batch, sequence]` float32.
    """
    weights = jnp.asarray(weights)
    return jnp.where(weights != 0, losses * weights, 0.0)
