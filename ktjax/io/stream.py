"""Writing a safetensors file one piece at a time, and what is copied into it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ktjax.io.atomic import new_file
from ktjax.io.header import DTYPES, Entry
from ktjax.io.safetensors import SafetensorsFile

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Data begins at a multiple of this, as the format's own writer has it.
_ALIGNMENT = 8
# What is copied at once of tensors that stay as they are.
_COPY = 16 << 20
# Weights in other files would contradict those that are written.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
)


class Spec(NamedTuple):
    """What a tensor will be, before there is any data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def save_stream(
    path: Path,
    specs: Mapping[str, Spec],
    pieces: Callable[[str], Iterable[np.ndarray[Any, Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in the order of `specs`; one piece is in memory at a time.

    As crash-safe as `ktjax.io.save_file`.

    Args:
      path: the file to write; its directory must exist.
      specs: dtype and shape of every tensor by name.
      pieces: name -> arrays of the tensor's dtype; their values, one after the other
        in C order, are the tensor.
      metadata: strings to keep in the header.

    Raises:
      TypeError: a dtype that the format does not know.
      ValueError: pieces of another dtype, or of another size, than the spec says.
    """
    with new_file(path) as file:
        write_stream(file, specs, pieces, metadata)


def write_stream(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    pieces: Callable[[str], Iterable[np.ndarray[Any, Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`save_stream` into a file that is open; the same arguments and errors."""
    file.write(_header(specs, metadata))
    for name, spec in specs.items():
        left = math.prod(spec.shape)
        for piece in pieces(name):
            if piece.dtype != spec.dtype:
                raise ValueError(
                    f"save_stream: tensor {name!r} should be {spec.dtype}, a piece "
                    f"is {piece.dtype}"
                )
            left -= piece.size
            # NumPy's own dtypes alone have a buffer; bytes always do.
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if left:
            raise ValueError(
                f"save_stream: tensor {name!r} should be {list(spec.shape)}, its "
                f"pieces have {math.prod(spec.shape) - left} values"
            )


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise TypeError(
                f"save_stream: tensor {name!r} has dtype {spec.dtype}, expected one of "
                f"{', '.join(map(str, _NAMES))}"
            )
        stop = offset + math.prod(spec.shape) * spec.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def read_pieces(
    shard: SafetensorsFile, entry: Entry, start: int, stop: int
) -> Iterator[np.ndarray[Any, Any]]:
    """The values start..stop of a tensor, a few megabytes at a time.

    Read, not mapped: pages of a mapping would count as this process's memory.
    """
    offset, step = shard.data_offset + entry.start, _COPY // entry.dtype.itemsize
    for first in range(start, stop, step):
        yield np.fromfile(
            shard.path,
            entry.dtype,
            min(step, stop - first),
            offset=offset + first * entry.dtype.itemsize,
        )


def copy_other_files(source: Path, directory: Path) -> None:
    """Copy what is beside the weights of a model: configuration, tokenizer."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, directory / path.name)
