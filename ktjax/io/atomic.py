"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends well.

    The bytes go to a temporary file beside `path`, are flushed to the disk, and take
    its place in one rename: a reader sees the old file or the new one.
    """
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a checkpoint has the permissions of any file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def new_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends well.

    It is filled as `.writing-NAME` beside `path`; then every file is flushed to the
    disk and the directory renamed. Whatever goes wrong, `path` is complete or not
    there. What a killed writer left is removed by the next one.

    Args:
      path: the directory to make; its parents are made too.
      replace: whether an existing `path` is replaced. It is moved aside just before
        the new one takes its name.

    Raises:
      FileExistsError: `path` exists and is not to be replaced.
    """
    # Resolved, so that "." and "a/.." have a name and a parent.
    path = path.resolve()
    if path.exists() and not replace:
        raise FileExistsError(
            f"{path} exists already; choose another name or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    old = path.with_name(f".removing-{path.name}")
    for leftover in (temporary, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync_directory(file)
        sync_directory(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)
    if old.exists():
        shutil.rmtree(old)


def sync_directory(path: Path) -> None:
    """Flush a directory, so that a rename survives a power cut; or a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
