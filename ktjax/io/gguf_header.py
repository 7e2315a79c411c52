"""The header of a GGUF file, checked in full before anything is allocated.

A file is the magic "GGUF", a version, the numbers of tensors and of metadata pairs, the
pairs, a descriptor of every tensor (name, dimensions, type, offset), padding, and the
data. Counts and lengths are 64-bit numbers that a damaged file may set to anything:
each is held against the bytes that are left before it is believed.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ktjax.io.header import CheckpointError

Array = np.ndarray[Any, Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
# Large files are mapped, and their headers read, in pages.
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32
# The largest number that ggml can hold, so that no product of sizes is absurd.
_MAX_INT64 = 2**63 - 1


class TensorType(NamedTuple):
    """How a tensor is stored: blocks of so many weights in so many bytes."""

    name: str
    block: int
    bytes: int


# By ggml's number; the numbers that are missing are of types that ggml has dropped.
TYPES: dict[int, TensorType] = {
    number: TensorType(*facts)
    for number, facts in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
    }.items()
}

# Of metadata, by GGUF's number.
_NUMBERS: dict[int, np.dtype[Any]] = {
    number: np.dtype(code)
    for number, code in {
        0: "u1",
        1: "i1",
        2: "<u2",
        3: "<i2",
        4: "<u4",
        5: "<i4",
        6: "<f4",
        7: "?",
        10: "<u8",
        11: "<i8",
        12: "<f8",
    }.items()
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """Where a tensor lies and what it is.

    Attributes:
      type: how it is stored.
      shape: its dimensions, the contiguous one last (GGUF writes it first).
      start: offset in the file.
      stop: end of its bytes.
    """

    type: TensorType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """A valid header: the metadata and the tensors by name, in the file's order."""

    metadata: dict[str, Any]
    tensors: dict[str, Descriptor]


def read_gguf_header(path: Path, data: Array) -> GGUFHeader:
    """Read and check the header of a file.

    Args:
      path: the file; named in errors.
      data: its bytes, uint8.

    Raises:
      CheckpointError: it is no valid GGUF file.
    """
    cursor = _Cursor(path, data)
    if cursor.take(4, "the magic").tobytes() != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.number("<I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        hint = "a big-endian file; " if swapped in _VERSIONS else ""
        raise CheckpointError(
            f"{path}: {hint}expected GGUF version 2 or 3, little-endian, got {version}"
        )
    # The least that a descriptor takes: a name's length, one dimension, type, offset.
    tensors = cursor.count("tensors", least=8 + 4 + 8 + 4 + 8)
    pairs = cursor.count("metadata pairs", least=8 + 4 + 1)
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise CheckpointError(f"{path}: metadata key {key!r} appears twice")
        metadata[key] = cursor.value(f"metadata {key!r}")
    raw: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name = cursor.string("a tensor's name")
        if name in raw:
            raise CheckpointError(f"{path}: tensor {name!r} appears twice")
        raw[name] = cursor.descriptor(f"tensor {name!r}")
    alignment = _alignment(path, metadata)
    begin = -(-cursor.position // alignment) * alignment
    placed = {
        name: _place(path, name, facts, begin, len(data), alignment)
        for name, facts in raw.items()
    }
    _check_overlaps(path, placed)
    return GGUFHeader(metadata, placed)


class _Cursor:
    """Reads a file front to back; every step is checked against its end."""

    def __init__(self, path: Path, data: Array) -> None:
        self.path, self.data, self.position = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> Array:
        if size > self.left:
            raise CheckpointError(
                f"{self.path}: truncated: {what} takes {size} bytes at byte "
                f"{self.position}, the file has {self.left} left; download it again"
            )
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what).tobytes())[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self.number("<Q", f"the number of {what}")
        if count * least > self.left:
            raise CheckpointError(
                f"{self.path}: {count} {what} cannot be in the {self.left} bytes that "
                "are left: the file is truncated or its header is wrong"
            )
        return count

    def string(self, what: str) -> str:
        length = self.count(f"bytes of {what}", least=1)
        try:
            return self.take(length, what).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {what} at byte {self.position - length} is not UTF-8: "
                f"{error.reason}"
            ) from None

    def value(self, what: str) -> Any:
        """A number, a bool or a string; arrays of numbers are views of the file."""
        kind = self.number("<I", f"the type of {what}")
        if kind == _STRING:
            return self.string(what)
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            return self.take(dtype.itemsize, what).view(dtype)[0].item()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: {what} has an unknown type, {kind}")
        kind = self.number("<I", f"the type of {what}")
        if kind == _STRING:
            # At least its length each.
            count = self.count(f"strings of {what}", least=8)
            return [self.string(what) for _ in range(count)]
        if kind not in _NUMBERS:
            raise CheckpointError(
                f"{self.path}: {what} is an array of type {kind}; expected numbers, "
                "bools or strings"
            )
        dtype = _NUMBERS[kind]
        count = self.count(f"values of {what}", least=dtype.itemsize)
        return self.take(count * dtype.itemsize, what).view(dtype)

    def descriptor(self, what: str) -> tuple[TensorType, tuple[int, ...], int]:
        dimensions = self.number("<I", f"the dimensions of {what}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: {what}: expected 1 to {_MAX_DIMENSIONS} dimensions, got "
                f"{dimensions}"
            )
        sizes = [self.number("<Q", f"the sizes of {what}") for _ in range(dimensions)]
        number = self.number("<I", f"the type of {what}")
        offset = self.number("<Q", f"the offset of {what}")
        if number not in TYPES:
            raise CheckpointError(
                f"{self.path}: {what}: unknown type number {number}; known are "
                f"{', '.join(f'{n} ({t.name})' for n, t in TYPES.items())}"
            )
        return TYPES[number], tuple(reversed(sizes)), offset


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 1 <= alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise CheckpointError(
            f"{path}: general.alignment: expected a power of two up to "
            f"{_MAX_ALIGNMENT}, got {alignment!r}"
        )
    return alignment


def _place(
    path: Path,
    name: str,
    facts: tuple[TensorType, tuple[int, ...], int],
    begin: int,
    end: int,
    alignment: int,
) -> Descriptor:
    """The tensor's place in the file, within `begin` and `end`."""
    type, shape, offset = facts
    where = f"{path}: tensor {name!r}"
    if 0 in shape or math.prod(shape) > _MAX_INT64:
        raise CheckpointError(f"{where}: no tensor can have the shape {list(shape)}")
    if shape[-1] % type.block:
        raise CheckpointError(
            f"{where}: rows of {type.name} have a multiple of {type.block} weights, "
            f"got shape {list(shape)}"
        )
    if offset % alignment:
        raise CheckpointError(
            f"{where}: its offset {offset} is no multiple of the file's alignment "
            f"{alignment}"
        )
    size = math.prod(shape) // type.block * type.bytes
    if begin + offset + size > end:
        raise CheckpointError(
            f"{where}: {type.name} {list(shape)} takes {size} bytes at offset "
            f"{offset}, the file has {max(end - begin, 0)} bytes of data: it is "
            "truncated or its header is wrong"
        )
    return Descriptor(type, shape, begin + offset, begin + offset + size)


def _check_overlaps(path: Path, tensors: dict[str, Descriptor]) -> None:
    position, previous = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < position:
            raise CheckpointError(f"{path}: tensors {previous!r} and {name!r} overlap")
        position, previous = tensor.stop, name
