"""Routed experts as plain XLA operations, for those that an accelerator computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ktjax.ops import reference

Array = Any


@jax.jit
def moe(x: Array, ids: Array, w: Array, gate: Array, up: Array, down: Array) -> Array:
    """The sum of the chosen experts, on whatever device the arrays are.

    Accelerators sort the slots by expert and multiply block by block. On the CPU
    `jax.lax.ragged_dot` computes every expert for every row and keeps all the results
    at once, so there the experts go one by one, in float32.

    Args:
      x: `[..., hidden]`, float32 or bfloat16.
      ids: `[..., k]` int32; -1 skips a slot.
      w: `[..., k]` float32.
      gate: `[experts, intermediate, hidden]`, bfloat16.
      up: `[experts, intermediate, hidden]`, bfloat16.
      down: `[experts, hidden, intermediate]`, bfloat16.

    Returns:
      `[..., hidden]` float32.
    """
    tokens = x.reshape(-1, x.shape[-1])
    slots = (-1, ids.shape[-1])
    y = jax.lax.platform_dependent(
        *(tokens, ids.reshape(slots), w.reshape(slots), gate, up, down),
        cpu=_one_by_one,
        default=sorted_groups,
    )
    return y.reshape(x.shape)


def _one_by_one(
    x: Array, ids: Array, w: Array, gate: Array, up: Array, down: Array
) -> Array:
    return reference.moe(x.astype(jnp.float32), ids, w, gate, up, down)


def sorted_groups(
    x: Array, ids: Array, w: Array, gate: Array, up: Array, down: Array
) -> Array:
    """`moe` of `[tokens, hidden]`, by a batch of products of blocks of rows.

    Slots are sorted by expert, those of an expert fill blocks, and a block is
    multiplied by a copy of its expert's matrices. Blocks have as many rows as experts
    would have on average if every slot were theirs, so there are at most twice as many
    blocks as experts, or with few slots one for each. `jax.lax.ragged_dot` on a GPU
    takes longer than that.
    """
    experts, (tokens, k) = len(gate), ids.shape
    slots = tokens * k
    rows = 1 << max(-(-slots // experts) - 1, 0).bit_length()
    # What the sizes of the groups, each rounded up, can come to.
    blocks = (slots + min(experts, slots) * (rows - 1)) // rows

    # Skipped slots come last, in no group.
    expert = jnp.where(ids < 0, experts, ids).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=experts + 1)
    filled = -(-sizes // rows)
    ends = jnp.cumsum(filled)
    shift = rows * (ends - filled) - (jnp.cumsum(sizes) - sizes)
    row = (jnp.arange(slots) + shift[expert[order]]).astype(jnp.int32)
    chosen = ids.reshape(-1) >= 0
    # Rows that nobody fills are those of token 0, and nobody reads them.
    tokens_of = jnp.zeros(blocks * rows, jnp.int32).at[row].set(order // k, mode="drop")
    of_block = jnp.searchsorted(ends[:-1], jnp.arange(blocks), side="right")
    of_block = jnp.minimum(of_block, experts - 1)

    def product(values: Array, matrix: Array) -> Array:
        return jnp.einsum(
            "bri,boi->bro",
            values,
            matrix[of_block].astype(values.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    values = x[tokens_of].reshape(blocks, rows, x.shape[-1])
    hidden = jax.nn.silu(product(values, gate)) * product(values, up)
    out = product(hidden.astype(x.dtype), down).reshape(-1, x.shape[-1])
    # In the order of slots, so that every token's sum has a fixed order.
    row_of = jnp.zeros(slots, jnp.int32).at[order].set(row)
    out = jnp.where(chosen[:, None], w.reshape(-1, 1) * out[row_of], 0)
    return out.reshape(tokens, k, x.shape[-1]).sum(1)
