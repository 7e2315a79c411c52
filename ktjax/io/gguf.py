"""Lazy reading of GGUF files: tensors as views, in the blocks that the file has."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ktjax.io.gguf_header import Descriptor, read_gguf_header
from ktjax.io.header import CheckpointError
from ktjax.io.parts import Parts

Array = np.ndarray[Any, Any]

SUFFIX = ".gguf"
# Tensors of these types are arrays of numbers; all others are blocks.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFFile:
    """One GGUF file (version 2 or 3, little-endian), mapped read-only.

    Attributes:
      path: the file.
      metadata: numbers, bools, strings, lists of strings, or arrays that are views.
      tensors: type, shape and place of every tensor by name, in the file's order.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the file and check its header.

        Raises:
          FileNotFoundError: there is no such file.
          CheckpointError: it is no valid GGUF file; one error that names the fault.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such GGUF file")
        # An empty file cannot be mapped.
        self._map: mmap.mmap | None = None
        if self.path.stat().st_size:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data: Array = np.frombuffer(self._map or b"", np.uint8)
        header = read_gguf_header(self.path, self._data)
        self.metadata: Mapping[str, Any] = header.metadata
        self.tensors: Mapping[str, Descriptor] = header.tensors

    def __getitem__(self, name: str) -> Array:
        """The tensor `name` as a read-only view of the file.

        Returns:
          `shape` in its dtype; or, of a type in blocks, uint8 `[*shape[:-1], bytes of a
          row]`.
        """
        tensor = self.tensors[name]
        data = self._data[tensor.start : tensor.stop]
        if dtype := DTYPES.get(tensor.type.name):
            # Alignments below that of the dtype are allowed, if strange.
            return data.view(dtype).reshape(tensor.shape)
        row = tensor.shape[-1] // tensor.type.block * tensor.type.bytes
        return data.reshape(*tensor.shape[:-1], row)

    def release_pages(self) -> None:
        """As `SafetensorsFile.release_pages`."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


class GGUFCheckpoint(Parts[GGUFFile]):
    """A GGUF model as a lazy mapping: one file, or the parts that it was split into.

    Attributes:
      path: what was opened.
      metadata: that of the first part.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a file (of a split model, any part) or a directory of one model's files.

        Raises:
          FileNotFoundError: the path, or a part of the model, is not there.
          CheckpointError: a file is damaged, or parts do not belong together.
        """
        self.path = Path(path)
        files = [GGUFFile(part) for part in _parts(self.path)]
        self.metadata = files[0].metadata
        self._file_of: dict[str, GGUFFile] = {}
        for file in files:
            for name in file.tensors:
                if name in self._file_of:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} is in both "
                        f"{self._file_of[name].path.name} and {file.path.name}; "
                        "expected the files of one model"
                    )
                self._file_of[name] = file

    def descriptor(self, name: str) -> Descriptor:
        """Type and shape of the tensor `name`; see `file_of` for errors."""
        return self.file_of(name).tensors[name]

    def __getitem__(self, name: str) -> Array:
        """The tensor `name` as a view; see `GGUFFile`, and `file_of` for errors."""
        return self.file_of(name)[name]

    def release_pages(self) -> None:
        """`GGUFFile.release_pages` of every file."""
        for file in set(self._file_of.values()):
            file.release_pages()


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a GGUF file by its name, or a directory of them.

    A directory that has safetensors as well is a Hugging Face checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))
    return path.suffix == SUFFIX


def _parts(path: Path) -> list[Path]:
    """The files of the model at `path`."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if not files:
            raise FileNotFoundError(f"{path}: there is no {SUFFIX} file in it")
        stems = {_SHARD.sub(r"\g<stem>", file.name) for file in files}
        if len(stems) > 1:
            raise CheckpointError(
                f"{path}: expected the files of one model, got {sorted(stems)}; name "
                "one file"
            )
        path = files[0]
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{SUFFIX}")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of the model's {count} parts are missing, "
            f"{', '.join(missing[:3])}; download them"
        )
    return parts
