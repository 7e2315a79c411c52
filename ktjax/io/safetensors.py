"""Lazy reading and crash-safe writing of safetensors checkpoints.

A file is `u64 little-endian n`, n bytes of JSON header, then the data; the header maps
a tensor's name to its dtype, shape and byte range in the data. The header is checked in
full before anything is read, so a damaged file is one clear error, not a wild read.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

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
class _Entry:
    """Where a tensor lies: `start` and `stop` are offsets in the data section."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One safetensors file, mapped read-only; tensors are views of the mapping.

    Attributes:
      path: the file.
      metadata: the header's `__metadata__`, strings by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the file and check its header.

        Raises:
          FileNotFoundError: there is no such file.
          CheckpointError: it is no valid safetensors file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such safetensors file")
        header, data_offset, data_size = _read_header(self.path)
        self.metadata: dict[str, str] = _check_metadata(self.path, header)
        self._entries = {
            name: _parse_entry(self.path, name, value, data_size)
            for name, value in header.items()
        }
        _check_coverage(self.path, self._entries, data_size)
        # An empty data section cannot be mapped.
        self._data: np.ndarray[Any, Any] = (
            np.memmap(self.path, np.uint8, mode="r", offset=data_offset)
            if data_size
            else np.empty(0, np.uint8)
        )

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the header."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor `name` as a read-only view of the file; nothing is copied.

        Raises:
          KeyError: there is no such tensor; the message offers close matches.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise KeyError(_missing(name, self.path, self._entries))
        data = self._data[entry.start : entry.stop]
        return data.view(entry.dtype).reshape(entry.shape).view(np.ndarray)


class Checkpoint:
    """A safetensors file, or a Hugging Face directory of them, as a lazy mapping.

    A directory holds `model.safetensors.index.json` and the shards it names, or
    `model.safetensors`. Every header is checked when the checkpoint is opened.

    Attributes:
      path: what was opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open `path`.

        Raises:
          FileNotFoundError: the path, or a shard that the index names, is not there.
          CheckpointError: a file is damaged, or the index and the shards disagree.
        """
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file or directory")
        self._file_of = _open_directory(self.path) if self.path.is_dir() else {}
        if not self.path.is_dir():
            file = SafetensorsFile(self.path)
            self._file_of = dict.fromkeys(file.keys(), file)

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor `name` as a read-only view of its file; nothing is copied.

        Raises:
          KeyError: there is no such tensor; the message offers close matches.
        """
        file = self._file_of.get(name)
        if file is None:
            raise KeyError(_missing(name, self.path, self._file_of))
        return file[name]


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` (NumPy or JAX arrays, bfloat16 too); a crash loses nothing.

    The bytes go to a temporary file beside `path`, are flushed to the disk, and take
    the place of `path` in one rename: a reader sees the old file or the new one.

    Args:
      path: the file to write; its directory must exist.
      tensors: arrays by name.
      metadata: strings to keep in the header.

    Raises:
      TypeError: a dtype that the format or the writer does not know.
    """
    path = Path(path)
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            raise TypeError(
                f"save_file: tensor {name!r} has dtype {array.dtype}, expected one of "
                f"{', '.join(map(str, DTYPES.values()))}; convert it first"
            )
    content = safetensors.numpy.save(arrays, dict(metadata or {}) or None)
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a checkpoint has the permissions of any file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
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


def _parse_entry(path: Path, name: str, value: Any, data_size: int) -> _Entry:
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
    return _Entry(dtype, tuple(shape), start, stop)


def _check_coverage(path: Path, entries: dict[str, _Entry], data_size: int) -> None:
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


def _open_directory(path: Path) -> dict[str, SafetensorsFile]:
    index_path, single = path / INDEX_NAME, path / SINGLE_NAME
    if not index_path.is_file():
        if not single.is_file():
            raise FileNotFoundError(
                f"{path}: neither {INDEX_NAME} nor {SINGLE_NAME} is there; expected a "
                "Hugging Face checkpoint directory"
            )
        file = SafetensorsFile(single)
        return dict.fromkeys(file.keys(), file)
    weight_map = _read_index(index_path)
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            raise FileNotFoundError(
                f"{path / shard}: shard named by {INDEX_NAME} is missing; "
                "download it again"
            )
        files[shard] = SafetensorsFile(path / shard)
    for name, shard in weight_map.items():
        if name not in files[shard]:
            raise CheckpointError(
                f"{index_path}: tensor {name!r} should be in {shard}, "
                "which does not hold it"
            )
    return {name: files[shard] for name, shard in weight_map.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(
            f'{path}: "weight_map" must map tensor names to shard files, '
            f"got {type(weight_map).__name__}"
        )
    for shard in weight_map.values():
        # A shard is a sibling of its index: never follow a path out of the directory.
        if shard != Path(shard).name:
            raise CheckpointError(f"{path}: shard {shard!r} must be a plain file name")
    return weight_map


def _missing(name: str, path: Path, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"{path}: no tensor {name!r} among {len(known)}{hint}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_directory(path: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
