"""The block formats of GGUF files in NumPy: the oracle of the native decoders.

A row of weights is a row of blocks of 32 or 256 weights, each with its codes and one or
two half-precision numbers, and in the K-quants with small sub-scales as well. The value
of a weight is, in float32,

    (code - zero) * (d * sub_scale) - dmin * sub_min

Only the subtraction of the minimum can round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ktjax.quant.formats import FORMATS

Array = np.ndarray[Any, Any]

# What the codes of IQ4_NL and IQ4_XS stand for.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    np.float32,
)
# Weights of one step: bounds the temporaries to a few times 4 MiB.
_CHUNK = 1 << 20

# The numbers that codes stand for `[blocks, weights]`; what each part of a block is
# multiplied with, and what is then subtracted from it or None, `[blocks, parts]`.
Parts = tuple[Array, Array, Array | None]


def dequantize_blocks(values: Any, format: str) -> Array:
    """The float32 values of GGUF blocks, as the gguf package has them, bit for bit.

    Those of a store are the same rounded once to bfloat16.

    Args:
      values: `[..., bytes of a row]` uint8, rows of whole blocks.
      format: a name in `ktjax.quant.FORMATS` of a format in blocks.

    Returns:
      `[..., weights of a row]` float32; NaN or Inf where a block's scale is.

    Raises:
      ValueError: another format, or rows that are no whole blocks.
      TypeError: another dtype.
    """
    if format not in _PARTS:
        raise ValueError(
            f"dequantize_blocks: format: expected one of {list(_PARTS)}, got {format!r}"
        )
    spec = FORMATS[format]
    values = np.asarray(values)
    if values.dtype != np.uint8:
        raise TypeError(f"dequantize_blocks: expected uint8, got {values.dtype}")
    if values.ndim == 0 or values.shape[-1] % spec.block_bytes:
        raise ValueError(
            f"dequantize_blocks: expected rows of whole {format} blocks of "
            f"{spec.block_bytes} bytes, got shape {values.shape}"
        )
    blocks = values.reshape(-1, spec.block_bytes)
    result = np.empty((len(blocks), spec.group), np.float32)
    step = _CHUNK // spec.group
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            chunk = np.ascontiguousarray(blocks[start : start + step])
            numbers, scales, mins = _PARTS[format](chunk)
            parts = numbers.reshape(*scales.shape, -1) * scales[..., None]
            if mins is not None:
                parts -= mins[..., None]
            result[start : start + step] = parts.reshape(-1, spec.group)
    width = values.shape[-1] // spec.block_bytes * spec.group
    return result.reshape(*values.shape[:-1], width)


def _half(blocks: Array, at: int) -> Array:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(data: Array, width: int) -> Array:
    """`width` bytes at a time: the low nibbles, then the high ones."""
    pieces = data.reshape(len(data), -1, width)
    return np.concatenate([pieces & 15, pieces >> 4], axis=2).reshape(len(data), -1)


def _crumbs(data: Array) -> Array:
    """32 bytes at a time: four layers of 2 bits."""
    layers = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    pieces = data.reshape(len(data), -1, 1, 32)
    return (pieces >> layers & 3).reshape(len(data), -1)


def _bits(data: Array) -> Array:
    """32 bytes in eight layers of a bit."""
    layers = np.arange(8, dtype=np.uint8)[:, None]
    return (data[:, None, :] >> layers & 1).reshape(len(data), -1)


def _signed(codes: Array, zero: int) -> Array:
    return codes.astype(np.float32) - np.float32(zero)


def _q4_0(b: Array) -> Parts:
    return _signed(_nibbles(b[:, 2:], 16), 8), _half(b, 0), None


def _q4_1(b: Array) -> Parts:
    return _signed(_nibbles(b[:, 4:], 16), 0), _half(b, 0), -_half(b, 2)


def _fifth_bits(data: Array) -> Array:
    return np.unpackbits(data, axis=1, bitorder="little") << 4


def _q5_0(b: Array) -> Parts:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])
    return _signed(codes, 16), _half(b, 0), None


def _q5_1(b: Array) -> Parts:
    codes = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return _signed(codes, 0), _half(b, 0), -_half(b, 2)


def _q8_0(b: Array) -> Parts:
    return b[:, 2:].view(np.int8).astype(np.float32), _half(b, 0), None


def _q2_k(b: Array) -> Parts:
    codes, packed = _crumbs(b[:, 16:80]), b[:, :16]
    scales = _half(b, 80) * _signed(packed & 15, 0)
    return _signed(codes, 0), scales, _half(b, 82) * _signed(packed >> 4, 0)


def _q3_k(b: Array) -> Parts:
    codes = _crumbs(b[:, 32:96]) | _bits(b[:, :32]) << 2
    low = _nibbles(b[:, 96:104], 8)
    layers = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = (b[:, None, 104:108] >> layers & 3).reshape(len(b), 16)
    return _signed(codes, 4), _half(b, 108) * _signed(low | high << 4, 32), None


def _scales_and_mins(b: Array) -> tuple[Array, Array]:
    """Eight 6-bit scales and minima of Q4_K and Q5_K, times their halves."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.hstack([first & 63, (third & 15) | first >> 6 << 4])
    mins = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    return _half(b, 0) * _signed(scales, 0), _half(b, 2) * _signed(mins, 0)


def _q4_k(b: Array) -> Parts:
    return _signed(_nibbles(b[:, 16:], 32), 0), *_scales_and_mins(b)


def _q5_k(b: Array) -> Parts:
    codes = _nibbles(b[:, 48:], 32) | _bits(b[:, 16:48]) << 4
    return _signed(codes, 0), *_scales_and_mins(b)


def _q6_k(b: Array) -> Parts:
    codes = _nibbles(b[:, :128], 64) | _crumbs(b[:, 128:192]) << 4
    sub_scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return _signed(codes, 32), _half(b, 208) * sub_scales, None


def _iq4_nl(b: Array) -> Parts:
    return _IQ4[_nibbles(b[:, 2:], 16)], _half(b, 0), None


def _iq4_xs(b: Array) -> Parts:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(len(b), 8)
    word = np.ascontiguousarray(b[:, 2:4]).view("<u2")
    high = (word >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = _half(b, 0) * _signed(low | high << 4, 32)
    return _IQ4[_nibbles(b[:, 8:], 16)], scales, None


_PARTS: dict[str, Callable[[Array], Parts]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
