"""A layer that keeps its inputs only, and is computed again in the backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Array = Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Needs:
    """Which leaves of the arguments somebody wants a gradient of."""

    flags: tuple[bool, ...]


def recomputed(module: nnx.Module) -> Callable[..., Any]:
    """`module(x, *args)` with no residuals but its own arrays and its arguments.

    What `jax.checkpoint` does, in a form that XLA:CPU does not undo. There,
    `jax.checkpoint` saves next to nothing: the barriers that keep the second
    computation apart from the first are gone before common subexpressions are merged.
    Here the second one is in a loop that XLA cannot see through.

    Only arrays that somebody differentiates by get a gradient, so frozen weights cost
    nothing.

    Args:
      module: called as `module(x, *args)`, with x a float array; the other arguments
        and the results are pytrees of arrays. Of its state only the counts of random
        streams may change in the call, as with dropout: both computations start from
        the same, so they draw the same.
    """
    graph, state = nnx.split(module)

    def call(x: Array, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten((state, args))

        def apply(x: Array, *leaves: Array) -> tuple[Any, nnx.State]:
            state, args = jax.tree.unflatten(structure, leaves)
            copy = nnx.merge(graph, state, copy=True)
            return copy(x, *args), nnx.state(copy, nnx.RngCount)

        out, counts = _recomputed(apply, x, *leaves)
        nnx.update(module, counts)
        return out

    return call


def _recomputed(apply: Callable[..., tuple[Any, Any]], *leaves: Array) -> Any:
    """`apply(*leaves)`: results, and integers that have no gradient."""
    run = jax.custom_vjp(apply)

    def forward(*leaves: Any) -> tuple[Any, tuple[_Needs, list[Array]]]:
        values = [leaf.value for leaf in leaves]
        needs = _Needs(tuple(bool(leaf.perturbed) for leaf in leaves))
        return apply(*values), (needs, values)

    def backward(residuals: tuple[_Needs, list[Array]], grads: Any) -> tuple[Any, ...]:
        needs, (x, *rest) = residuals
        cotangent = jax.tree.map(_instantiate, grads[0], is_leaf=_is_symbolic)

        def compute(round: Array, _: Any) -> tuple[Array, ...]:
            # What does not change from round to round, XLA would take out of the loop.
            values = [jnp.where(round < 0, 0, x), *rest]
            return _pull_back(apply, values, needs, cotangent)

        wanted = [v for v, flag in zip((x, *rest), needs.flags, strict=True) if flag]
        nothing = tuple(map(jnp.zeros_like, wanted))
        rounds = _one(cotangent)
        computed = iter(jax.lax.fori_loop(0, rounds, compute, nothing))
        return tuple(next(computed) if flag else None for flag in needs.flags)

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(*leaves)


def _pull_back(
    apply: Callable[..., tuple[Any, Any]],
    values: list[Array],
    needs: _Needs,
    cotangent: Any,
) -> tuple[Array, ...]:
    """The gradients of the values that are needed."""

    def partial(*wanted: Array) -> Any:
        given = iter(wanted)
        pairs = zip(values, needs.flags, strict=True)
        return apply(*(next(given) if flag else value for value, flag in pairs))[0]

    wanted = [v for v, flag in zip(values, needs.flags, strict=True) if flag]
    return jax.vjp(partial, *wanted)[1](cotangent)


def _one(tree: Any) -> Array:
    """How often to compute: 1, which XLA cannot know; a second time changes nothing."""
    first = jax.tree.leaves(tree)[0].ravel()[0]
    return jnp.where(first < jnp.finfo(first.dtype).min, 2, 1).astype(jnp.int32)


def _is_symbolic(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiate(leaf: Any) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_symbolic(leaf) else leaf
