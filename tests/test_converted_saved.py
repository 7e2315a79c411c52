"""What `cpu_save` writes of a wrapper's layer, and who uses it."""

import os

import numpy as np
import pytest
from checkpoint_formats import expert_tensors
from inference_support import base, forbid_quantising, make, tokens, values
from quant_cases import encode

import ktjax
from ktjax.io import Checkpoint, CheckpointError, save_file
from ktjax.io.converted import fingerprint
from ktjax.quant import Encoding


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    save_file(
        path / "model.safetensors", expert_tensors(base(), Encoding.of("bf16"), 2)
    )
    return path


def load(path, method="AMXINT4", **changes):
    wrapper = make(method, weights=False, layer_idx=2, weight_path=str(path), **changes)
    wrapper.load_weights()
    return wrapper


@pytest.mark.parametrize("method", ["AMXINT4", "RAWINT4", "FP8", "BF16"])
def test_saved_weights_are_used_by_the_next_start(checkpoint, method, monkeypatch):
    plain = load(checkpoint, method)
    assert not plain.saved_weights.exists()
    first = load(checkpoint, method, cpu_save=True)
    saved = first.saved_weights
    folder = f"ktjax-{first._formats[0]}"
    assert saved == checkpoint / folder / "experts-00002.safetensors"
    stamp = saved.stat().st_mtime_ns
    forbid_quantising(monkeypatch)
    args = tokens()
    want = np.asarray(plain.forward(*args))
    for change in ({}, {"cpu_save": True}, {"num_gpu_experts": 2}):
        again = load(checkpoint, method, **change)
        assert again.saved_weights.stat().st_mtime_ns == stamp
        if "num_gpu_experts" not in change:
            np.testing.assert_array_equal(again.forward(*args), want)
    # The file is what was read: a code that is changed there is changed here.
    rewrite_layer_2(saved)
    changed = load(checkpoint, method)
    different = values(changed)[0] != values(plain)[0]
    assert different[1].any()
    assert not different[[0, 2, 3, 4, 5]].any()


def rewrite_layer_2(path):
    name = "model.layers.2.mlp.experts.gate_proj.values"
    file = Checkpoint(path).file_of(name)
    tensors = {name: np.array(file[name]) for name in file.entries}
    tensors[name][1] = 0
    save_file(path, tensors, file.metadata)


def test_saved_weights_of_another_checkpoint_are_not_used(checkpoint):
    saved = load(checkpoint, cpu_save=True).saved_weights
    stamp = saved.stat().st_mtime_ns
    file = checkpoint / "model.safetensors"
    other = [w * 2 for w in base()]
    save_file(file, expert_tensors(other, Encoding.of("bf16"), 2))
    fresh = load(checkpoint)
    want = values(fresh)
    assert saved.stat().st_mtime_ns == stamp, "written only when asked"
    again = load(checkpoint, cpu_save=True)
    assert saved.stat().st_mtime_ns != stamp
    for got, expected in zip(values(again), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_fingerprint_is_of_names_sizes_and_times(checkpoint):
    first = fingerprint(Checkpoint(checkpoint))
    assert fingerprint(Checkpoint(checkpoint)) == first
    file = checkpoint / "model.safetensors"
    assert fingerprint(Checkpoint(file)) == first
    os.utime(file, ns=(1, 1))
    assert fingerprint(Checkpoint(checkpoint)) != first


def test_saved_weights_without_a_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    first = make(weights=False, method="AMXINT8", weight_path=str(path), cpu_save=True)
    with pytest.raises(FileNotFoundError, match="weights: no such file"):
        first.load_weights()
    order = [5, 0, 0, 1, 3, 2]
    first.load_weights_from_tensors(*base(), order)
    assert first.saved_weights.is_file()
    forbid_quantising(monkeypatch)
    again = make(weights=False, method="AMXINT8", weight_path=str(path))
    again.load_weights(order)
    for got, want in zip(values(again), values(first), strict=True):
        np.testing.assert_array_equal(got, want)
    # All experts were saved, in their own order.
    again.load_weights()
    for got, w in zip(values(again), base(), strict=True):
        want = ktjax.quant.decode(encode(w, Encoding.of("int8")), "int8")
        np.testing.assert_array_equal(got, want)


def test_saved_beside_a_file(checkpoint):
    file = checkpoint / "model.safetensors"
    saved = load(file, cpu_save=True).saved_weights
    assert saved.parent == checkpoint / "model.safetensors.ktjax-int4"
    assert saved.is_file()


def test_a_damaged_saved_file_is_an_error(checkpoint):
    saved = load(checkpoint, cpu_save=True).saved_weights
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"experts-00002.safetensors.*truncated"):
        load(checkpoint)


def test_a_kill_while_saving_leaves_no_half_file(checkpoint, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            load(checkpoint, cpu_save=True)
    wrapper = make(weights=False, method="AMXINT4", weight_path=str(checkpoint))
    assert not any(wrapper.saved_weights.parent.glob("experts-*"))
    assert load(checkpoint, cpu_save=True).saved_weights.is_file()


def test_fp8_keeps_the_scales_that_it_has(tmp_path, monkeypatch):
    encoding = Encoding.of("fp8_channel")
    path = tmp_path / "m.safetensors"
    save_file(path, expert_tensors(base(), encoding, 2))
    wrapper = load(path, "FP8", cpu_save=True)
    forbid_quantising(monkeypatch)
    for got in (wrapper, load(path, "FP8"), load(path, "FP8_PERCHANNEL")):
        assert got._loaded().store.format == "fp8_channel"
        want = [ktjax.quant.decode(encode(w, encoding), "fp8_channel") for w in base()]
        for a, b in zip(values(got), want, strict=True):
            np.testing.assert_array_equal(a, b)
