"""The two FFI targets as JAX functions on tokens, with their batching rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktjax.lora import LoRA
from ktjax.ops.dropout import threshold
from ktjax.ops.host import host_call

Array = Any
_TILE = 32  # kDepth of the native library: columns of kept values are padded to this


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static side of a call.

    Attributes:
      intermediate: width of an expert.
      scaling: lora_alpha / lora_rank.
      keep: whether the forward keeps values for the backward.
      int8: whether base products of the forward, and of its recomputation in the
        backward, quantise activations to int8.
      dropout: the rate at which the adapters' inputs are dropped.
    """

    intermediate: int | None
    scaling: float
    keep: bool
    int8: bool
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Needs:
    """Which gradients somebody asked for."""

    x: bool
    w: bool
    lora: bool


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _kept_shapes(spec: Spec, x: Array, ids: Array, lora: LoRA | None) -> list[Any]:
    slots = ids.shape[0] * ids.shape[1]
    assert spec.intermediate is not None
    parts = 2 if x.dtype == jnp.float32 else 1
    width = parts * _round_up(spec.intermediate, _TILE)
    shapes = [(slots, width), (slots, width)]
    if lora is not None:
        shapes.append((slots, 6 * _round_up(lora.gate_a.shape[1], _TILE)))
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def _attributes(spec: Spec, lora: LoRA | None) -> dict[str, Any]:
    return {
        # What dropout keeps is scaled by 1 / (1 - rate): everything of LoRA passes s.
        "scaling": np.float32(spec.scaling / (1 - spec.dropout)),
        "has_lora": lora is not None,
        "dropout": np.uint32(threshold(spec.dropout)),
        "int8": spec.int8,
    }


def _operands(spec: Spec, lora: LoRA | None, seed: Array | None) -> tuple[Array, ...]:
    if lora is None:
        return ()
    return (*lora.arrays(), seed) if threshold(spec.dropout) else lora.arrays()


@functools.cache
def forward(spec: Spec) -> Callable[..., tuple[Array, tuple[Array, ...]]]:
    """`f(x [tokens, hidden], ids, w, handle, lora, seed) -> (y, kept values)`."""

    @jax.custom_batching.custom_vmap
    def call(x, ids, w, handle, lora, seed):
        kept = _kept_shapes(spec, x, ids, lora) if spec.keep else []
        run = host_call(
            "ktjax_moe_forward",
            [jax.ShapeDtypeStruct(x.shape, x.dtype), *kept],
            keep=spec.keep,
            **_attributes(spec, lora),
        )
        y, *kept = run(x, ids, w, handle, *_operands(spec, lora, seed))
        return y, tuple(kept)

    @call.def_vmap
    def batched(axis_size, in_batched, x, ids, w, handle, lora, seed):
        args = (x, ids, w, handle, lora, seed)
        if not _folds(spec, in_batched[3:]):
            out = one_by_one(call, in_batched, args)
        else:
            # Kept values have a row per slot, so a batch of tokens is just more tokens.
            rows = fold(axis_size, in_batched[:3], args[:3])
            out = unfold(axis_size, call(*rows, handle, lora, seed))
        return out, jax.tree.map(lambda _: True, out)

    return call


def _folds(spec: Spec, in_batched: Any) -> bool:
    """Whether a batch is just more tokens.

    That is where all else is the same for every element, as `in_batched` says of it,
    and where slots may be numbered anew, which dropout does not allow.
    """
    return not any(jax.tree.leaves(in_batched)) and not threshold(spec.dropout)


@functools.cache
def backward(spec: Spec, needs: Needs) -> Callable[..., tuple[Any, Any, Any]]:
    """`f(x, ids, w, handle, gy, lora, seed, kept) -> (grad x, grad w, grad LoRA)`.

    Gradients that nobody needs are None.
    """

    @jax.custom_batching.custom_vmap
    def call(x, ids, w, handle, gy, lora, seed, kept):
        results = []
        if needs.x:
            results.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        if needs.w:
            results.append(jax.ShapeDtypeStruct(w.shape, w.dtype))
        if needs.lora:
            results += [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in lora.arrays()]
        run = host_call(
            "ktjax_moe_backward",
            results,
            kept=bool(kept),
            need_x=needs.x,
            need_w=needs.w,
            need_lora=needs.lora,
            **_attributes(spec, lora),
        )
        out = run(x, ids, w, handle, gy, *_operands(spec, lora, seed), *kept)
        grad_x = out.pop(0) if needs.x else None
        grad_w = out.pop(0) if needs.w else None
        return grad_x, grad_w, LoRA(*out) if needs.lora else None

    @call.def_vmap
    def batched(axis_size, in_batched, x, ids, w, handle, gy, lora, seed, kept):
        args = (x, ids, w, handle, gy, lora, seed, kept)
        shared = (in_batched[3], *in_batched[5:7])
        if needs.lora or not _folds(spec, shared):
            # Every element of the batch has a LoRA gradient of its own.
            out = one_by_one(call, in_batched, args)
        else:
            tokens = fold(
                axis_size,
                [*in_batched[:3], in_batched[4], in_batched[7]],
                [x, ids, w, gy, kept],
            )
            x, ids, w, gy, kept = tokens
            out = unfold(axis_size, call(x, ids, w, handle, gy, lora, seed, kept))
        return out, jax.tree.map(lambda _: True, out)

    return call


def fold(axis_size: int, in_batched: Any, args: Any) -> Any:
    """`[batch, rows, ...]` to `[batch * rows, ...]`, repeating what is not batched."""

    def fold(is_batched: bool, value: Array) -> Array:
        if not is_batched:
            value = jnp.broadcast_to(value, (axis_size, *value.shape))
        return value.reshape(axis_size * value.shape[1], *value.shape[2:])

    return jax.tree.map(fold, list(in_batched), list(args))


def unfold(axis_size: int, out: Any) -> Any:
    """The reverse of `fold`, for every array of a tree."""
    return jax.tree.map(
        lambda v: v.reshape(axis_size, v.shape[0] // axis_size, *v.shape[1:]), out
    )


def one_by_one(call: Callable[..., Any], in_batched: Any, args: Any) -> Any:
    """`call(*args)` for one element of the batch after the other."""
    leaves, tree = jax.tree.flatten(args)
    flags = jax.tree.leaves(in_batched)
    batched = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]

    def one(values: list[Array]) -> Any:
        remaining = iter(values)
        full = [
            next(remaining) if flag else leaf
            for leaf, flag in zip(leaves, flags, strict=True)
        ]
        return call(*jax.tree.unflatten(tree, full))

    return jax.lax.map(one, batched)
