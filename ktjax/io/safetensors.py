"""Lazy reading and crash-safe writing of safetensors checkpoints."""

from __future__ import annotations

import functools
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ktjax.io.atomic import new_file
from ktjax.io.header import DTYPES, CheckpointError, Entry, read_header
from ktjax.io.parts import Parts, missing

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsFile:
    """One safetensors file, mapped read-only; tensors are views of the mapping.

    Attributes:
      path: the file.
      metadata: the header's `__metadata__`, strings by name.
      entries: dtype, shape and place of every tensor by name, in the file's order.
      data_offset: where the data section begins in the file.
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
        header = read_header(self.path)
        self.metadata = header.metadata
        self.data_offset = header.data_offset
        self.entries: Mapping[str, Entry] = header.entries
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = np.frombuffer(self._map, np.uint8, offset=header.data_offset)

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the header."""
        return list(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor `name` as a read-only view of the file; nothing is copied.

        Raises:
          KeyError: there is no such tensor; the message offers close matches.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise KeyError(missing(name, self.path, self.entries))
        data = self._data[entry.start : entry.stop]
        return data.view(entry.dtype).reshape(entry.shape)

    def release_pages(self) -> None:
        """Stop counting the pages that were read as memory of this process.

        Tensors stay valid: what is read again comes from the system's cache, or from
        the disk.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


class Checkpoint(Parts[SafetensorsFile]):
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

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor `name` as a read-only view of its file; nothing is copied.

        Raises:
          KeyError: there is no such tensor; the message offers close matches.
        """
        return self.file_of(name)[name]

    def release_pages(self) -> None:
        """`SafetensorsFile.release_pages` of every file."""
        for file in set(self._file_of.values()):
            file.release_pages()

    @functools.cached_property
    def quantization(self) -> Mapping[str, Any]:
        """What is written beside the weights of how they are quantised; {} if nothing.

        `quantization_config` of config.json, or the older quantize_config.json.

        Raises:
          CheckpointError: such a file is no JSON object.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        config = _read_object(folder / "config.json").get("quantization_config")
        if config is None:
            return _read_object(folder / "quantize_config.json")
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{folder / 'config.json'}: quantization_config must be an object, got "
                f"{config!r}"
            )
        return config


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
    with new_file(path) as file:
        file.write(content)


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file."""
    content = _read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}"
        )
    return content


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path)
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
