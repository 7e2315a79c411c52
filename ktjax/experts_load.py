"""From the experts of a checkpoint to a store, in the format that was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from ktjax import backend
from ktjax.io.experts import ExpertWeights
from ktjax.quant.formats import FORMATS, Encoding, Quantized
from ktjax.quant.plain import group_of
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
    """Which of `formats` given arrays are in, by the shape of their scales.

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
    format = formats[0]
    if "fp8_channel" in formats and np.ndim(gate.scales) == 2:
        format = "fp8_channel"
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
    stored = weights.encoding
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
                stacklevel=3,
            )
        arrays = weights.dequantize()
    return ExpertStore.from_arrays(
        *arrays,
        format=asked.format,
        group_size=asked.group_size or None,
        zero_point=asked.zero_point,
        pool=pool,
    )


def _widen(matrix: np.ndarray | Quantized) -> Quantized:
    assert isinstance(matrix, Quantized)
    return matrix._replace(scales=matrix.scales.astype(np.float32))


def _describe(encoding: Encoding) -> str:
    group = f" in groups of {encoding.group_size}" if encoding.spec.group_sizes else ""
    return encoding.format + group
