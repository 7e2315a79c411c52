"""Calls of the native library's FFI targets in programs for any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.lax import platform_dependent

from ktjax import backend  # noqa: F401  (registers the targets)

Array = Any


def host_call(
    target: str, results: Sequence[jax.ShapeDtypeStruct], **attributes: Any
) -> Callable[..., list[Array]]:
    """`jax.ffi.ffi_call` of a target that exists on the CPU alone.

    In a program for the CPU it is just that. In one for an accelerator the operands are
    copied to the host and the results back, by a callback (`jax.pure_callback`).

    Args:
      target: its name.
      results: shapes and dtypes.
      attributes: of the target.

    Returns:
      `f(*operands) -> list of results`.
    """
    shapes = tuple(results)
    fixed = tuple(sorted(attributes.items()))

    def call(*operands: Array) -> list[Array]:
        return platform_dependent(
            *operands,
            cpu=functools.partial(_direct, target, shapes, fixed),
            default=functools.partial(through_callback, target, shapes, fixed),
        )

    return call


def _direct(
    target: str,
    results: tuple[jax.ShapeDtypeStruct, ...],
    attributes: tuple[tuple[str, Any], ...],
    *operands: Array,
) -> list[Array]:
    return list(jax.ffi.ffi_call(target, results)(*operands, **dict(attributes)))


_compiled = jax.jit(_direct, static_argnums=(0, 1, 2))


def through_callback(
    target: str,
    results: tuple[jax.ShapeDtypeStruct, ...],
    attributes: tuple[tuple[str, Any], ...],
    *operands: Array,
) -> list[Array]:
    """The same as a callback, which runs a program for the CPU."""

    def on_host(*values: Array) -> list[Array]:
        (cpu, *_) = jax.local_devices(backend="cpu")
        return _compiled(target, results, attributes, *jax.device_put(values, cpu))

    return jax.pure_callback(on_host, list(results), *operands)
