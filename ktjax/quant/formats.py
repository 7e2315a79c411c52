"""The storage formats of expert weights, a row each, and the arrays that hold them.

A matrix is `[outputs, depth]`; scales run along the depth. The value of a weight, in
the forward, the backward and `ExpertStore.dequantize` alike, is

    bfloat16((code - zero) * scale)

computed in float32 and rounded once, to nearest even. Magnitudes below 2^-126 count as
zero: the kernels flush them. docs/formats.md has the rules by which codes are chosen.

The formats of GGUF files come in blocks, whose values `ktjax.quant.blocks` has. They
are rounded to bfloat16 like all others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

Array = Any
ShapeAndDtype = tuple[tuple[int, ...], np.dtype[Any]]

# Rows and columns of a block of DeepSeek's FP8 checkpoints.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Format:
    """One storage format.

    Attributes:
      name: as arguments and the command line have it.
      bits: of a code; two 4-bit codes share a byte, the even depth in the low half.
      code: what the bits mean. "int4" is stored as value + 8, or unsigned with a zero
        point. "blocks" are those of GGUF, with their scales among them.
      scale: the scales' dtype. "e8m0" is a byte, 2^(byte - 127).
      group: depths that share a scale; 0 = the whole row.
      group_sizes: what the user may choose for `group`, the default last; empty where
        the format fixes it.
      block_outputs: outputs that share a scale.
      int8_compute: whether `compute="int8"` can take its codes as they are.
      block_bytes: bytes of a block of `group` weights; 0 = no format in blocks.
    """

    name: str
    bits: int
    code: Literal["bf16", "int8", "int4", "e4m3", "e2m1", "blocks"]
    scale: Literal["float32", "bfloat16", "e8m0"] | None
    group: int = 0
    group_sizes: tuple[int, ...] = ()
    block_outputs: int = 1
    int8_compute: bool = False
    block_bytes: int = 0


def _blocks(name: str, bits: int, group: int, block_bytes: int) -> Format:
    return Format(
        name,
        bits,
        "blocks",
        None,
        group=group,
        int8_compute=True,
        block_bytes=block_bytes,
    )


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("bf16", 16, "bf16", None),
        Format("int8", 8, "int8", "float32", int8_compute=True),
        Format("int4", 4, "int4", "float32", int8_compute=True),
        Format(
            "int4_kgroup",
            4,
            "int4",
            "float32",
            group_sizes=(32, 64, 128),
            int8_compute=True,
        ),
        Format("fp8_block", 8, "e4m3", "float32", group=BLOCK, block_outputs=BLOCK),
        Format("fp8_channel", 8, "e4m3", "float32"),
        Format("rawint4", 4, "int4", "bfloat16", group=32, int8_compute=True),
        Format("mxfp4", 4, "e2m1", "e8m0", group=32),
        Format("mxfp8", 8, "e4m3", "e8m0", group=32),
        _blocks("q4_0", 4, 32, 18),
        _blocks("q4_1", 4, 32, 20),
        _blocks("q5_0", 5, 32, 22),
        _blocks("q5_1", 5, 32, 24),
        _blocks("q8_0", 8, 32, 34),
        _blocks("q2_k", 2, 256, 84),
        _blocks("q3_k", 3, 256, 110),
        _blocks("q4_k", 4, 256, 144),
        _blocks("q5_k", 5, 256, 176),
        _blocks("q6_k", 6, 256, 210),
        _blocks("iq4_nl", 4, 32, 18),
        _blocks("iq4_xs", 4, 256, 136),
    )
}
# Those of GGUF files, and those that weights can be quantised to.
BLOCK_FORMATS = tuple(name for name, row in FORMATS.items() if row.block_bytes)
ENCODED_FORMATS = tuple(name for name, row in FORMATS.items() if not row.block_bytes)
# Those of `compute="int8"`.
INT8_FORMATS = tuple(name for name, row in FORMATS.items() if row.int8_compute)

_SCALE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "e8m0": np.dtype(np.uint8),
}
_VALUE_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
    "int4": np.dtype(np.uint8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e2m1": np.dtype(np.uint8),
    "blocks": np.dtype(np.uint8),
}


class Quantized(NamedTuple):
    """Weights that are already quantised, in the plain arrays of their format.

    For E experts, O outputs, D depths and groups of g depths:

    | format | values | scales | zeros |
    |---|---|---|---|
    | int8 | int8 `[E, O, D]` | float32 `[E, O]` | |
    | int4 | uint8 `[E, O, ⌈D/2⌉]` | float32 `[E, O]` | |
    | int4_kgroup | uint8 `[E, O, D/2]` | float32 `[E, O, D/g]` | uint8, like scales |
    | fp8_block | float8_e4m3fn `[E, O, D]` | float32 `[E, ⌈O/128⌉, ⌈D/128⌉]` | |
    | fp8_channel | float8_e4m3fn `[E, O, D]` | float32 `[E, O]` | |
    | rawint4 | uint8 `[E, O, D/2]` | bfloat16 `[E, O, D/32]` | |
    | mxfp4 | uint8 `[E, O, D/2]` | uint8 `[E, O, D/32]`, the exponent + 127 | |
    | mxfp8 | float8_e4m3fn `[E, O, D]` | uint8 `[E, O, D/32]`, likewise | |
    | those of GGUF | uint8 `[E, O, bytes of a row of blocks]` | | |

    4-bit values may also be int32 `[E, O, D/8]`, the same bytes (compressed-tensors);
    float8_e4m3fn and float8_e8m0fnu may be their bits, uint8.

    Attributes:
      values: the codes.
      scales: the scales; None for "bf16" and the formats of GGUF.
      zeros: the zero points, 0 to 15; only for int4_kgroup, where None = symmetric.
    """

    values: Array
    scales: Array = None
    zeros: Array | None = None


class Encoding(NamedTuple):
    """A format with what the user chose; hashable. Make it with `Encoding.of`.

    Attributes:
      format: the name of the format.
      group_size: depths that share a scale; 0 = the whole row.
      zero_point: whether groups have zero points.
    """

    format: str
    group_size: int = 0
    zero_point: bool = False

    @classmethod
    def of(
        cls,
        format: str,
        group_size: int | None = None,
        zero_point: bool = False,
        *,
        where: str = "encoding",
    ) -> Encoding:
        """The checked encoding; `where` begins the errors.

        Args:
          format: one of `FORMATS`.
          group_size: depths that share a scale; None = the format's default.
          zero_point: whether groups have zero points.
          where: the operation that asks.

        Raises:
          ValueError: an unknown format, or a choice that it does not have.
        """
        if format not in FORMATS:
            raise ValueError(
                f"{where}: format: expected one of {list(FORMATS)}, got {format!r}"
            )
        spec = FORMATS[format]
        allowed = spec.group_sizes or ((spec.group,) if spec.group else ())
        if group_size is None:
            group_size = allowed[-1] if allowed else 0
        elif group_size not in allowed:
            choice = f"one of {list(allowed)}" if allowed else "None"
            raise ValueError(
                f"{where}: group_size: expected {choice} for format {format!r}, got "
                f"{group_size!r}"
            )
        if zero_point and not spec.group_sizes:
            raise ValueError(
                f"{where}: zero_point: format {format!r} has none; use format "
                "'int4_kgroup' or zero_point=False"
            )
        return cls(format, int(group_size), bool(zero_point))

    @property
    def spec(self) -> Format:
        """The format's row."""
        return FORMATS[self.format]

    def check_depth(self, depth: int, *, where: str) -> None:
        """Whether groups of this size divide `depth`.

        Raises:
          ValueError: they do not; `where` names the operation and the dimension.
        """
        # Blocks of FP8 may be cut off at the edges.
        if self.spec.block_outputs > 1 or not self.group_size:
            return
        if depth % self.group_size:
            raise ValueError(
                f"{where}: expected a multiple of the group size {self.group_size} of "
                f"format {self.format!r}, got {depth}"
            )

    def check_encoded(self, *, where: str) -> None:
        """Whether weights can be quantised to the format.

        Raises:
          ValueError: it is one of GGUF, which are read only; `where` begins the error.
        """
        if self.spec.block_bytes:
            raise ValueError(
                f"{where}: format: {self.format!r} is read from GGUF files; weights "
                f"can be quantised to one of {list(ENCODED_FORMATS)}"
            )

    def shapes(self, outputs: int, depth: int) -> dict[str, ShapeAndDtype]:
        """Shape and dtype of each plain array of one matrix, by name."""
        spec = self.spec
        width = depth if spec.bits > 4 else -(-depth // 2)
        if spec.block_bytes:
            width = depth // spec.group * spec.block_bytes
        arrays: dict[str, ShapeAndDtype] = {
            "values": ((outputs, width), _VALUE_DTYPES[spec.code])
        }
        if spec.scale is None:
            return arrays
        rows = -(-outputs // spec.block_outputs)
        scales: tuple[int, ...] = (rows,)
        if self.group_size:
            scales = (rows, -(-depth // self.group_size))
        arrays["scales"] = (scales, _SCALE_DTYPES[spec.scale])
        if self.zero_point:
            arrays["zeros"] = (scales, np.dtype(np.uint8))
        return arrays

    def nbytes(self, outputs: int, depth: int) -> int:
        """Bytes of the plain arrays of one matrix."""
        return sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in self.shapes(outputs, depth).values()
        )


COMPUTE_POLICIES = ("bf16", "int8")


def check_compute(
    compute: str | None, formats: Iterable[str] | None, *, where: str
) -> bool:
    """Whether activations are quantised to int8 for the products; None = "bf16".

    Args:
      compute: one of `COMPUTE_POLICIES`, or None.
      formats: those of the weights; None = unknown.
      where: the operation that asks; begins the errors.

    Raises:
      ValueError: an unknown policy, or one that the format does not have.
    """
    if compute is None or compute == "bf16":
        return False
    if compute != "int8":
        raise ValueError(
            f"{where}: compute: expected one of {list(COMPUTE_POLICIES)} or None, got "
            f"{compute!r}"
        )
    others = [format for format in formats or () if format not in INT8_FORMATS]
    if formats is None or others:
        raise ValueError(
            f"{where}: compute: 'int8' needs a store in one of the formats "
            f"{list(INT8_FORMATS)}, got "
            f"{'a bare handle' if formats is None else repr(others[0])}; use "
            "compute='bf16'"
        )
    return True


def check_method_compute(
    compute: str | None, formats: tuple[str, ...], *, where: str
) -> None:
    """`check_compute` for a method whose weights are in one of these formats.

    Raises:
      ValueError: as there, where none of them has the policy.
    """
    integers = [format for format in formats if format in INT8_FORMATS]
    check_compute(compute, (integers or formats)[:1], where=where)
