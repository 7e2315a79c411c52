"""The differentiation rule of the mixture of experts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from ktjax.lora import LoRA
from ktjax.ops import native
from ktjax.ops.native import Needs, Spec

Array = Any

jax.tree_util.register_static(Needs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def moe(
    spec: Spec,
    x: Array,
    ids: Array,
    w: Array,
    handle: Array,
    lora: LoRA | None,
    seed: Array | None,
) -> Array:
    """`[tokens, hidden] -> [tokens, hidden]`; see `ktjax.moe`."""
    plain = dataclasses.replace(spec, keep=False)
    return native.forward(plain)(x, ids, w, handle, lora, seed)[0]


def _forward(spec, x, ids, w, handle, lora, seed):
    needs = Needs(
        x=x.perturbed,
        w=w.perturbed,
        lora=any(leaf.perturbed for leaf in primal_leaves(lora)),
    )
    x, ids, w, handle, lora, seed = jax.tree.map(
        lambda leaf: leaf.value, (x, ids, w, handle, lora, seed), is_leaf=is_primal
    )
    keep = spec.keep and (needs.x or needs.w or needs.lora)
    actual = dataclasses.replace(spec, keep=keep)
    y, kept = native.forward(actual)(x, ids, w, handle, lora, seed)
    return y, (needs, x, ids, w, handle, lora, seed, kept)


def _backward(spec, residuals, gy):
    needs, x, ids, w, handle, lora, seed, kept = residuals
    if isinstance(gy, jax.custom_derivatives.SymbolicZero) or not (
        needs.x or needs.w or needs.lora
    ):
        return None, None, None, None, None, None
    grad_x, grad_w, grad_lora = native.backward(spec, needs)(
        x, ids, w, handle, gy.astype(x.dtype), lora, seed, kept
    )
    return grad_x, None, grad_w, None, grad_lora, None


def is_primal(leaf: Any) -> bool:
    """Whether it is a value with what a rule with symbolic zeros says of it."""
    return hasattr(leaf, "perturbed")


def primal_leaves(tree: Any) -> list[Any]:
    """Such values in a tree."""
    return jax.tree.leaves(tree, is_leaf=is_primal)


moe.defvjp(_forward, _backward, symbolic_zeros=True)
