"""The pure-JAX mixture of LoRA experts: the oracle of every kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ktjax.lora import LoRA

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

    Returns:
      `[..., hidden]` in the dtype of x.
    """
    f32 = jnp.float32
    exact = jax.lax.Precision.HIGHEST
    hidden = x.shape[-1]
    rows = x.reshape(-1, hidden).astype(f32)
    slot_ids = ids.reshape(-1, ids.shape[-1])
    slot_w = w.reshape(-1, w.shape[-1]).astype(f32)

    def project(rows, weight, a, b):
        out = jnp.matmul(rows, weight.astype(f32).T, precision=exact)
        if a is None:
            return out
        low = jnp.matmul(rows, a.astype(f32).T, precision=exact)
        return out + scaling * jnp.matmul(low, b.astype(f32).T, precision=exact)

    def add_expert(total, expert):
        index, base, adapter = expert
        a = adapter or LoRA(*[None] * 6)
        g = project(rows, base[0], a.gate_a, a.gate_b)
        u = project(rows, base[1], a.up_a, a.up_b)
        d = project(jax.nn.silu(g) * u, base[2], a.down_a, a.down_b)
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
    return total.astype(x.dtype).reshape(x.shape)
