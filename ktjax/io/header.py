"""The header of a safetensors file, checked in full before anything is read.

A file is `u64 little-endian n`, n bytes of JSON header, then the data; the header maps
a tensor's name to its dtype, shape and byte range in the data. A damaged file must be
one clear error, not a wild read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# The format's own limit, which also bounds what a lying length can make us read.
_MAX_HEADER = 100_000_000
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` and `stop` are offsets in the data section."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A valid header.

    Attributes:
      metadata: `__metadata__`, strings by name.
      entries: the tensors by name, in the order of the file.
      data_offset: where the data section begins in the file.
      data_size: its bytes.
    """

    metadata: dict[str, str]
    entries: dict[str, Entry]
    data_offset: int
    data_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of the file `path`.

    Raises:
      CheckpointError: the file is no valid safetensors file.
    """
    raw, offset, size = _read_json(path)
    metadata = _check_metadata(path, raw)
    entries = {name: _parse_entry(path, name, raw[name], size) for name in raw}
    _check_coverage(path, entries, size)
    return Header(metadata, entries, offset, size)


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, and the offset and size of the data section."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes, a safetensors file begins with 8 "
            "bytes of header length; download or write it again"
        )
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{path}: not a safetensors file: its header would have {length} "
                f"bytes, at most {_MAX_HEADER} are allowed"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated: the header has {length} bytes, the file only "
                f"{size - 8} after its first 8; download or write it again"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header is not valid JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path}: the header must be a JSON object, got {type(header).__name__}"
        )
    return header, 8 + length, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _check_metadata(path: Path, header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return metadata


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(path: Path, name: str, value: Any, data_size: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or not _ENTRY_KEYS.issubset(value):
        raise CheckpointError(
            f"{where}: expected an object with dtype, shape and data_offsets, "
            f"got {value!r}"
        )
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: unknown dtype {value['dtype']!r}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise CheckpointError(f"{where}: shape must be a list of sizes, got {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_size, offsets))
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(
            f"{where}: data_offsets must be [start, stop] with start <= stop, "
            f"got {offsets!r}"
        )
    start, stop = offsets
    if stop > data_size:
        raise CheckpointError(
            f"{where}: its bytes {start}..{stop} reach past the end of the data "
            f"({data_size} bytes): the file is truncated or its header is wrong"
        )
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise CheckpointError(
            f"{where}: {value['dtype']} {shape} takes {expected} bytes, "
            f"data_offsets {offsets} hold {stop - start}"
        )
    return Entry(dtype, tuple(shape), start, stop)


def _check_coverage(path: Path, entries: dict[str, Entry], data_size: int) -> None:
    """The format demands that tensors neither overlap nor leave holes."""
    position, previous = 0, ""
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].start, item[1].stop)
    ):
        if entry.start < position:
            raise CheckpointError(
                f"{path}: tensors {previous!r} and {name!r} overlap at byte "
                f"{entry.start}"
            )
        if entry.start > position:
            raise CheckpointError(
                f"{path}: bytes {position}..{entry.start} before {name!r} belong to no "
                "tensor"
            )
        position, previous = entry.stop, name
    if position != data_size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position} of the data, the file at "
            f"{data_size}"
        )
