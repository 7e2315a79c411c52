"""Encoding and decoding of every format in NumPy: the oracle of the native library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from ktjax.quant import integers
from ktjax.quant.blocks import dequantize_blocks
from ktjax.quant.floats import (
    E2M1_VALUES,
    E4M3_VALUES,
    flush,
    round_bfloat16,
    to_e2m1,
    to_e4m3,
)
from ktjax.quant.formats import BLOCK, Encoding, Quantized

Array = np.ndarray[Any, Any]

# Weights of one step: bounds the float32 temporaries to a few times 4 MiB.
_CHUNK = 1 << 20


def encode(
    w: Any, format: str, *, group_size: int | None = None, zero_point: bool = False
) -> Quantized:
    """Quantise weights, with the bits that the native encoder gives.

    Args:
      w: `[..., outputs, depth]`, float32 or bfloat16. Magnitudes below 2^-126 count as
        zero.
      format: a name in `FORMATS`.
      group_size: for int4_kgroup: 32, 64 or 128, which must divide the depth; None =
        128.
      zero_point: for int4_kgroup: zero points, as AWQ, instead of symmetric codes.

    Returns:
      The plain arrays of the format (see `Quantized`). For "bf16" the scales are None.

    Raises:
      ValueError: an unknown format or option, a format of GGUF, a depth that groups do
        not divide, NaN or Inf in w, or a range of weights that float32 cannot hold.
      TypeError: another dtype.
    """
    encoding = Encoding.of(format, group_size, zero_point, where="encode")
    encoding.check_encoded(where="encode")
    w = np.asarray(w)
    if w.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(f"encode: w: expected float32 or bfloat16, got {w.dtype}")
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(
            f"encode: w: expected [..., outputs, depth] with sizes > 0, got {w.shape}"
        )
    *lead, outputs, depth = w.shape
    encoding.check_depth(depth, where="encode: w: depth")
    if format == "bf16":
        return Quantized(w.astype(ml_dtypes.bfloat16), None)
    matrices = w.reshape(-1, outputs, depth)
    arrays = {
        name: np.empty((len(matrices), *shape), dtype)
        for name, (shape, dtype) in encoding.shapes(outputs, depth).items()
    }
    for matrix, rows, scale_rows in _chunks(encoding, len(matrices), outputs, depth):
        block = matrices[matrix, rows].astype(np.float32)
        _check_finite(block, matrix, rows.start)
        codes, scales, zeros = _encode_block(flush(block), encoding)
        if not np.isfinite(scales.astype(np.float32)).all():
            raise ValueError(
                f"encode: w: matrix {matrix} has a range that float32 cannot hold; "
                "scale the weights down"
            )
        values = arrays["values"]
        values[matrix, rows] = _pack(codes, encoding).view(values.dtype)
        arrays["scales"][matrix, scale_rows] = scales
        if zeros is not None:
            arrays["zeros"][matrix, rows] = zeros
    return Quantized(
        **{name: a.reshape(*lead, *a.shape[1:]) for name, a in arrays.items()}
    )


def decode(q: Quantized, format: str, *, depth: int | None = None) -> Array:
    """The float32 values of quantised weights, each rounded through bfloat16.

    Args:
      q: plain arrays of the format, `[..., outputs, depth]`; not checked here.
      format: a name in `FORMATS`; of formats of GGUF see also `dequantize_blocks`.
      depth: the depth, where 4-bit values leave it open: an odd depth has half a byte
        of padding. None = all that the values hold.

    Returns:
      `[..., outputs, depth]` float32.
    """
    values = np.asarray(q.values)
    if format == "bf16":
        return values.astype(np.float32)
    spec = Encoding.of(format, where="decode").spec
    if spec.block_bytes:
        return round_bfloat16(dequantize_blocks(values, format))
    held = values.shape[-1] * (2 if spec.bits == 4 else 1)
    depth = held if depth is None else depth
    *lead, outputs, width = values.shape
    group = depth // np.shape(q.scales)[-1] if spec.group_sizes else spec.group
    encoding = Encoding(format, group, q.zeros is not None)
    values = values.reshape(-1, outputs, width)
    scale_shape = encoding.shapes(outputs, depth)["scales"][0]
    scales = np.asarray(q.scales).reshape(-1, *scale_shape)
    zeros = None if q.zeros is None else np.asarray(q.zeros).reshape(scales.shape)
    result = np.empty((len(values), outputs, depth), np.float32)
    for matrix, rows, scale_rows in _chunks(encoding, len(result), outputs, depth):
        codes = _code_values(values[matrix, rows], encoding)[:, :depth]
        if zeros is not None:
            codes = codes - np.repeat(zeros[matrix, rows].astype(np.float32), group, 1)
        elif spec.code == "int4":
            codes = codes - np.float32(8)
        shared = _scale_values(scales[matrix, scale_rows], encoding)
        with np.errstate(over="ignore"):
            product = codes * _spread(shared, encoding, *codes.shape)
        result[matrix, rows] = round_bfloat16(flush(product))
    return result.reshape(*lead, outputs, depth)


def _chunks(
    encoding: Encoding, matrices: int, outputs: int, depth: int
) -> Iterator[tuple[int, slice, slice]]:
    """(matrix, its rows, their rows of scales), whole blocks of 128 rows at a time."""
    step = BLOCK * max(1, _CHUNK // (BLOCK * depth))
    shared = encoding.spec.block_outputs
    for matrix in range(matrices):
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            yield matrix, slice(start, stop), slice(start // shared, -(-stop // shared))


def _check_finite(block: Array, matrix: int, first_row: int) -> None:
    good = np.isfinite(block).all(axis=1)
    if not good.all():
        raise ValueError(
            f"encode: w: matrix {matrix}, row {first_row + int(np.argmin(good))} has "
            "NaN or Inf; only finite weights can be quantised"
        )


def _encode_block(w: Array, encoding: Encoding) -> tuple[Array, Array, Array | None]:
    """Codes `[rows, depth]`, and scales and zeros in their plain shapes and dtypes."""
    rows, depth = w.shape
    group = encoding.group_size
    if encoding.format == "fp8_block":
        return *_encode_fp8_blocks(w), None
    pieces = w.reshape(-1, group) if group else w
    zeros = None
    match encoding.format:
        case "int8":
            codes, scales = integers.int8_rows(pieces)
        case "int4" | "int4_kgroup" if not encoding.zero_point:
            codes, scales = integers.int4_rows(pieces)
        case "int4_kgroup":
            codes, scales, zeros = integers.int4_zero_rows(pieces)
        case "rawint4":
            codes, scales = integers.rawint4_rows(pieces)
        case "fp8_channel":
            scales = flush(np.abs(pieces).max(axis=1) / np.float32(448))
            codes = _e4m3_rows(pieces, scales)
        case "mxfp4":
            codes, scales = _encode_mx(pieces, to_e2m1, E2M1_VALUES)
        case _:
            assert encoding.format == "mxfp8"
            codes, scales = _encode_mx(pieces, to_e4m3, E4M3_VALUES)
    if group:
        scales = scales.reshape(rows, -1)
        zeros = None if zeros is None else zeros.reshape(rows, -1)
    return codes.reshape(rows, depth), scales, zeros


def _encode_fp8_blocks(w: Array) -> tuple[Array, Array]:
    rows, depth = w.shape
    starts = np.arange(0, rows, BLOCK), np.arange(0, depth, BLOCK)
    amax = np.maximum.reduceat(np.abs(w), starts[0], axis=0)
    amax = np.maximum.reduceat(amax, starts[1], axis=1)
    scales = flush(amax / np.float32(448))
    wide = np.repeat(np.repeat(scales, BLOCK, 0)[:rows], BLOCK, 1)[:, :depth]
    quotient = np.divide(w, wide, out=np.zeros_like(w), where=wide != 0)
    return to_e4m3(quotient), scales


def _e4m3_rows(w: Array, scales: Array) -> Array:
    return to_e4m3(integers.divide(w, scales))


def _encode_mx(
    w: Array, to_codes: Callable[[Array], Array], numbers: Array
) -> tuple[Array, Array]:
    """Powers of two that bring amax to the binade of the codes' largest number."""
    amax = np.abs(w).max(axis=1)
    # frexp has mantissas in [1/2, 1): floor(log2 x) is its exponent - 1.
    largest = np.frexp(np.nanmax(numbers))[1]
    exponent = np.clip(np.frexp(amax)[1] - largest, -126, 127)
    exponent = np.where(amax == 0, 0, exponent)
    scales = np.ldexp(np.float32(1), exponent)
    codes = np.where(amax[:, None] == 0, 0, to_codes(w / scales[:, None]))
    return codes.astype(np.uint8), (exponent + 127).astype(np.uint8)


def _pack(codes: Array, encoding: Encoding) -> Array:
    """Codes `[rows, depth]` as the bytes of the plain values."""
    if encoding.spec.bits == 8:
        return codes
    if codes.dtype == np.int8:
        codes = (codes + 8).astype(np.uint8)
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)), constant_values=8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _code_values(values: Array, encoding: Encoding) -> Array:
    """The float32 numbers that codes stand for; int4 is unsigned still."""
    spec = encoding.spec
    if spec.code == "int8":
        return values.astype(np.float32)
    codes = values.view(np.uint8)
    if spec.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    if spec.code == "e4m3":
        return E4M3_VALUES[codes]
    return E2M1_VALUES[codes] if spec.code == "e2m1" else codes.astype(np.float32)


def _scale_values(scales: Array, encoding: Encoding) -> Array:
    if encoding.spec.scale == "e8m0":
        exponent = scales.view(np.uint8).astype(np.int32) - 127
        return flush(np.ldexp(np.float32(1), exponent))
    return flush(scales.astype(np.float32))


def _spread(scales: Array, encoding: Encoding, rows: int, depth: int) -> Array:
    """A scale for every weight, by broadcasting or repetition."""
    if not encoding.group_size:
        return scales[:, None]
    if encoding.spec.block_outputs > 1:
        scales = np.repeat(scales, encoding.spec.block_outputs, axis=0)[:rows]
    return np.repeat(scales, encoding.group_size, axis=1)[:, :depth]
