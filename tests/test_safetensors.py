"""The safetensors reader on good and on damaged files; layouts of experts."""

from __future__ import annotations

import json
import os
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktjax.io import Checkpoint, CheckpointError, load_experts, save_file
from ktjax.io.header import DTYPES
from ktjax.io.safetensors import SafetensorsFile


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read(tmp_path, name):
    dtype = DTYPES[name]
    raw = np.arange(6 * dtype.itemsize, dtype=np.uint8) % 2
    want = raw.view(dtype).reshape(2, 3)
    path = write(
        tmp_path / "a", {"x": entry(name, (2, 3), (0, raw.size))}, raw.tobytes()
    )
    got = Checkpoint(path)["x"]
    assert got.dtype == dtype
    assert got.tobytes() == want.tobytes()
    assert got.shape == (2, 3)
    with pytest.raises(ValueError, match="read-only"):
        got[0] = 0


def test_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.normal(size=(3, 4)).astype(np.float32),
        "bf16": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "transposed": np.arange(6, dtype=np.int32).reshape(2, 3).T,
        "u8": np.arange(7, dtype=np.uint8),
        "scalar": np.float16(3.0),
        "empty": np.zeros((0, 3), np.int64),
        "f8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
        "e8": np.ones(4, ml_dtypes.float8_e8m0fnu),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "model.safetensors"
    save_file(path, tensors, {"format": "pt"})
    for where in (path, tmp_path):
        checkpoint = Checkpoint(where)
        assert sorted(checkpoint.keys()) == sorted(tensors)
        assert len(checkpoint) == len(tensors)
        for name, want in tensors.items():
            got = checkpoint[name]
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            np.testing.assert_array_equal(got, np.asarray(want))
    assert SafetensorsFile(path).metadata == {"format": "pt"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_saving_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file(path, {"x": np.ones(2)})

    def crash(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        save_file(path, {"x": np.zeros(2)})
    np.testing.assert_array_equal(Checkpoint(path)["x"], np.ones(2))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError, match="'x' has dtype complex64"):
        save_file(path, {"x": np.zeros(2, np.complex64)})


DAMAGED = {
    "empty file": (b"", "truncated: 0 bytes"),
    "cut in the length": (b"\x01\x02", "truncated: 2 bytes"),
    "not safetensors": (b"PK\x03\x04" + b"\xff" * 20, "not a safetensors file"),
    "cut in the header": (struct.pack("<Q", 50) + b"{}", "truncated: the header"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_beginnings(tmp_path, name):
    content, message = DAMAGED[name]
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert str(path) in str(caught.value)


LIES = {
    "no JSON": (b"{oops", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "not valid JSON"),
    "a list": (b"[]", "must be a JSON object, got list"),
    "twice": (
        b'{"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "x": 1}',
        "a name appears twice",
    ),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__ must map"),
    "no entry": ({"x": 3}, "'x': expected an object with dtype"),
    "keys": ({"x": {"dtype": "F32"}}, "'x': expected an object with dtype"),
    "dtype": ({"x": entry("F12")}, "'x': unknown dtype 'F12'"),
    "dtype type": ({"x": entry(["F32"])}, "'x': unknown dtype"),
    "shape": ({"x": entry(shape=(-2,))}, "'x': shape must be a list of sizes"),
    "shape type": ({"x": entry(shape=(True, 2))}, "'x': shape must be"),
    "offsets": ({"x": entry(offsets=(8, 0))}, "'x': data_offsets must be"),
    "offset count": ({"x": entry(offsets=(0, 4, 8))}, "'x': data_offsets must be"),
    "offset type": ({"x": entry(offsets=(0.0, 8))}, "'x': data_offsets must be"),
    "past the end": ({"x": entry(shape=(3,), offsets=(0, 12))}, "past the end"),
    "huge": ({"x": entry(shape=(2**62, 4), offsets=(0, 8))}, "takes .* bytes"),
    "size": ({"x": entry(shape=(3,))}, r"takes 12 bytes, data_offsets \[0, 8\] hold 8"),
    "overlap": (
        {"x": entry(), "y": entry("U8", (4,), (4, 8))},
        "tensors 'x' and 'y' overlap at byte 4",
    ),
    "hole before": (
        {"x": entry("U8", (4,), (4, 8))},
        "bytes 0..4 before 'x' belong to",
    ),
    "hole after": ({"x": entry("U8", (4,), (0, 4))}, "end at byte 4 of the data"),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_headers(tmp_path, name):
    header, message = LIES[name]
    path = write(tmp_path / "a", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert str(path) in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_one_clear_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file(
        path, {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.int8)}
    )
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    del content[cut:]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            place = data.draw(st.integers(0, len(content) - 1))
            content[place] = data.draw(st.integers(0, 255))
    path.unlink()
    path.write_bytes(content)
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError:
        return
    for name in checkpoint:
        assert checkpoint[name].nbytes <= len(content)


def test_missing_files_and_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match=r"neither model\.safetensors\.index\.json"
    ):
        Checkpoint(tmp_path)
    save_file(tmp_path / "model.safetensors", {"model.norm.weight": np.ones(2)})
    checkpoint = Checkpoint(tmp_path)
    assert "model.norm.weight" in checkpoint
    assert "norm" not in checkpoint
    with pytest.raises(
        KeyError, match=r"no tensor 'model\.norm\.bias'.*close: model\.norm"
    ):
        checkpoint["model.norm.bias"]


def test_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file(tmp_path / "one.safetensors", {"a": np.ones(2)})
    save_file(tmp_path / "two.safetensors", {"b": np.zeros(3)})

    def write_index(**weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write_index(a="one.safetensors", b="two.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.keys() == ["a", "b"]
    np.testing.assert_array_equal(checkpoint["b"], np.zeros(3))
    write_index(a="one.safetensors", b="three.safetensors")
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors: shard named by"):
        Checkpoint(tmp_path)
    write_index(a="one.safetensors", b="one.safetensors")
    with pytest.raises(CheckpointError, match=r"'b' should be in one\.safetensors"):
        Checkpoint(tmp_path)
    write_index(a="../one.safetensors")
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        Checkpoint(tmp_path)
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=index.name):
            Checkpoint(tmp_path)


EXPERTS, INTERMEDIATE, HIDDEN = 3, 4, 8


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    shapes = [(EXPERTS, INTERMEDIATE, HIDDEN)] * 2 + [(EXPERTS, HIDDEN, INTERMEDIATE)]
    return [rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in shapes]


def expert_tensors(layout, weights):
    gate, up, down = weights
    at = "model.layers.1"
    if layout == "fused":
        return {
            f"{at}.mlp.experts.gate_up_proj": np.concatenate([gate, up], axis=1),
            f"{at}.mlp.experts.down_proj": down,
        }
    folder, names = {
        "qwen": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    }[layout]
    return {
        f"{at}.{folder}.{expert}.{name}.weight": tensor[expert]
        for name, tensor in zip(names, weights, strict=True)
        for expert in range(EXPERTS)
    }


@pytest.mark.parametrize("layout", ["qwen", "mixtral", "fused"])
@pytest.mark.parametrize("order", [None, [2, 0, 1], [1, 1, 0, 2]])
def test_expert_layouts(tmp_path, weights, layout, order):
    save_file(tmp_path / "m", expert_tensors(layout, weights))
    got = load_experts(
        Checkpoint(tmp_path / "m"), 1, EXPERTS, physical_to_logical_map=order
    )
    for tensor, want in zip(got, weights, strict=True):
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, want if order is None else want[order])


def test_expert_errors(tmp_path, weights):
    tensors = expert_tensors("qwen", weights)
    path = tmp_path / "m"

    def load(changed, match, error=ValueError, experts=EXPERTS, **kwargs):
        save_file(path, changed)
        with pytest.raises(error, match=match):
            load_experts(Checkpoint(path), kwargs.pop("layer", 1), experts, **kwargs)

    load(tensors, "layer 0 has no routed experts", KeyError, layer=0)
    load(tensors, r"no tensor 'model.layers.1.mlp.experts.3", KeyError, experts=4)
    load(tensors, "num_experts must be positive, got 0", experts=0)
    for bad in ([0, 3], [-1, 0]):
        load(tensors, r"must be within 0\.\.2", physical_to_logical_map=bad)
    for bad in ([], [0.5], [[0, 1]]):
        load(tensors, "must be a list of integers", physical_to_logical_map=bad)
    key = "model.layers.1.mlp.experts.2.gate_proj.weight"
    load(
        {**tensors, key: tensors[key].astype(np.float32)},
        "2.gate_proj.weight is float32",
    )
    load({**tensors, key: tensors[key][:2]}, r"bfloat16\[2, 8\], expert 0 has")
    transposed = {
        name: tensor.T if "down" in name else tensor for name, tensor in tensors.items()
    }
    load(transposed, r"down must be bfloat16\[3, 8, 4\] to fit gate")
    fused = expert_tensors("fused", weights)
    load(fused, r"gate_up_proj must be \[4, 2 \* intermediate, hidden\]", experts=4)
