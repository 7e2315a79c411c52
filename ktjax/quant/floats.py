"""Small floating-point codes, and the flush of denormals that the kernels have."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

_TINY = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """`x` with magnitudes below 2^-126 replaced by zeros of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def round_bfloat16(x: Array) -> Array:
    """float32 rounded to the nearest bfloat16, ties to even, as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> Array:
    """The non-negative numbers of a small float in the order of their codes."""
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    normal = (1 + fraction) * 2.0 ** (exponent - bias)
    denormal = fraction * 2.0 ** (1 - bias)
    return np.where(exponent == 0, denormal, normal).astype(np.float32)


# E4M3 without infinities (OCP 8-bit floating point, "e4m3fn"): its last code is NaN.
_E4M3 = _magnitudes(4, 3, bias=7)[:-1]
# E2M1 (OCP microscaling formats): 0, .5, 1, 1.5, 2, 3, 4, 6.
_E2M1 = _magnitudes(2, 1, bias=1)

E4M3_NAN = 0x7F
# The value of every code.
E4M3_VALUES = np.concatenate([_E4M3, [np.nan], -_E4M3, [-np.nan]]).astype(np.float32)
E2M1_VALUES = np.concatenate([_E2M1, -_E2M1])


def _nearest(x: Array, magnitudes: Array, sign_bit: int) -> Array:
    """The codes of the nearest numbers, ties to even, saturating at the largest.

    The last bit of a code is that of its mantissa, so the even code of two neighbours
    is the even number. Halfway points are exact in float32.
    """
    halfway = (magnitudes[:-1] + magnitudes[1:]) / 2
    size = np.abs(x)
    codes = np.searchsorted(halfway, size, side="left").astype(np.uint8)
    tie = size == np.append(halfway, np.float32(np.nan))[codes]
    codes += tie & (codes % 2 == 1)
    return codes | np.where(np.signbit(x), np.uint8(sign_bit), np.uint8(0))


def to_e4m3(x: Array) -> Array:
    """The e4m3fn codes nearest to finite float32 `x`, uint8, saturating at 448."""
    return _nearest(x, _E4M3, 0x80)


def to_e2m1(x: Array) -> Array:
    """The E2M1 codes nearest to finite float32 `x`, uint8 0 to 15, saturating at 6."""
    return _nearest(x, _E2M1, 0x8)
