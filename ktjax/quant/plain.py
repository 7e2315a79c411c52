"""Arrays that somebody else quantised: checked, and brought to one dtype each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from ktjax.quant.floats import E4M3_NAN
from ktjax.quant.formats import Encoding, Quantized

Array = np.ndarray[Any, Any]

# dtypes that hold the same bits as the plain one, by the plain one's name.
_SAME_BITS: dict[str, tuple[Any, ...]] = {
    "float8_e4m3fn": (np.uint8,),
    "uint8": (ml_dtypes.float8_e8m0fnu,),
}
# Elements of one step of a check: bounds its temporaries.
_CHUNK = 1 << 22


def group_of(q: Quantized, depth: int) -> int | None:
    """Depths that share a scale, by the arrays' shapes; None if they do not say."""
    shape = np.shape(q.scales)
    if len(shape) != 3 or shape[-1] == 0 or depth % shape[-1]:
        return None
    return depth // shape[-1]


def check_quantized(
    q: Quantized, encoding: Encoding, outputs: int, depth: int, *, where: str
) -> Quantized:
    """The plain arrays of `encoding`, as NumPy arrays of exactly their dtypes.

    Views where the bits allow it: float8 given as uint8, E8M0 given as float8_e8m0fnu,
    4-bit values given as int32.

    Args:
      q: values `[experts, ...]`, scales and zeros of one matrix of every expert.
      encoding: what they must be.
      outputs: outputs of the matrix.
      depth: its depth.
      where: the operation and the matrix; begins the errors.

    Raises:
      ValueError: a wrong shape; zeros missing or not expected; scales that are NaN,
        infinite or negative; NaN among the codes; zeros above 15.
      TypeError: a wrong dtype.
    """
    given = {name: a for name, a in q._asdict().items() if a is not None}
    plain = encoding.shapes(outputs, depth)
    if given.keys() != plain.keys():
        raise ValueError(
            f"{where}: format {encoding.format!r} "
            f"{'with' if encoding.zero_point else 'without'} zero points: expected "
            f"arrays {list(plain)}, got {list(given)}"
        )
    experts = np.shape(q.values)[0] if np.ndim(q.values) else 0
    arrays = {
        name: _check_array(
            np.asarray(given[name]),
            (experts, *shape),
            dtype,
            packed=name == "values" and encoding.spec.bits == 4,
            where=f"{where}: {name}",
        )
        for name, (shape, dtype) in plain.items()
    }
    _check_contents(arrays, encoding, where)
    return Quantized(**arrays)


def _check_array(
    array: Array, shape: tuple[int, ...], dtype: Any, *, packed: bool, where: str
) -> Array:
    if packed and array.dtype == np.int32 and array.ndim:
        array = np.ascontiguousarray(array).view(np.uint8)
    if array.dtype in _SAME_BITS.get(dtype.name, ()):
        array = array.view(dtype)
    if array.dtype != dtype:
        raise TypeError(f"{where}: expected {dtype}, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{where}: expected shape {shape}, got {array.shape}")
    return array


def _check_contents(arrays: dict[str, Array], encoding: Encoding, where: str) -> None:
    spec = encoding.spec
    if spec.block_bytes:
        return  # the native library looks at scales as it unpacks the blocks
    for expert, scales in _pieces(arrays["scales"]):
        if spec.scale == "e8m0":
            bad = scales == 0xFF  # NaN; E8M0 has neither signs nor infinities
        else:
            numbers = scales.astype(np.float32, copy=False)
            bad = ~np.isfinite(numbers) | (numbers < 0)
        if bad.any():
            raise ValueError(
                f"{where}: scales: expected finite numbers >= 0, got "
                f"{_first(scales, bad)} for expert {expert}"
            )
    if spec.code == "e4m3":
        for expert, values in _pieces(arrays["values"]):
            if ((values.view(np.uint8) & E4M3_NAN) == E4M3_NAN).any():
                raise ValueError(
                    f"{where}: values: expected numbers, got NaN for expert {expert}"
                )
    for expert, zeros in _pieces(arrays.get("zeros", np.empty((0, 1, 1)))):
        if (zeros > 15).any():
            raise ValueError(
                f"{where}: zeros: expected 0 to 15, got {_first(zeros, zeros > 15)} "
                f"for expert {expert}"
            )


def _first(array: Array, chosen: Array) -> str:
    value = array[chosen][0]
    return "NaN (0xff)" if value.dtype == np.uint8 and value == 0xFF else str(value)


def _pieces(array: Array) -> Iterator[tuple[int, Array]]:
    """(expert, some of its rows), a bounded number of elements at a time."""
    for expert, matrix in enumerate(array):
        step = max(1, _CHUNK * len(matrix) // max(matrix.size, 1))
        for start in range(0, len(matrix), step):
            yield expert, matrix[start : start + step]
