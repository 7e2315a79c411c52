"""`ktjax.linear`: a frozen projection with LoRA. Checks, dispatch, differentiation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktjax.lora import LinearLoRA
from ktjax.ops.host import host_call
from ktjax.ops.native import fold, one_by_one, unfold
from ktjax.ops.vjp import is_primal, primal_leaves
from ktjax.store_base import check_handle
from ktjax.store_linear import LinearStore

Array = Any


def linear(
    x: Array,
    store: LinearStore,
    lora: LinearLoRA | None = None,
    *,
    scaling: float = 1.0,
) -> Array:
    """A projection with frozen weights and LoRA, computed on the CPU.

        y = x Wᵀ + s (x Aᵀ) Bᵀ

    Pure and differentiable in `x` and `lora`; the weights are frozen. Products take
    bfloat16 operands and add in float32, gradients included; the result is rounded
    once. float32 activations and adapters are carried in two bfloat16 parts, so that
    their results are exact to about 16 bits. Same inputs give the same bits, for any
    number of threads. Weights have the values of `LinearStore.dequantize()`, in the
    forward and the backward.

    The forward keeps nothing; the backward reads x only for gradients of LoRA. Under
    `jax.vmap` over x the batch is folded into the rows, but for the gradients of LoRA,
    which are computed one element at a time.

    Args:
      x: `[..., in]`, float32 or bfloat16.
      store: the weights.
      lora: adapters, or None.
      scaling: s = lora_alpha / lora_rank.

    Returns:
      `[..., out]` in the dtype of x.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: wrong dtypes, or a store that is none.
      jax.errors.JaxRuntimeError or ValueError: raised when the call runs, for a closed
        store.
    """
    x = jnp.asarray(x)
    _check(x, store, lora)
    spec = LinearSpec(store.in_features, store.out_features, float(scaling))
    return _linear(spec, x, store.handle, lora)


def _check(x: Array, store: LinearStore, lora: LinearLoRA | None) -> None:
    if not isinstance(store, LinearStore):
        raise TypeError(
            f"linear: store: expected a LinearStore, got {type(store).__name__}"
        )
    check_handle(store.handle, LinearStore, where="linear")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"linear: x: expected float32 or bfloat16, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] != store.in_features:
        raise ValueError(
            f"linear: x: expected a last dimension of {store.in_features}, the inputs "
            f"of the store, got {x.shape}"
        )
    if lora is not None:
        lora.validate(store.out_features, store.in_features)


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """The static side of a call; scaling is lora_alpha / lora_rank."""

    in_features: int
    out_features: int
    scaling: float


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class LinearNeeds:
    """Which gradients somebody asked for."""

    x: bool
    lora: bool


@functools.partial(jax.jit, static_argnums=0)
def _linear(spec, x, handle, lora):
    rows = math.prod(x.shape[:-1])
    y = _rule(spec, x.reshape(rows, x.shape[-1]), handle, lora)
    return y.reshape(*x.shape[:-1], spec.out_features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(spec: LinearSpec, x: Array, handle: Array, lora: LinearLoRA | None) -> Array:
    """`[rows, in] -> [rows, out]`."""
    return forward(spec)(x, handle, lora)


def _rule_forward(spec, x, handle, lora):
    needs = LinearNeeds(
        x=x.perturbed, lora=any(leaf.perturbed for leaf in primal_leaves(lora))
    )
    x, handle, lora = jax.tree.map(
        lambda leaf: leaf.value, (x, handle, lora), is_leaf=is_primal
    )
    y = forward(spec)(x, handle, lora)
    return y, (needs, x if needs.lora else None, handle, lora)


def _rule_backward(spec, residuals, gy):
    needs, x, handle, lora = residuals
    if isinstance(gy, jax.custom_derivatives.SymbolicZero) or not (
        needs.x or needs.lora
    ):
        return None, None, None
    grad_x, grad_lora = backward(spec, needs)(gy, handle, lora, x)
    return grad_x, None, grad_lora


_rule.defvjp(_rule_forward, _rule_backward, symbolic_zeros=True)


def _operands(lora: LinearLoRA | None) -> tuple[Array, ...]:
    return () if lora is None else (lora.a, lora.b)


def _attributes(spec: LinearSpec, lora: LinearLoRA | None) -> dict[str, Any]:
    return {"scaling": np.float32(spec.scaling), "has_lora": lora is not None}


@functools.cache
def forward(spec: LinearSpec) -> Callable[..., Array]:
    """`f(x [rows, in], handle, lora) -> y [rows, out]`."""

    @jax.custom_batching.custom_vmap
    def call(x, handle, lora):
        shape = jax.ShapeDtypeStruct((x.shape[0], spec.out_features), x.dtype)
        run = host_call("ktjax_linear_forward", [shape], **_attributes(spec, lora))
        (y,) = run(x, handle, *_operands(lora))
        return y

    @call.def_vmap
    def batched(axis_size, in_batched, x, handle, lora):
        if any(jax.tree.leaves(in_batched[1:])):
            return one_by_one(call, in_batched, (x, handle, lora)), True
        (rows,) = fold(axis_size, in_batched[:1], (x,))
        return unfold(axis_size, call(rows, handle, lora)), True

    return call


@functools.cache
def backward(spec: LinearSpec, needs: LinearNeeds) -> Callable[..., tuple[Any, Any]]:
    """`f(gy [rows, out], handle, lora, x [rows, in]) -> (grad x, grad LoRA)`.

    Gradients that nobody needs are None, and so is x where LoRA's are not needed.
    """

    @jax.custom_batching.custom_vmap
    def call(gy, handle, lora, x):
        results = []
        if needs.x:
            shape = (gy.shape[0], spec.in_features)
            results.append(jax.ShapeDtypeStruct(shape, gy.dtype))
        if needs.lora:
            results += [
                jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (lora.a, lora.b)
            ]
        run = host_call(
            "ktjax_linear_backward",
            results,
            need_x=needs.x,
            need_lora=needs.lora,
            **_attributes(spec, lora),
        )
        out = run(gy, handle, *_operands(lora), *(() if x is None else (x,)))
        grad_x = out.pop(0) if needs.x else None
        return grad_x, LinearLoRA(*out) if needs.lora else None

    @call.def_vmap
    def batched(axis_size, in_batched, gy, handle, lora, x):
        if needs.lora or any(jax.tree.leaves(in_batched[1:3])):
            # Every element of the batch has a LoRA gradient of its own.
            out = one_by_one(call, in_batched, (gy, handle, lora, x))
        else:
            (rows,) = fold(axis_size, in_batched[:1], (gy,))
            out = unfold(axis_size, call(rows, handle, lora, x))
        return out, jax.tree.map(lambda _: True, out)

    return call
