"""Writing safetensors piece by piece; directories that appear whole or not at all."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ktjax.io import Checkpoint
from ktjax.io.atomic import new_directory
from ktjax.io.header import DTYPES
from ktjax.io.stream import Spec, save_stream


def test_pieces_become_the_tensors(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "odd": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "transposed": rng.normal(size=(4, 6)).astype(np.float32).T,
        "scalar": np.array(3.0, np.float32),
        "empty": np.zeros((0, 2), np.float32),
    }
    specs = {name: Spec(array.dtype, array.shape) for name, array in tensors.items()}
    path = tmp_path / "x.safetensors"
    save_stream(
        path, specs, lambda name: tensors[name].reshape(-1, 1), {"format": "pt"}
    )
    ours, theirs = Checkpoint(path), load_file(path)
    assert ours.file_of("odd").metadata == {"format": "pt"}
    assert list(ours) == list(tensors)
    for name, array in tensors.items():
        for read in (ours[name], theirs[name]):
            assert (read.dtype, read.shape) == (array.dtype, array.shape)
            assert read.tobytes() == array.tobytes()


def test_every_dtype_is_written(tmp_path):
    specs = {name: Spec(dtype, (2,)) for name, dtype in DTYPES.items()}
    path = tmp_path / "x.safetensors"
    save_stream(path, specs, lambda name: [np.ones(2, DTYPES[name])])
    read = Checkpoint(path)
    assert all(read[name].tolist() == [1, 1] for name in DTYPES)


@pytest.mark.parametrize(
    ("pieces", "error", "words"),
    [
        ([np.ones(3, np.float32)], ValueError, "should be \\[4\\], its pieces have 3"),
        ([np.ones(5, np.float32)], ValueError, "pieces have 5"),
        ([np.ones(4, np.float64)], ValueError, "a piece is float64"),
    ],
)
def test_wrong_pieces_leave_no_file(tmp_path, pieces, error, words):
    specs = {"x": Spec(np.dtype(np.float32), (4,))}
    with pytest.raises(error, match=words):
        save_stream(tmp_path / "x", specs, lambda name: pieces)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="has dtype complex64"):
        save_stream(
            tmp_path / "x", {"x": Spec(np.dtype(np.complex64), (1,))}, lambda _: []
        )


def fill(path, text="new", **kwargs):
    with new_directory(path, **kwargs) as directory:
        (directory / "a").write_text(text)


def test_directory_is_made_replaced_or_refused(tmp_path):
    path = tmp_path / "parent" / "out"
    fill(path, "old")
    with pytest.raises(FileExistsError, match="exists already"):
        fill(path)
    assert (path / "a").read_text() == "old"
    fill(path, replace=True)
    assert (path / "a").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


class Killed(BaseException):
    """Stands for the process dying at a system call."""


@pytest.mark.parametrize("name", ["fsync", "rename"])
def test_a_kill_leaves_all_or_nothing_and_the_next_writer_cleans_up(
    tmp_path, monkeypatch, name
):
    real, path = getattr(os, name), tmp_path / "out"

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, name, die)
        # A dead process cleans nothing up.
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            fill(path)
    assert not path.exists()
    assert list(tmp_path.iterdir())
    assert getattr(os, name) is real
    fill(path)
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def call(*args, name=name, real=real):
            events.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)
    fill(tmp_path / "out")
    # The file and its directory; then the parent's entry.
    assert events == ["fsync", "fsync", "rename", "fsync"]
