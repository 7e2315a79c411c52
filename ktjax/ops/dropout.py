"""Dropout of the adapters' inputs: which values are kept, as a function of their place.

The mask is a pure function of a seed and of where a value is, in integers only, so it
is never stored: the forward, a recomputation, the backward, every instruction set and
`ktjax.reference` see the same. `ffi/gemm/dropout_impl.h` is this function in C++.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ktjax.lora import LoRA

Array = Any

# Which input: x, which the adapters of gate and up share, or h, that of down's.
INPUTS = ("x", "h")

_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio
_FIRST = np.uint32(0x21F0AAAD)
_SECOND = np.uint32(0x735A2D97)


def threshold(rate: float) -> int:
    """The hash from which on a value is kept: `rate` of 2^32, for a rate in [0, 1)."""
    return min(round(rate * 2**32), 2**32 - 1)


def check_rate(rate: float, *, where: str) -> None:
    """Hold a rate against its limits; `where` is what it is the rate of.

    Raises:
      ValueError: `rate` is not in [0, 1).
    """
    if not 0 <= rate < 1:  # NaN fails too
        raise ValueError(
            f"{where}: expected a rate of at least 0 and below 1, got {rate}"
        )


def check_dropout(
    rate: float, seed: Array | None, lora: LoRA | None, *, where: str
) -> Array | None:
    """The two words of the seed, `uint32[2]`; None when nothing is dropped.

    Args:
      rate: the share that is dropped.
      seed: `uint32[2]`, or a PRNG key of any kind (`jax.random.key`).
      lora: the adapters whose inputs they are.
      where: the operation, for errors.

    Raises:
      ValueError: the rate is not in [0, 1), or above 0 without a seed or adapters.
      TypeError: a seed of another dtype or shape.
    """
    check_rate(rate, where=f"{where}: dropout")
    if rate == 0:
        return None
    if lora is None:
        raise ValueError(
            f"{where}: dropout: expected adapters, whose input it drops, with a rate "
            f"above 0, got lora=None and a rate of {rate}"
        )
    if seed is None:
        raise ValueError(
            f"{where}: dropout_seed: expected uint32[2] or a PRNG key with a rate "
            f"above 0, got None and a rate of {rate}; pass a new one for each call"
        )
    seed = jnp.asarray(seed)
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) and seed.shape == ():
        return jax.random.bits(seed, (2,), jnp.uint32)
    if seed.dtype != jnp.uint32 or seed.shape != (2,):
        raise TypeError(
            f"{where}: dropout_seed: expected uint32[2] or a PRNG key, got "
            f"{seed.dtype}{list(seed.shape)}"
        )
    return seed


def keep(
    seed: Array, slots: int | Array, columns: int, of: Literal["x", "h"], rate: float
) -> Array:
    """Which values of an input are kept.

    Args:
      seed: `uint32[2]`.
      slots: how many rows, or the numbers of those that are asked for, `[slots]`
        integers; slot t * k + j is token t's expert number j.
      columns: width of the input.
      of: which input.
      rate: the share that is dropped.

    Returns:
      `[slots, columns]` bool.
    """
    numbers = jnp.arange(slots) if isinstance(slots, int) else slots
    slot = numbers.astype(jnp.uint32)[:, None]
    column = jnp.arange(columns, dtype=jnp.uint32)
    middle = _mix(_mix(2 * slot + np.uint32(INPUTS.index(of)) + _GOLDEN) ^ seed[1])
    start = _mix(middle ^ seed[0])
    return _mix(start + column * _GOLDEN, middle) >= np.uint32(threshold(rate))


def _mix(z: Array, middle: Array | int = 0) -> Array:
    """A bijection of 32 bits in which every bit depends on every other, and a key."""
    z = (z ^ (z >> 16)) * _FIRST
    z = (z ^ (z >> 15) ^ jnp.uint32(middle)) * _SECOND
    return z ^ (z >> 15)
