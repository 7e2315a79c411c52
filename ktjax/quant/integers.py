"""Integer codes of rows of weights, each row with a scale of its own.

Rows are float32 `[rows, depth]`, finite and without denormals. Every operation is
rounded to float32 by itself: the native encoder gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ktjax.quant.floats import flush, round_bfloat16

Array = np.ndarray[Any, Any]

# Lanes in which errors are summed, and the clips that are tried: amax * (32 - i) / 32.
_LANES = 16
_CLIPS = 20


def divide(w: Array, scales: Array) -> Array:
    """w / scale row by row; 0 where the scale is 0."""
    column = scales[:, None]
    return np.divide(w, column, out=np.zeros_like(w), where=column != 0)


def _round(w: Array, scales: Array, least: int, most: int) -> Array:
    return np.clip(np.rint(divide(w, scales)), least, most)


def int8_rows(w: Array) -> tuple[Array, Array]:
    """Symmetric: codes -127 to 127, scale = amax / 127."""
    scales = flush(np.abs(w).max(axis=1) / np.float32(127))
    return _round(w, scales, -127, 127).astype(np.int8), scales


def int4_rows(w: Array) -> tuple[Array, Array]:
    """Symmetric with the clip of least squared error: codes -7 to 7.

    The clips tried are amax * (32 - i) / 32, i < 20; of equal errors the widest wins.
    """
    widest = flush(np.abs(w).max(axis=1) / np.float32(7))
    best_error = np.full(len(w), np.inf, np.float32)
    best_scales, best_codes = widest, _round(w, widest, -7, 7)
    for i in range(_CLIPS):
        scales = flush(widest * np.float32((32 - i) / 32))
        codes = _round(w, scales, -7, 7)
        error = _squared_error(w, codes, scales)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scales = np.where(better, scales, best_scales)
        best_codes = np.where(better[:, None], codes, best_codes)
    return best_codes.astype(np.int8), best_scales


def _squared_error(w: Array, codes: Array, scales: Array) -> Array:
    """Sum of (w - code * scale)^2 in float32: 16 lanes first, then over the lanes.

    `accumulate` adds strictly one after another, which `sum` does not promise.
    """
    with np.errstate(over="ignore"):
        difference = flush(w - codes * scales[:, None])
        squares = flush(difference * difference)
        rows, depth = squares.shape
        steps = -(-depth // _LANES)
        squares = np.pad(squares, ((0, 0), (0, steps * _LANES - depth)))
        lanes = squares.reshape(rows, steps, _LANES)
        totals = np.add.accumulate(lanes, axis=1, dtype=np.float32)[:, -1]
        return np.add.accumulate(totals, axis=1, dtype=np.float32)[:, -1]


def int4_zero_rows(w: Array) -> tuple[Array, Array, Array]:
    """With zero points, as AWQ: codes and zeros 0 to 15, scale = range / 15."""
    zero = np.float32(0)
    low, high = np.minimum(w.min(axis=1), zero), np.maximum(w.max(axis=1), zero)
    with np.errstate(over="ignore"):
        scales = flush((high - low) / np.float32(15))
    zeros = _round(-low[:, None], scales, 0, 15)
    codes = np.clip(np.rint(divide(w, scales)) + zeros, 0, 15)
    return codes.astype(np.uint8), scales, zeros[:, 0].astype(np.uint8)


def rawint4_rows(w: Array) -> tuple[Array, Array]:
    """Symmetric with a bfloat16 scale: codes -8 to 7, scale = bfloat16(amax / 7)."""
    scales = round_bfloat16(flush(np.abs(w).max(axis=1) / np.float32(7)))
    return _round(w, scales, -8, 7).astype(np.int8), scales
