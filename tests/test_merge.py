"""Merged checkpoints: values, untouched tensors, files, memory, errors."""

import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import EXPERTS, HIDDEN, WIDTH, make_adapter, make_linear

from ktjax.io import (
    Adapter,
    Checkpoint,
    CheckpointError,
    merge_checkpoint,
    save_file,
    stream,
)
from ktjax.io.adapters import Strength

PARTS = ("gate", "up", "down")
NAMES = {
    "mlp.experts": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe.experts": ("w1", "w3", "w2"),
}


def make_tensors(
    folder, dtype=ml_dtypes.bfloat16, layers=3, width=WIDTH, hidden=HIDDEN
):
    """Experts per matrix under `folder`, or fused for "fused", and other tensors."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    tensors = {"model.embed_tokens.weight": normal(7, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors[f"{at}.mlp.gate.weight"] = normal(EXPERTS, hidden)
        tensors[f"{at}.mlp.shared_expert.up_proj.weight"] = normal(width, hidden)
        if folder == "fused":
            experts = f"{at}.mlp.experts"
            tensors[f"{experts}.gate_up_proj"] = normal(EXPERTS, 2 * width, hidden)
            tensors[f"{experts}.down_proj"] = normal(EXPERTS, hidden, width)
            continue
        for expert in range(EXPERTS):
            for part, name in zip(PARTS, NAMES[folder], strict=True):
                shape = (hidden, width) if part == "down" else (width, hidden)
                tensors[f"{at}.{folder}.{expert}.{name}.weight"] = normal(*shape)
    return tensors


def write_model(path, tensors, shards=1, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "x", **config}))
    (path / "tokenizer.json").write_text("{}")
    (path / "old.bin").write_text("weights of another form")
    if shards == 1:
        save_file(path / "model.safetensors", tensors, {"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        mine = names[shard::shards]
        file = f"model-{shard}.safetensors"
        save_file(path / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    index = json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return path


def expected(name, tensor, adapter, folder):
    """W + s B A in float32, rounded once."""
    words = name.split(".")
    if len(words) < 5 or "experts" not in words or int(words[2]) not in adapter.layers:
        return tensor
    lora = adapter.layers[int(words[2])]
    pairs = {
        part: (getattr(lora, f"{part}_a"), getattr(lora, f"{part}_b")) for part in PARTS
    }
    delta = {
        part: np.float32(adapter.scaling) * (b @ a) for part, (a, b) in pairs.items()
    }
    if folder == "fused":
        delta["gate_up"] = np.concatenate([delta["gate"], delta["up"]], axis=1)
        change = delta[words[-1].removesuffix("_proj")]
    else:
        part = PARTS[NAMES[folder].index(words[6])]
        change = delta[part][int(words[5])]
    return (tensor.astype(np.float32) + change).astype(tensor.dtype)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("folder", [*NAMES, "fused"])
def test_weights_gain_the_adapter_and_nothing_else_changes(
    tmp_path, folder, dtype, shards
):
    tensors, adapter = make_tensors(folder, dtype), make_adapter()
    model, out = write_model(tmp_path / "model", tensors, shards), tmp_path / "out"
    progress = []
    merge_checkpoint(model, adapter, out, lambda *numbers: progress.append(numbers))
    merged, changed = Checkpoint(out), 0
    assert set(merged) == set(tensors)
    for name, tensor in tensors.items():
        want = expected(name, tensor, adapter, folder)
        changed += want is not tensor
        assert merged[name].dtype == dtype
        if want is tensor:
            assert merged[name].tobytes() == tensor.tobytes()
        else:
            # A product of two ranks may be summed in another order: an ulp of float32,
            # and where that crosses a rounding boundary one of the dtype.
            np.testing.assert_allclose(
                np.float32(merged[name]),
                np.float32(want),
                rtol=2 * float(ml_dtypes.finfo(dtype).eps),
                atol=1e-6,
            )
    assert changed == (4 if folder == "fused" else 2 * 3 * EXPERTS)
    assert progress[-1] == (sum(t.nbytes for t in tensors.values()),) * 2
    kept = {path.name for path in model.iterdir()} - {"old.bin"}
    assert {path.name for path in out.iterdir()} == kept
    for name in kept - {path.name for path in model.glob("*.safetensors")}:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert [file.metadata for file in {merged.file_of(n) for n in merged}] == (
        [{"format": "pt"}] if shards == 1 else [{}] * shards
    )


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Two layers of fused experts, 12 MiB each, one matrix of 4 MiB at a time."""
    width, hidden = 512, 1024
    tensors = make_tensors("fused", np.float32, 2, width, hidden)
    adapter = make_adapter((0, 1), width=width, hidden=hidden)
    model = write_model(tmp_path / "model", tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    monkeypatch.setattr(stream, "_COPY", 1 << 20)
    tracemalloc.start()
    merge_checkpoint(model, adapter, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # As read (4 MiB), joined, in float32, the product twice, merged.
    assert total > 36 << 20
    assert peak < 7 * (4 << 20)


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


AT = "model.layers.2.mlp.experts.1.up_proj.weight"
MISFITS = {
    "missing": (drop(AT), "the up projection of expert 1 of layer 2"),
    "shape": (replace(AT, lambda w: w[:-1]), r"has shape \[5, 8\], the adapter is for"),
    "integers": (replace(AT, lambda w: w.astype(np.int8)), "has dtype int8; merging"),
    "one more expert": (
        lambda t: t.update({AT.replace(".1.", ".3."): t[AT]}),
        "the adapter is for 3 experts",
    ),
    "twice": (
        lambda t: t.update({AT.replace("1.up_proj", "1.w3"): t[AT]}),
        "holds experts that another tensor holds too",
    ),
    "infinite": (
        replace(AT, lambda w: np.full(w.shape, np.inf, w.dtype)),
        "plus the adapter is not finite in bfloat16",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_clear_error(tmp_path, name):
    change, words = MISFITS[name]
    tensors = make_tensors("mlp.experts")
    change(tensors)
    model = write_model(tmp_path / "model", tensors)
    with pytest.raises(CheckpointError, match=words):
        merge_checkpoint(model, make_adapter(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_errors(tmp_path):
    adapter, tensors = make_adapter(), make_tensors("mlp.experts")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        merge_checkpoint(tmp_path / "nowhere", adapter, tmp_path / "out")
    model = write_model(tmp_path / "q", tensors, quantization_config={"bits": 4})
    with pytest.raises(CheckpointError, match="the model is quantised"):
        merge_checkpoint(model, adapter, tmp_path / "out")
    model = write_model(tmp_path / "m", tensors)
    with pytest.raises(FileExistsError, match="exists already"):
        merge_checkpoint(model, adapter, tmp_path / "q")
    with pytest.raises(CheckpointError, match="expert 0 of layer 9, which the adapter"):
        merge_checkpoint(model, make_adapter((0, 9)), tmp_path / "out")
    (model / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face model"):
        merge_checkpoint(model, adapter, tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", make_tensors("mlp.experts"), shards=3)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoint(model, make_adapter(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


SHARED = "model.layers.1.mlp.shared_expert.up_proj"


@pytest.mark.parametrize("layers", [(0, 2), ()])
def test_projections_are_merged(tmp_path, layers):
    tensors = make_tensors("mlp.experts")
    source = write_model(tmp_path / "base", tensors, shards=2)
    lora = make_linear(3, outputs=WIDTH, rank=3)
    experts = make_adapter(layers).layers if layers else {}
    adapter = Adapter(
        *(2, 5.0, experts),
        strengths={SHARED: Strength(3, 6.0)},
        projections={SHARED: lora},
    )
    merge_checkpoint(source, adapter, tmp_path / "out")
    merged, name = Checkpoint(tmp_path / "out"), f"{SHARED}.weight"
    want = tensors[name].astype(np.float32) + np.float32(2) * (lora.b @ lora.a)
    assert np.array_equal(merged[name], want.astype(ml_dtypes.bfloat16))
    changed = {key for key in tensors if not np.array_equal(merged[key], tensors[key])}
    routed = {key for key in tensors if ".experts." in key and f"layers.{1}" not in key}
    assert changed == {name, *(routed if layers else ())}


def test_projections_that_do_not_fit(tmp_path):
    source = write_model(tmp_path / "base", make_tensors("mlp.experts"))

    def merge(name, lora):
        adapter = Adapter(2, 5.0, {}, projections={name: lora})
        merge_checkpoint(source, adapter, tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which the adapter"):
        merge("lm_head", make_linear(outputs=7))
    with pytest.raises(CheckpointError, match=r"has shape \[6, 8\], .* for \[7, 8\]"):
        merge(SHARED, make_linear(outputs=7))
    large = make_linear(outputs=WIDTH)
    large.b[:] = 3e38
    large.a[:] = 0.5
    with pytest.raises(CheckpointError, match=r"up_proj\.weight plus the adapter"):
        merge(SHARED, large)
    assert not (tmp_path / "out").exists()
