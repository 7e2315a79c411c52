"""One weight matrix of a checkpoint, in whichever storage format it has there.

Beside `.weight` in float32, bfloat16 or float16 these layouts are read as they are:

| format | tensors |
|---|---|
| fp8_block (DeepSeek) | `.weight` e4m3, `.weight_scale_inv [⌈out/128⌉, ⌈in/128⌉]` |
| fp8_channel | `.weight` e4m3, `.weight_scale [out]` or `[out, 1]` |
| int8 | `.weight` int8, `.weight_scale [out]` or `[out, 1]` |
| rawint4 (Kimi-K2), int4_kgroup, int4 (all of compressed-tensors) | `.weight_packed`
  int32 `[out, in/8]`, `.weight_scale [out, groups]`, `.weight_shape [2]` |
| mxfp4 | `.weight_packed` uint8 `[out, in/2]`, `.weight_scale` uint8 `[out, in/32]` |
| mxfp8 | `.weight` e4m3, `.weight_scale` uint8 `[out, in/32]` |
| int4_kgroup, int4 (GPTQ, AWQ) | `.qweight`, `.qzeros`, `.scales`: `ktjax.io.gptq` |

Scales in float32, bfloat16 and float16 are kept exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ktjax.io.gptq import is_packed, packed_encoding, read_packed
from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint
from ktjax.quant import FORMATS, Encoding, Quantized, decode
from ktjax.quant.formats import BLOCK, ENCODED_FORMATS

Array = np.ndarray[Any, Any]

_SCALE_DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
_E8M0_DTYPES = (np.uint8, ml_dtypes.float8_e8m0fnu)
# Layouts near to those above that would be misread without these tensors.
_UNREAD = ("weight_zero_point", "weight_global_scale", "weight_g_idx")


def has_matrix(checkpoint: Checkpoint, at: str) -> bool:
    """Whether there is a matrix named `at`, quantised or not."""
    names = (f"{at}.{name}" for name in ("weight", "weight_packed", "qweight"))
    return any(name in checkpoint for name in names)


def stored_encoding(checkpoint: Checkpoint, matrices: Sequence[str]) -> Encoding:
    """The one format of these matrices; "bf16" for all that are not quantised.

    Args:
      checkpoint: where to look.
      matrices: names without `.weight`.

    Raises:
      CheckpointError: an unknown layout, or more than one format.
      KeyError: a tensor is missing.
    """
    kinds = {at: _kind(checkpoint, at) for at in matrices}
    if len(set(kinds.values())) > 1:
        raise CheckpointError(
            f"{checkpoint.path}: expected one storage format for the matrices of a "
            f"layer, got {kinds}"
        )
    kind = kinds[matrices[0]]
    if kind == "gptq":
        return packed_encoding(checkpoint, matrices)
    if kind == "packed":
        return _packed_encoding(checkpoint, matrices)
    return Encoding.of(kind)


def read_matrix(
    checkpoint: Checkpoint, at: str, encoding: Encoding
) -> dict[str, Array]:
    """The arrays of the matrix `at` by the names of their tensors; views if possible.

    Args:
      checkpoint: where to read.
      at: the matrix's name without `.weight`.
      encoding: its format, from `stored_encoding`.

    Returns:
      The weights; or values, scales and zero points in the plain layout of `encoding`.

    Raises:
      CheckpointError: a wrong dtype, or shapes that contradict each other.
      KeyError: a tensor is missing.
    """
    if is_packed(checkpoint, at):
        return read_packed(checkpoint, at, encoding)
    packed = FORMATS[encoding.format].bits == 4
    key = f"{at}.weight_packed" if packed else f"{at}.weight"
    values = checkpoint[key]
    if encoding.format == "bf16":
        return {key: values}
    if values.ndim != 2:
        raise CheckpointError(
            f"{checkpoint.path}: {key}: expected 2 dimensions, got {list(values.shape)}"
        )
    if packed:
        values = np.ascontiguousarray(values).view(np.uint8)
        _check_true_shape(checkpoint, at, values)
    scale_key = f"{at}.{_scale_name(checkpoint, at)}"
    scales = checkpoint[scale_key]
    if encoding.spec.scale == "e8m0":
        return {key: values, scale_key: scales.view(np.uint8)}
    if not encoding.group_size:
        scales = scales.reshape(-1)
    dtype = ml_dtypes.bfloat16 if encoding.format == "rawint4" else np.float32
    return {key: values, scale_key: scales.astype(dtype, copy=False)}


def read_dense(checkpoint: Checkpoint, at: str) -> Array:
    """The values of the matrix `at`: as stored, or float32 where it is quantised.

    Raises:
      CheckpointError: an unknown layout.
      KeyError: there is no such matrix.
    """
    encoding = stored_encoding(checkpoint, [at])
    arrays = list(read_matrix(checkpoint, at, encoding).values())
    if encoding.format == "bf16":
        return arrays[0]
    return decode(Quantized(*arrays), encoding.format)


def _kind(checkpoint: Checkpoint, at: str) -> str:
    """The name of the format; "gptq" or "packed" for INT4, by who packed it."""
    if is_packed(checkpoint, at):
        return "gptq"
    for name in _UNREAD:
        if f"{at}.{name}" in checkpoint:
            raise CheckpointError(
                f"{checkpoint.path}: {at}.{name}: quantised weights with this tensor "
                "are not read; convert the checkpoint to BF16 or to one of "
                f"{', '.join(ENCODED_FORMATS)}"
            )
    if f"{at}.weight_packed" in checkpoint:
        dtype = checkpoint[f"{at}.weight_packed"].dtype
        scale = checkpoint[f"{at}.weight_scale"].dtype
        if dtype == np.int32 and scale in _SCALE_DTYPES:
            return "packed"
        if dtype == np.uint8 and scale in _E8M0_DTYPES:
            return "mxfp4"
        raise CheckpointError(
            f"{checkpoint.path}: {at}.weight_packed: expected int32 with float scales "
            f"or uint8 with uint8 scales, got {dtype} with {scale} scales"
        )
    weight = checkpoint[f"{at}.weight"]
    if weight.dtype not in (np.int8, ml_dtypes.float8_e4m3fn):
        return "bf16"
    scale_name = _scale_name(checkpoint, at)
    scales = checkpoint[f"{at}.{scale_name}"]
    outputs, depth = weight.shape if weight.ndim == 2 else (0, 0)
    rows = {(outputs,), (outputs, 1)} if scale_name == "weight_scale" else set()
    blocks = {(-(-outputs // BLOCK), -(-depth // BLOCK))}
    groups = {(outputs, depth / FORMATS["mxfp8"].group)}
    floats, e4m3 = scales.dtype in _SCALE_DTYPES, weight.dtype != np.int8
    expected = "a scale for every row"
    if e4m3:
        expected += f" or every block of {BLOCK} x {BLOCK}, or of 32 depths in E8M0,"
    for kind, allowed in (
        ("fp8_channel" if e4m3 else "int8", floats and rows),
        ("fp8_block", floats and e4m3 and blocks),
        ("mxfp8", scales.dtype in _E8M0_DTYPES and e4m3 and groups),
    ):
        if outputs and allowed and scales.shape in allowed:
            return kind
    raise CheckpointError(
        f"{checkpoint.path}: {at}.{scale_name}: expected {expected} of "
        f"{weight.dtype}{list(weight.shape)}, got {scales.dtype}{list(scales.shape)}"
    )


def _scale_name(checkpoint: Checkpoint, at: str) -> str:
    inverse = f"{at}.weight_scale_inv" in checkpoint
    return "weight_scale_inv" if inverse else "weight_scale"


def _packed_encoding(checkpoint: Checkpoint, matrices: Sequence[str]) -> Encoding:
    """int4, int4_kgroup or rawint4, by how many scales the rows have."""
    sizes, counts, dtypes = set(), set(), set()
    for at in matrices:
        packed = checkpoint[f"{at}.weight_packed"]
        scales = checkpoint[f"{at}.weight_scale"]
        depth, count = packed.shape[-1] * 8, scales.shape[-1]
        sizes.add(depth / count if count else 0)
        counts.add(count)
        dtypes.add(scales.dtype)
    (size, *others) = sizes
    if not others and size == 32 and dtypes == {np.dtype(ml_dtypes.bfloat16)}:
        return Encoding.of("rawint4")
    if not others and size in FORMATS["int4_kgroup"].group_sizes:
        return Encoding.of("int4_kgroup", int(size))
    if counts == {1}:
        return Encoding.of("int4")
    raise CheckpointError(
        f"{checkpoint.path}: {matrices[0]}.weight_scale: expected a scale for every "
        f"row or every {FORMATS['int4_kgroup'].group_sizes} depths of "
        f"{', '.join(matrices)}, got one for every {sorted(sizes)}"
    )


def _check_true_shape(checkpoint: Checkpoint, at: str, values: Array) -> None:
    """`weight_shape`, where there is one, must be that of the packed values."""
    key = f"{at}.weight_shape"
    if key not in checkpoint:
        return
    held = [values.shape[0], values.shape[1] * 2]
    if checkpoint[key].tolist() != held:
        raise CheckpointError(
            f"{checkpoint.path}: {key}: expected {held}, what {at}.weight_packed holds "
            f"with 4 bits a weight, got {checkpoint[key].tolist()}"
        )
