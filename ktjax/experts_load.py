"""From the experts of a checkpoint to a store, in the format that was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from ktjax import _native, backend
from ktjax.io.experts import ExpertWeights
from ktjax.quant.formats import FORMATS, Encoding, Quantized
from ktjax.quant.plain import check_quantized, group_of
from ktjax.store import ExpertStore


def encoding_of(
    gate: np.ndarray | Quantized,
    formats: Sequence[str],
    group_size: int | None = None,
    zero_point: bool = False,
    *,
    depth: int,
    where: str,
) -> Encoding:
    """Which of `formats` given arrays are in, by shape and dtype of their scales.

    "bf16" for weights that are not quantised. The arrays are checked by the store.

    Args:
      gate: the arrays of one matrix, `[experts, outputs, depth]`.
      formats: formats that they may have.
      group_size: the group size asked for; None = what the arrays have.
      zero_point: whether zero points are asked for.
      depth: depth of the matrix.
      where: the operation that asks; begins the errors.

    Raises:
      ValueError: an option that the format does not have.
    """
    if not isinstance(gate, Quantized):
        return Encoding.of("bf16")
    if any(FORMATS[name].block_bytes for name in formats):
        raise ValueError(
            f"{where}: blocks of GGUF do not say which format they have: load them "
            "from their file, or make a store with ktjax.ExpertStore.from_arrays"
        )
    format = formats[0]
    if np.ndim(gate.scales) == 2:  # a scale for every row
        by_row = (name for name in formats if not _has_groups(name))
        format = next(by_row, format)
    elif "int4_kgroup" in formats and np.asarray(gate.scales).dtype == np.float32:
        format = "int4_kgroup"
    if FORMATS[format].group_sizes and group_size is None:
        group_size = group_of(gate, depth)
    zero_point = zero_point or gate.zeros is not None
    return Encoding.of(format, group_size, zero_point, where=where)


def check_sizes(
    weights: ExpertWeights, experts: int, hidden: int, intermediate: int, *, where: str
) -> None:
    """Whether a layer's weights have these sizes.

    Of codes only experts and outputs: their last dimension is not the depth. The store
    checks the rest.

    Raises:
      ValueError: a matrix has others; names it, after `where`.
    """
    for name, outputs, depth in (
        ("gate", intermediate, hidden),
        ("up", intermediate, hidden),
        ("down", hidden, intermediate),
    ):
        matrix = getattr(weights, name)
        expected: tuple[int, ...] = (experts, outputs, depth)
        got = np.shape(matrix.values if isinstance(matrix, Quantized) else matrix)
        if isinstance(matrix, Quantized):
            expected, got = expected[:2], got[:2]
        if got != expected:
            raise ValueError(
                f"load_weights: {name} of {where} must have shape {expected}, got {got}"
            )


def choose_encoding(
    stored: Encoding,
    formats: Sequence[str],
    group_size: int | None = None,
    zero_point: bool = False,
    *,
    where: str,
) -> Encoding:
    """The first of `formats` that takes stored weights as they are, else the first.

    Args:
      stored: how the weights are stored.
      formats: acceptable formats, the preferred one first.
      group_size: what a format with groups must have; None = any, by preference what
        is stored.
      zero_point: whether groups must have zero points.
      where: the operation that asks; begins the errors.

    Raises:
      ValueError: an option that the preferred format does not have.
    """
    preferred = Encoding.of(formats[0], group_size, zero_point, where=where)
    for name in formats:
        # compressed-tensors' groups of 32 are also groups of int4_kgroup: float32 holds
        # their bfloat16 scales exactly.
        as_groups = stored.format == "rawint4" and name == "int4_kgroup"
        if (
            (name == stored.format or as_groups)
            and group_size in (None, stored.group_size)
            and zero_point in (False, stored.zero_point)
        ):
            return stored._replace(format=name)
    return preferred


def make_store(
    weights: ExpertWeights,
    formats: Sequence[str],
    group_size: int | None = None,
    zero_point: bool = False,
    *,
    pool: backend.Pool | None = None,
    where: str,
) -> ExpertStore:
    """A store of `weights` in the encoding that `choose_encoding` picks.

    Weights that are stored in it go in as they are. Others are quantised; those that
    are quantised already are first brought to their bfloat16 values, with a warning
    that two quantisations add their errors, unless the result is "bf16", which is
    exact.

    Args:
      weights: a layer's experts.
      formats: acceptable formats, the preferred one first.
      group_size: see `choose_encoding`.
      zero_point: see `choose_encoding`.
      pool: see `ExpertStore.from_arrays`.
      where: the operation that asks; begins errors and warnings.

    Raises:
      ValueError, TypeError, MemoryError: see `ExpertStore.from_arrays`.
    """
    (asked, up, down), arrays = _prepare(
        weights, formats, group_size, zero_point, where
    )
    return ExpertStore.from_arrays(
        *arrays,
        format=asked.format,
        group_size=asked.group_size or None,
        zero_point=asked.zero_point,
        up_format=up.format,
        down_format=down.format,
        pool=pool,
    )


def encode_experts(
    weights: ExpertWeights,
    formats: Sequence[str],
    group_size: int | None = None,
    zero_point: bool = False,
    *,
    where: str,
) -> ExpertWeights:
    """`weights` in the encoding that `make_store` would give them, as plain arrays.

    A store of the result has the values of a store of `weights`. Quantising runs on the
    worker pool's threads, with the bits of `ktjax.quant.encode`.

    Args:
      weights: a layer's experts.
      formats: see `make_store`, as are the others.
      group_size: see `choose_encoding`.
      zero_point: see `choose_encoding`.
      where: the operation that asks; begins errors and warnings.

    Returns:
      The weights; of arrays that are in the encoding already, views.

    Raises:
      ValueError: sizes that groups do not divide, NaN or Inf in weights to be
        quantised, or what `ExpertStore.from_arrays` refuses of quantised ones.
      TypeError: wrong dtypes.
    """
    encodings, arrays = _prepare(weights, formats, group_size, zero_point, where)
    asked = encodings[0]
    for encoding in encodings:
        encoding.check_encoded(where=where)
    backend.get_pool()
    _, intermediate, hidden = weights.shape
    sizes = {
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    encoded = (
        check_quantized(matrix, asked, *sizes[name], where=f"{where}: {name}")
        if isinstance(matrix, Quantized)
        else _encode(matrix, asked, name, where)
        for name, matrix in zip(sizes, arrays, strict=True)
    )
    return ExpertWeights(asked, *encoded)


def _prepare(
    weights: ExpertWeights,
    formats: Sequence[str],
    group_size: int | None,
    zero_point: bool,
    where: str,
) -> tuple[tuple[Encoding, Encoding, Encoding], tuple[np.ndarray | Quantized, ...]]:
    """The encodings to have of gate, up and down, and the arrays: in them, or to be."""
    mixed = weights.encodings
    stored = mixed[0]
    if len(set(mixed)) > 1:
        if all(encoding.format in formats for encoding in mixed):
            return mixed, weights.arrays()
        # Not all are kept, so none is: one that has to go stands for all.
        others = [e for e in mixed if e.format not in ("bf16", *formats)]
        stored = others[0] if others else next(e for e in mixed if e.format != "bf16")
    asked = choose_encoding(stored, formats, group_size, zero_point, where=where)
    arrays = weights.arrays()
    if stored.format == "rawint4" and asked == stored._replace(format="int4_kgroup"):
        arrays = tuple(_widen(matrix) for matrix in arrays)
    elif stored != asked and stored.format != "bf16":
        if asked.format != "bf16":
            warnings.warn(
                f"{where}: experts stored as {_describe(stored)} are quantised again "
                f"as {_describe(asked)}, which adds a second error; ask for the stored "
                "format to keep them as they are",
                stacklevel=4,
            )
        arrays = weights.dequantize()
    return (asked, asked, asked), arrays


def _encode(
    matrix: np.ndarray, encoding: Encoding, name: str, where: str
) -> np.ndarray | Quantized:
    if matrix.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(
            f"{where}: {name}: expected float32 or bfloat16, got {matrix.dtype}"
        )
    if encoding.format == "bf16":
        return matrix.astype(ml_dtypes.bfloat16, copy=False)
    experts, outputs, depth = matrix.shape
    encoding.check_depth(depth, where=f"{where}: {name}")
    plain = {
        part: np.empty((experts, *shape), dtype)
        for part, (shape, dtype) in encoding.shapes(outputs, depth).items()
    }
    _native.encode(
        encoding.format,
        encoding.group_size if encoding.spec.group_sizes else 0,
        encoding.zero_point,
        backend.native_bits(matrix),
        f"{where}: {name}",
        [backend.native_bits(array) for array in plain.values()],
    )
    return Quantized(**plain)


def _has_groups(format: str) -> bool:
    return bool(FORMATS[format].group or FORMATS[format].group_sizes)


def _widen(matrix: np.ndarray | Quantized) -> Quantized:
    assert isinstance(matrix, Quantized)
    return matrix._replace(scales=matrix.scales.astype(np.float32))


def _describe(encoding: Encoding) -> str:
    group = f" in groups of {encoding.group_size}" if encoding.spec.group_sizes else ""
    return encoding.format + group
