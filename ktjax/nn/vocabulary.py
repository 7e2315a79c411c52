"""The loss over a large vocabulary, without its logits as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Array = Any

# Logits that exist at a time: 128 MiB in float32. Weights of the head stream from
# memory once for each such chunk, which 220 tokens (of a vocabulary of 151936) hide.
CHUNK_VALUES = 1 << 25


def token_losses(
    project: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    vocab_size: int,
    *,
    chunk_values: int = CHUNK_VALUES,
) -> Array:
    """-log softmax(project(hidden))[targets] of every token, in float32.

    More tokens than `chunk_values` / `vocab_size` are taken in chunks: neither the
    forward nor the backward, which computes a chunk's logits again, ever holds more
    than `chunk_values` logits.

    Args:
      project: `[tokens, hidden] -> [tokens, vocab]`, a token at a time.
      hidden: `[batch, sequence, hidden]`.
      targets: `[batch, sequence]` int32.
      vocab_size: vocab.
      chunk_values: see above.

    Returns:
      `[batch, sequence]` float32.
    """

    def losses(rows: Array, labels: Array) -> Array:
        logits = project(rows).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    rows = hidden.reshape(-1, hidden.shape[-1])
    labels = jnp.asarray(targets).reshape(-1)
    count = rows.shape[0]
    chunk = max(1, chunk_values // vocab_size)
    if count <= chunk:
        return losses(rows, labels).reshape(hidden.shape[:-1])
    # Equal chunks, so that the padding of the last one is less than a token for each.
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    padding = chunks * chunk - count
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(chunks, chunk, -1)
    labels = jnp.pad(labels, (0, padding)).reshape(chunks, chunk)
    out = jax.lax.map(lambda part: jax.checkpoint(losses)(*part), (rows, labels))
    return out.reshape(-1)[:count].reshape(hidden.shape[:-1])
