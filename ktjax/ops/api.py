"""`ktjax.moe`: checks, reshapes, dispatch."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ktjax.lora import LoRA
from ktjax.ops import vjp
from ktjax.ops.dropout import check_dropout
from ktjax.ops.native import Spec
from ktjax.quant.formats import check_compute
from ktjax.store import ExpertStore
from ktjax.store_base import check_handle

Array = Any

ACTIVATION_POLICIES = ("save", "recompute")


def moe(
    x: Array,
    ids: Array,
    w: Array,
    store: ExpertStore | Array,
    lora: LoRA | None = None,
    *,
    scaling: float = 1.0,
    activation_policy: Literal["save", "recompute"] = "save",
    compute: Literal["bf16", "int8"] | None = None,
    dropout: float = 0.0,
    dropout_seed: Array | None = None,
) -> Array:
    """A mixture of experts with SwiGLU and LoRA, computed on the CPU.

    For token t and slot j with expert e = ids[t, j]:

        g = x Wgᵀ + s (x Agᵀ) Bgᵀ    u = x Wuᵀ + s (x Auᵀ) Buᵀ    h = silu(g) u
        d = h Wdᵀ + s (h Adᵀ) Bdᵀ    y[t] = Σ_j w[t, j] d[t, j]

    Pure and differentiable in `x`, `w` and `lora`; the base weights are frozen.
    Products take bfloat16 operands and add in float32, gradients included; the result
    is rounded once. Same inputs give the same bits, for any number of threads. Weights
    have the values of `ExpertStore.dequantize()`, in the forward and the backward; with
    `compute="int8"` the forward takes those of GGUF before they are rounded.

    Under `jax.vmap` over x, ids and w the batch is folded into the tokens, but for the
    gradients of LoRA, which are computed one element at a time, and all with dropout.

    With dropout the adapters see D(x) and D(h), where D sets a value to 0 with
    probability p and divides it by 1 - p else:

        g = x Wgᵀ + s (D(x) Agᵀ) Bgᵀ    and so on; the base sees all of x and h.

    Each slot, so each expert of each token, has a mask of its own for x, which gate and
    up share, and one for h. It is a function of the seed, of the slot's number
    t * k + j among the call's tokens, and of the column, and is never stored: another
    seed is another mask, the same one gives the same bits wherever it is computed.

    Args:
      x: `[..., hidden]`, float32 or bfloat16.
      ids: `[..., k]` int32, experts in [0, experts); -1 skips the slot: it adds nothing
        and its gradients are exactly 0.
      w: `[..., k]` float32 routing weights.
      store: the base weights, or the handle of a store (`uint32[2]`). With a bare
        handle and no LoRA the width of the experts is unknown here, so nothing is kept
        for the backward, whatever the policy.
      lora: adapters, float32 or bfloat16, or None. Gradients have their dtype.
      scaling: s = lora_alpha / lora_rank, static.
      activation_policy: "save" keeps `4 * intermediate + 12 * rank` bytes a slot for
        the backward, in bfloat16; "recompute" keeps nothing and computes them again.
      compute: "bf16", the default of None: products as said above. "int8", for
        inference with a store in int8, int4, int4_kgroup, rawint4 or GGUF's blocks: the
        base products of the forward take activations quantised to int8, by token and
        group of 128 values, and sum integers. The backward's products are those of
        "bf16" in either case.
      dropout: the rate p of dropout on the adapters' inputs, static; 0 = none.
      dropout_seed: `uint32[2]`, or a PRNG key; needed with a rate above 0, and best a
        new one for each call of a training. No gradient passes through it.

    Returns:
      `[..., hidden]` in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, an unknown policy, compute="int8" with a
        store of another format or with a bare handle, whose format is unknown here, a
        rate outside [0, 1), or one above 0 without a seed or without adapters.
      TypeError: wrong dtypes.
      jax.errors.JaxRuntimeError or ValueError: raised when the call runs, for an id out
        of range and for a closed store.
    """
    if activation_policy not in ACTIVATION_POLICIES:
        raise ValueError(
            f"moe: activation_policy: expected one of {list(ACTIVATION_POLICIES)}, got "
            f"{activation_policy!r}"
        )
    x, ids, w = jnp.asarray(x), jnp.asarray(ids), jnp.asarray(w)
    handle, intermediate = _check(x, ids, w, store, lora)
    formats = store.formats if isinstance(store, ExpertStore) else None
    int8 = check_compute(compute, formats, where="moe")
    keep = activation_policy == "save" and intermediate is not None
    seed = check_dropout(dropout, dropout_seed, lora, where="moe")
    spec = Spec(intermediate, float(scaling), keep, int8, float(dropout))
    return _moe(spec, x, ids, w, handle, lora, seed)


@functools.partial(jax.jit, static_argnums=0)
def _moe(spec, x, ids, w, handle, lora, seed):
    tokens = math.prod(x.shape[:-1])
    k = ids.shape[-1]
    y = vjp.moe(
        spec,
        x.reshape(tokens, x.shape[-1]),
        ids.reshape(tokens, k),
        w.reshape(tokens, k),
        handle,
        lora,
        seed,
    )
    return y.reshape(x.shape)


def _check(
    x: Array, ids: Array, w: Array, store: ExpertStore | Array, lora: LoRA | None
) -> tuple[Array, int | None]:
    """The handle, and the width of the experts where it is known."""
    experts: int | None = None
    intermediate: int | None = None
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"moe: x: expected float32 or bfloat16, got {x.dtype}")
    if ids.dtype != jnp.int32:
        raise TypeError(f"moe: ids: expected int32, got {ids.dtype}")
    if w.dtype != jnp.float32:
        raise TypeError(f"moe: w: expected float32, got {w.dtype}")
    if x.ndim < 1 or ids.ndim != x.ndim or ids.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"moe: ids: expected {(*x.shape[:-1], 'k')} to match x {x.shape}, got "
            f"{ids.shape}"
        )
    if w.shape != ids.shape:
        raise ValueError(f"moe: w: expected {ids.shape} like ids, got {w.shape}")

    if isinstance(store, ExpertStore):
        handle, geometry = store.handle, store.geometry
        if x.shape[-1] != geometry.hidden_size:
            raise ValueError(
                f"moe: x: expected a last dimension of {geometry.hidden_size}, the "
                f"hidden size of the store, got {x.shape}"
            )
        experts, intermediate = geometry.num_experts, geometry.intermediate_size
    else:
        handle = jnp.asarray(store)
        if lora is not None and jnp.ndim(lora.gate_b) == 3:
            experts, intermediate = lora.gate_b.shape[:2]
    check_handle(handle, ExpertStore, where="moe")
    if lora is not None:
        lora.validate(experts, x.shape[-1], intermediate)
    return handle, intermediate
