"""Atomicity, retention, and errors of checkpoints."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktjax.train import checkpoint
from ktjax.train.checkpoint import CheckpointError, list_checkpoints, load_tree

TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.ones(3, jnp.bfloat16),
    "count": jnp.int32(7),
    "key": jax.random.key(5),
}


def save(root, step, keep=9, tree=TREE):
    return checkpoint.save_checkpoint(root, step, {"t": tree}, {"note": step}, keep)


def test_round_trip(tmp_path):
    path = save(tmp_path, 3)
    assert checkpoint.read_meta(path) == {"note": 3, "step": 3}
    loaded = load_tree(path, "t", TREE)
    for old, new in zip(jax.tree.leaves(TREE), jax.tree.leaves(loaded), strict=True):
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            old, new = jax.random.key_data(old), jax.random.key_data(new)
        np.testing.assert_array_equal(old, new)


def test_retention_keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000010",
    ]


def test_retention_spares_one(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save_checkpoint(tmp_path, step, {"t": TREE}, {}, 1, spare=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4]


def test_leaf_names_are_those_of_the_file(tmp_path):
    assert checkpoint.leaf_names(TREE) == ["count", "half", "key", "w"]


class Killed(BaseException):
    """Stands for the process dying at a system call."""


CALLS = [(os, "fsync"), (os, "rename"), (os, "open"), (shutil, "rmtree")]


@pytest.mark.parametrize(("module", "name"), CALLS)
def test_a_kill_at_any_call_leaves_the_last_complete_checkpoint(
    tmp_path, monkeypatch, module, name
):
    """Die at the n-th call of `name` while saving step 2, for every n there is."""
    real = getattr(module, name)
    survived = False
    for fatal in range(1, 30):
        root = tmp_path / str(fatal)
        save(root, 1, keep=1)
        calls = 0

        def dying(*args, fatal=fatal, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            try:
                save(root, 2, keep=1)
                survived = True
            except Killed:
                pass
        step, newest = list_checkpoints(root)[-1]
        assert checkpoint.read_meta(newest)["step"] == step
        load_tree(newest, "t", TREE)
        if survived:
            assert fatal > 1
            assert step == 2
            break
        # The next save cleans up and goes on.
        save(root, 3, keep=1)
        assert [path.name for path in root.iterdir()] == ["step-00000003"]
    assert survived


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    events = []

    def spy(name):
        real = getattr(os, name)

        def call(*args):
            events.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    spy("fsync")
    spy("rename")
    save(tmp_path, 1)
    # t.safetensors, meta.json and their directory; then the parent's entry.
    assert events == ["fsync", "fsync", "fsync", "rename", "fsync"]


def test_errors(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"lacks more"):
        load_tree(path, "t", {**TREE, "more": jnp.ones(1)})
    with pytest.raises(CheckpointError, match=r"has an unknown w"):
        load_tree(path, "t", {k: v for k, v in TREE.items() if k != "w"})
    with pytest.raises(CheckpointError, match=r"w should be float32\[3, 2\]"):
        load_tree(path, "t", {**TREE, "w": jnp.ones((3, 2))})
    with pytest.raises(CheckpointError, match="cannot read"):
        load_tree(path, "missing", TREE)
    (path / "t.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_tree(path, "t", TREE)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.read_meta(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "file", 1)
