"""A checkpoint in several files as one collection of tensors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

File = TypeVar("File")


class Parts(Generic[File]):
    """Which file holds which tensor; iterates over the names.

    Attributes:
      path: of the checkpoint.
    """

    path: Path
    _file_of: dict[str, File]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def file_of(self, name: str) -> File:
        """The file that holds the tensor `name`.

        Raises:
          KeyError: there is no such tensor; the message offers close matches.
        """
        file = self._file_of.get(name)
        if file is None:
            raise KeyError(missing(name, self.path, self._file_of))
        return file


def missing(name: str, path: Path, known: Mapping[str, Any]) -> str:
    """What to say of a tensor that is not there."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"{path}: no tensor {name!r} among {len(known)}{hint}"
