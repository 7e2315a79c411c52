"""Checkpoints that survive a kill at any moment.

A checkpoint is a directory `step-00000123` with one safetensors file per pytree and a
meta.json. It is written under a temporary name, every file and the directory synced,
and then renamed: the rename is atomic, so a name that matches holds a complete
checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ktjax.io.atomic import sync_directory
from ktjax.io.stream import Spec, write_stream

_NAME = re.compile(r"step-(\d{8})")
_META = "meta.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or used for this run."""


def save_checkpoint(
    root: Path,
    step: int,
    trees: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    *,
    spare: int = 0,
) -> Path:
    """Write `root/step-<step>` and drop all but the newest `keep` checkpoints.

    When the system refuses, for instance because the disk is full, what was written is
    removed and the older checkpoints stay.

    Args:
      root: directory of the checkpoints; made when missing.
      step: optimizer steps done.
      trees: pytrees of arrays by file name; PRNG keys are allowed.
      meta: what JSON can hold.
      keep: at least 1.
      spare: the step of a checkpoint that stays, however old it is.

    Returns:
      The checkpoint's directory.

    Raises:
      CheckpointError: the system refuses, or that step has a checkpoint already.
    """
    final = root / f"step-{step:08d}"
    if final.exists():
        raise CheckpointError(f"{final} exists already; continue it with resume")
    temporary = root / f".writing-{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        for name, tree in trees.items():
            _write_tree(temporary / f"{name}.safetensors", tree)
        text = json.dumps({**meta, "step": step}, indent=2)
        with _synced(temporary / _META) as file:
            file.write(text.encode())
        sync_directory(temporary)
        os.rename(temporary, final)
        sync_directory(root)
        for number, old in list_checkpoints(root)[:-keep]:
            if number != spare:
                _remove(old)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write checkpoint {final}: {error}") from error
    return final


def leaf_names(tree: Any) -> list[str]:
    """What a checkpoint calls the leaves of `tree`, in the order of its leaves."""
    return [_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints under `root` as (step, directory), oldest first."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta of the checkpoint at `path`, with its "step".

    Raises:
      CheckpointError: it cannot be read.
    """
    try:
        return json.loads((path / _META).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from None


def load_tree(path: Path, name: str, like: Any) -> Any:
    """The pytree `name` of the checkpoint at `path`, in the structure of `like`.

    Raises:
      CheckpointError: a file that cannot be read, or whose names, shapes or dtypes are
        not those of `like`.
    """
    file = path / f"{name}.safetensors"
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_key(keys): leaf for keys, leaf in paths}
    if different := sorted(set(stored) ^ set(wanted)):
        which = "lacks" if different[0] in wanted else "has an unknown"
        raise CheckpointError(
            f"{file} does not fit this model: it {which} {different[0]}"
        )
    leaves = []
    for key, leaf in wanted.items():
        # As shapes: `like` may have been donated.
        array, expected = stored[key], jax.eval_shape(_raw, leaf)
        if array.shape != expected.shape or array.dtype != expected.dtype:
            raise CheckpointError(
                f"{file} does not fit this model: {key} should be "
                f"{expected.dtype}{list(expected.shape)}, "
                f"is {array.dtype}{list(array.shape)}"
            )
        leaves.append(_restore(array, leaf))
    return jax.tree_util.tree_unflatten(structure, leaves)


def _key(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _restore(array: np.ndarray, leaf: Any) -> jax.Array:
    # jnp.array copies: a donated buffer must never alias memory that NumPy owns.
    if _is_key(leaf):
        return jax.random.wrap_key_data(
            jnp.array(array), impl=jax.random.key_impl(leaf)
        )
    return jnp.array(array)


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_key(path): np.asarray(_raw(leaf), order="C") for path, leaf in paths}


def _write_tree(path: Path, tree: Any) -> None:
    """One array after the other: a copy of the whole could be gigabytes."""
    arrays = _flatten(tree)
    specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
    with _synced(path) as file:
        write_stream(file, specs, lambda name: [arrays[name]])


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that no half of it bears its name."""
    doomed = path.with_name(f".removing-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(root: Path) -> None:
    """Delete what a killed writer or remover left."""
    for pattern in (".writing-*", ".removing-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)
