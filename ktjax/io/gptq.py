"""Matrices as GPTQ and AWQ store them: eight 4-bit codes to an int32, transposed.

For a matrix of O outputs and D depths with G groups of depths:

| tensor | GPTQ | AWQ |
|---|---|---|
| `.qweight` int32 | `[D/8, O]`, nibble i of row r is depth 8 r + i | `[D, O/8]` |
| `.qzeros` int32 | `[G, O/8]`, nibble i of column c is output 8 c + i | `[G, O/8]` |
| `.scales` float16 | `[G, O]` | `[G, O]` |
| `.g_idx` int32 | `[D]`, the group of each depth | |

AWQ's nibbles are outputs 8 c + (0, 2, 4, 6, 1, 3, 5, 7). A weight is (code - zero) *
scale. float32 holds the scales exactly, so the codes go into a store in groups as they
are. Which of the two it is, and what the zero points mean, `quantization_config` says:
GPTQ's first format ("gptq") has zero - 1, its second ("gptq_v2") and AWQ the zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint
from ktjax.quant import FORMATS, Encoding

Array = np.ndarray[Any, Any]

_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
_SYMMETRIC_ZERO = 8
_SCALE_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


class _Scheme(NamedTuple):
    """What a checkpoint's configuration says of its matrices.

    Attributes:
      method: whose layout they have.
      symmetric: whether every zero point is 8.
      less_one: whether what is stored is the zero point - 1.
      act_order: whether groups may be of depths in any order.
      group: depths of a group, -1 for a whole row; None where it does not say.
    """

    method: Literal["gptq", "awq"]
    symmetric: bool
    less_one: bool
    act_order: bool
    group: int | None


class _Parts(NamedTuple):
    """The tensors of a matrix, whose shapes fit each other."""

    scheme: _Scheme
    depth: int
    width: int  # depths of a group
    qweight: Array
    qzeros: Array
    scales: Array


def is_packed(checkpoint: Checkpoint, at: str) -> bool:
    """Whether the matrix `at` is in a layout of this module."""
    return f"{at}.qweight" in checkpoint


def packed_encoding(checkpoint: Checkpoint, matrices: Sequence[str]) -> Encoding:
    """The one format of a store that holds these matrices exactly.

    `int4_kgroup`, with zero points unless the configuration says that there are none;
    groups wider than 128 depths become several with the same scale. `int4` for rows
    with a single scale and no zero points.

    Args:
      checkpoint: where to look.
      matrices: names without `.qweight`.

    Raises:
      CheckpointError: a layout that is not read, or tensors that do not fit together.
      KeyError: a tensor is missing.
    """
    found = [_parts(checkpoint, at) for at in matrices]
    symmetric = found[0].scheme.symmetric
    widths = sorted({parts.width for parts in found})
    sizes = FORMATS["int4_kgroup"].group_sizes
    by_row = symmetric and all(parts.width == parts.depth for parts in found)
    if by_row and not (len(widths) == 1 and widths[0] in sizes):
        return Encoding.of("int4")
    for size in sorted(sizes, reverse=True):
        if not any(width % size for width in widths):
            return Encoding.of("int4_kgroup", size, not symmetric)
    raise CheckpointError(
        f"{checkpoint.path}: {matrices[0]}.scales: expected a scale for every row or "
        f"for groups of a multiple of {min(sizes)} depths, got groups of {widths}"
    )


def read_packed(
    checkpoint: Checkpoint, at: str, encoding: Encoding
) -> dict[str, Array]:
    """Codes, scales and zero points of the matrix `at`, by the names of their tensors.

    Args:
      checkpoint: where to read.
      at: the matrix's name without `.qweight`.
      encoding: from `packed_encoding`.

    Returns:
      The plain arrays of `encoding`, which are copies.

    Raises:
      CheckpointError: a layout that is not read, tensors that do not fit together, or
        zero points where the configuration says that there are none.
      KeyError: a tensor is missing.
    """
    parts = _parts(checkpoint, at)
    size = encoding.group_size or parts.depth
    if parts.width % size:
        raise CheckpointError(
            f"{checkpoint.path}: {at}.scales: expected groups of a multiple of {size} "
            f"depths, as other matrices of the layer have, got {parts.width}"
        )
    zeros = _zeros(parts)
    if not encoding.zero_point and (zeros != _SYMMETRIC_ZERO).any():
        raise CheckpointError(
            f"{checkpoint.path}: {at}.qzeros: expected zero points of "
            f"{_SYMMETRIC_ZERO}, since quantization_config has sym = true, got "
            f"{zeros[zeros != _SYMMETRIC_ZERO][0]}; correct sym or checkpoint_format "
            "there"
        )
    scales = parts.scales.astype(np.float32).T
    scales, zeros = (np.repeat(a, parts.width // size, axis=1) for a in (scales, zeros))
    if not encoding.group_size:
        scales = scales.reshape(-1)
    arrays = {f"{at}.qweight": _codes(parts), f"{at}.scales": scales}
    return arrays | ({f"{at}.qzeros": zeros} if encoding.zero_point else {})


def _scheme(checkpoint: Checkpoint, at: str) -> _Scheme:
    config = checkpoint.quantization
    where = f"{checkpoint.path}: {at}.qweight"
    if not config:
        raise CheckpointError(
            f"{where}: expected quantization_config in a config.json, or a "
            "quantize_config.json, beside the weights: they say what qzeros mean"
        )

    def only(names: Sequence[str], allowed: Sequence[Any]) -> Any:
        """The value of the first of the keys, which must be one of those allowed."""
        value = next((config[name] for name in names if name in config), allowed[0])
        if value not in allowed:
            raise CheckpointError(
                f"{where}: quantization_config: {names[0]} must be "
                f"{' or '.join(map(repr, allowed))} for packed weights, got {value!r}"
            )
        return value

    method = only(["quant_method"], ["gptq", "awq"])
    only(["bits", "w_bit"], [4])
    group = config.get("group_size", config.get("q_group_size"))
    if method == "awq":
        only(["version"], ["gemm", "GEMM"])
        return _Scheme(
            "awq", symmetric=False, less_one=False, act_order=False, group=group
        )
    kind = only(["checkpoint_format", "format"], ["gptq", "gptq_v2"])
    return _Scheme(
        "gptq",
        symmetric=only(["sym"], [False, True]),
        less_one=kind == "gptq",
        act_order=only(["desc_act"], [False, True]),
        group=group,
    )


def _parts(checkpoint: Checkpoint, at: str) -> _Parts:
    scheme = _scheme(checkpoint, at)
    names = [f"{at}.{name}" for name in ("qweight", "qzeros", "scales")]
    qweight, qzeros, scales = tensors = [checkpoint[name] for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        allowed = _SCALE_DTYPES if tensor is scales else (np.int32,)
        if tensor.ndim != 2 or 0 in tensor.shape or tensor.dtype not in allowed:
            raise CheckpointError(
                f"{checkpoint.path}: {name}: expected "
                f"{' or '.join(np.dtype(dtype).name for dtype in allowed)} in 2 "
                f"dimensions, got {tensor.dtype}{list(tensor.shape)}"
            )
    groups, outputs = scales.shape
    rows = len(qweight)
    depth = rows * 8 if scheme.method == "gptq" else rows
    for name, tensor, expected in (
        (
            names[0],
            qweight,
            (rows, outputs if scheme.method == "gptq" else outputs / 8),
        ),
        (names[1], qzeros, (groups, outputs / 8)),
    ):
        if tensor.shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {name}: expected [{expected[0]}, "
                f"{expected[1]:g}] in {scheme.method.upper()}'s layout to fit "
                f"{names[2]}, {list(scales.shape)}, got {list(tensor.shape)}"
            )
    if depth % groups:
        raise CheckpointError(
            f"{checkpoint.path}: {names[2]}: expected groups of the same size for "
            f"{depth} depths, got {groups}"
        )
    parts = _Parts(scheme, depth, depth // groups, qweight, qzeros, scales)
    _check_order(checkpoint, at, parts)
    return parts


def _check_order(checkpoint: Checkpoint, at: str, parts: _Parts) -> None:
    """Whether the groups are equal runs of depths, the first ones in group 0."""
    key, (scheme, depth, width, *_) = f"{at}.g_idx", parts
    if key in checkpoint:
        given = checkpoint[key]
        if np.array_equal(given, np.arange(depth) // width):
            return
        if given.shape != (depth,):
            raise CheckpointError(
                f"{checkpoint.path}: {key}: expected a group for each of {depth} "
                f"depths, got {given.dtype}{list(given.shape)}"
            )
    elif not scheme.act_order:
        if scheme.group not in (None, width) and (scheme.group, width) != (-1, depth):
            raise CheckpointError(
                f"{checkpoint.path}: {at}.scales: expected groups of {scheme.group} "
                f"depths, as quantization_config has it, got {depth // width} for "
                f"{depth} depths"
            )
        return
    raise CheckpointError(
        f"{checkpoint.path}: {key}: the groups are not equal runs of neighbouring "
        "depths; GPTQ with desc_act = true, also called act-order, has them in any "
        "order. Kernels read one scale for a run of depths, so these weights have no "
        "store: quantise the model with desc_act = false, or dequantise it to BF16"
    )


def _codes(parts: _Parts) -> Array:
    """uint8 `[outputs, depth / 2]`, the even depth in the low half."""
    if parts.scheme.method == "gptq":
        return np.ascontiguousarray(parts.qweight.T).view(np.uint8)
    codes = np.ascontiguousarray(_nibbles(parts.qweight, _AWQ_OUTPUTS).T)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _zeros(parts: _Parts) -> Array:
    """uint8 `[outputs, groups]`."""
    if parts.scheme.method == "awq":
        return _nibbles(parts.qzeros, _AWQ_OUTPUTS).T
    stored = parts.qzeros.view(np.uint32)
    # Of the whole words, as GPTQ's programs subtract it: a zero point of 0 borrows from
    # the next.
    return _nibbles(stored + np.uint32(0x11111111 * parts.scheme.less_one)).T


def _nibbles(words: Array, order: Sequence[int] = range(8)) -> Array:
    """uint8 `[rows, 8 columns]` of 32-bit words; nibble i is number order[i] of 8."""
    halves = np.ascontiguousarray(words).view(np.uint8)
    nibbles = np.stack([halves & 15, halves >> 4], axis=-1)
    eights = nibbles.reshape(len(words), -1, 8)
    return eights[:, :, np.argsort(order)].reshape(len(words), -1)
