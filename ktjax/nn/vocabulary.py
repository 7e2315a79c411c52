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
    project: Callable[..., Array],
    hidden: Array | tuple[Array, ...],
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
      hidden: `[batch, sequence, hidden]`; or a tuple of such arrays, of any widths or
        without a last axis, which `project` then gets as so many arguments.
      targets: `[batch, sequence]` int32.
      vocab_size: vocab.
      chunk_values: see above.

    Returns:
      `[batch, sequence]` float32.
    """

    def losses(rows: tuple[Array, ...], labels: Array) -> Array:
        logits = project(*rows).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    shape = jnp.shape(targets)
    labels = jnp.asarray(targets).reshape(-1)
    count = labels.size
    arrays = hidden if isinstance(hidden, tuple) else (hidden,)
    rows = tuple(array.reshape(count, *array.shape[2:]) for array in arrays)
    chunk = max(1, chunk_values // vocab_size)
    if count <= chunk:
        return losses(rows, labels).reshape(shape)
    # Equal chunks, so that the padding of the last one is less than a token for each.
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)

    def in_chunks(array: Array) -> Array:
        padding = [(0, chunks * chunk - count)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(chunks, chunk, *array.shape[1:])

    parts = jax.tree.map(in_chunks, (rows, labels))
    out = jax.lax.map(lambda part: jax.checkpoint(losses)(*part), parts)
    return out.reshape(-1)[:count].reshape(shape)
