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

    Accelerators sort the slots by expert and multiply group by group. On the CPU
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
    """`moe` of `[tokens, hidden]`, by products of groups of rows."""
    experts, (tokens, k) = len(gate), ids.shape
    # Skipped slots come last, in no group.
    expert = jnp.where(ids < 0, experts, ids).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=experts + 1)[:experts].astype(jnp.int32)

    def product(rows: Array, matrix: Array) -> Array:
        return jax.lax.ragged_dot(
            rows,
            matrix.astype(rows.dtype).swapaxes(1, 2),
            sizes,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )

    rows = x[order // k]
    hidden = jax.nn.silu(product(rows, gate)) * product(rows, up)
    out = product(hidden.astype(x.dtype), down)
    # What a product has beyond its groups is not defined.
    chosen = (expert[order] < experts)[:, None]
    out = jnp.where(chosen, w.reshape(-1)[order, None] * out, 0)
    # Back in the order of slots, so that every token's sum has a fixed order.
    return out[jnp.argsort(order)].reshape(tokens, k, x.shape[-1]).sum(1)
