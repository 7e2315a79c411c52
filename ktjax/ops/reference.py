"""The operations in pure JAX and float32: the oracle of every kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ktjax.lora import LinearLoRA, LoRA
from ktjax.ops.dropout import check_dropout, keep

Array = Any


def moe(
    x: Array,
    ids: Array,
    w: Array,
    gate: Array,
    up: Array,
    down: Array,
    lora: LoRA | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    dropout_seed: Array | None = None,
) -> Array:
    """Routed experts with SwiGLU and LoRA, in float32, one expert at a time.

    For token t and slot j with expert e = ids[t, j]:

        g = x Wgᵀ + s (x Agᵀ) Bgᵀ    u = x Wuᵀ + s (x Auᵀ) Buᵀ    h = silu(g) u
        d = h Wdᵀ + s (h Adᵀ) Bdᵀ    y[t] = Σ_j w[t, j] d[t, j]

    Every expert sees every token, so the cost is `experts` times that of a dense layer;
    only one expert's activations live at a time.

    Args:
      x: `[..., hidden]`, float32 or bfloat16.
      ids: `[..., k]` int32; -1 skips a slot.
      w: `[..., k]` float32 routing weights.
      gate: `[experts, intermediate, hidden]`.
      up: `[experts, intermediate, hidden]`.
      down: `[experts, hidden, intermediate]`.
      lora: adapters, or None.
      scaling: s = lora_alpha / lora_rank.
      dropout: rate of dropout on the adapters' inputs, as in `ktjax.moe`, with the very
        masks of the kernels.
      dropout_seed: `uint32[2]`, or a PRNG key; needed with a rate above 0.

    Returns:
      `[..., hidden]` in the dtype of x.
    """
    f32 = jnp.float32
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden).astype(f32)
    slot_ids = ids.reshape(-1, ids.shape[-1])
    slot_w = w.reshape(-1, w.shape[-1]).astype(f32)
    seed = check_dropout(dropout, dropout_seed, lora, where="reference.moe")
    keep_x = keep_h = None
    if seed is not None:
        # Every slot has masks of its own, so slots take the place of tokens.
        slots, scaling = slot_ids.size, scaling / (1 - dropout)
        rows = jnp.repeat(rows, ids.shape[-1], axis=0)
        slot_ids, slot_w = slot_ids.reshape(-1, 1), slot_w.reshape(-1, 1)
        keep_x = keep(seed, slots, hidden, "x", dropout)
        keep_h = keep(seed, slots, gate.shape[1], "h", dropout)

    def add_expert(total, expert):
        index, base, adapter = expert
        a = adapter or LoRA(*[None] * 6)
        g = _project(rows, base[0], a.gate_a, a.gate_b, scaling, keep_x)
        u = _project(rows, base[1], a.up_a, a.up_b, scaling, keep_x)
        d = _project(jax.nn.silu(g) * u, base[2], a.down_a, a.down_b, scaling, keep_h)
        share = jnp.sum(jnp.where(slot_ids == index, slot_w, 0.0), axis=-1)
        # A token that did not choose this expert must not see its values at all: zero
        # times an overflow is not zero.
        chosen = jnp.any(slot_ids == index, axis=-1)
        return total + jnp.where(chosen[:, None], share[:, None] * d, 0.0), None

    experts = jnp.arange(gate.shape[0], dtype=slot_ids.dtype)
    total, _ = jax.lax.scan(
        jax.checkpoint(add_expert),
        jnp.zeros_like(rows),
        (experts, (gate, up, down), lora),
    )
    if seed is not None:
        total = total.reshape(-1, ids.shape[-1], hidden).sum(1)
    return total.astype(x.dtype).reshape(x.shape)


def linear(
    x: Array, weight: Array, lora: LinearLoRA | None = None, *, scaling: float = 1.0
) -> Array:
    """`x Wᵀ + s (x Aᵀ) Bᵀ` in float32.

    Args:
      x: `[..., in]`, float32 or bfloat16.
      weight: `[out, in]`.
      lora: adapters, or None.
      scaling: s = lora_alpha / lora_rank.

    Returns:
      `[..., out]` in the dtype of x.
    """
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    return _project(x.astype(jnp.float32), weight, a, b, scaling).astype(x.dtype)


def _project(
    rows: Array,
    weight: Array,
    a: Array,
    b: Array,
    scaling: float,
    keep: Array | None = None,
) -> Array:
    """Rows in float32; a and b may be None. Adapters see the values to `keep` only."""

    def product(rows: Array, matrix: Array) -> Array:
        matrix = matrix.astype(jnp.float32)
        return jnp.matmul(rows, matrix.T, precision=jax.lax.Precision.HIGHEST)

    out = product(rows, weight)
    if a is None:
        return out
    seen = rows if keep is None else jnp.where(keep, rows, 0)
    return out + scaling * product(product(seen, a), b)
