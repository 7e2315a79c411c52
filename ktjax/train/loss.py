"""The training loss: cross-entropy of the learnt tokens, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def token_losses(logits: jax.Array, targets: jax.typing.ArrayLike) -> jax.Array:
    """-log softmax(logits)[targets] of every token, in float32.

    Args:
      logits: `[batch, sequence, vocab]`, any float dtype.
      targets: `[batch, sequence]` int32.

    Returns:
      `[batch, sequence]` float32.
    """
    return optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets
    )


def weigh(losses: jax.Array, weights: jax.typing.ArrayLike) -> jax.Array:
    """`losses * weights`, and 0 where the weight is 0, whatever the loss.

    Not a product: a masked position that overflowed would give 0 * inf = NaN.
    """
    weights = jnp.asarray(weights)
    return jnp.where(weights != 0, losses * weights, 0.0)


def cross_entropy_sum(
    logits: jax.Array, targets: jax.typing.ArrayLike, weights: jax.typing.ArrayLike
) -> jax.Array:
    """Σ weights · -log softmax(logits)[targets], accumulated in float32.

    A sum, not a mean, so that micro-batches with unequal numbers of learnt tokens add
    up to exactly the loss of one big batch.

    Args:
      logits: `[batch, sequence, vocab]`, any float dtype.
      targets: `[batch, sequence]` int32.
      weights: `[batch, sequence]` float32; where 0, nothing of the position counts.

    Returns:
      A float32 scalar.
    """
    return jnp.sum(weigh(token_losses(logits, targets), weights))
