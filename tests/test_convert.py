"""`ktjax convert`: whole models whose experts are quantised once."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from checkpoint_formats import expert_tensors, matrices
from inference_support import EXPERTS, base, forbid_quantising, make, values

from ktjax import assets, cli
from ktjax.experts_convert import convert_checkpoint
from ktjax.experts_load import make_store
from ktjax.io import Checkpoint, read_experts, save_file
from ktjax.io.converted import NAMES
from ktjax.models import from_pretrained
from ktjax.quant import Encoding

DEMO = assets.demo_model()


def logits(model):
    return np.asarray(model(np.arange(24).reshape(2, 12)), np.float32)


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


@pytest.mark.parametrize(
    ("arguments", "loading"),
    [
        ([], {"experts": "int8"}),
        (["--experts", "bf16"], {"experts": "bf16"}),
        (
            ["--experts", "int4_kgroup", "--group-size", "32", "--zero-point"],
            {"experts": "int4_kgroup", "group_size": 32, "zero_point": True},
        ),
    ],
)
def test_a_converted_model_is_the_model(
    tmp_path, capsys, monkeypatch, arguments, loading
):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "convert", DEMO, out, *arguments)
    format = loading["experts"]
    assert (code, f"the experts of layers 0-2 in {format}" in text) == (0, True)
    want = logits(from_pretrained(DEMO, dtype="float32", **loading))
    forbid_quantising(monkeypatch)
    model = from_pretrained(out, experts="auto", dtype="float32")
    np.testing.assert_array_equal(logits(model), want)
    for name in ("config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (DEMO / name).read_bytes()
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "experts in layers 0-2" in text
    assert "experts 8" in text


def test_a_wrapper_loads_a_converted_directory(tmp_path):
    layers = convert_checkpoint(DEMO, tmp_path / "out", "int4")
    assert layers == {0: 8, 1: 8, 2: 8}
    sizes = {"num_experts": 8, "hidden_size": 128, "moe_intermediate_size": 64}
    options = {**sizes, "weights": False, "method": "AMXINT4", "layer_idx": 1}
    got = make(weight_path=str(tmp_path / "out"), cpu_save=True, **options)
    want = make(weight_path=str(DEMO), **options)
    order = [7, 6, 5, 4, 3, 2, 1, 1]
    for wrapper in (got, want):
        wrapper.load_weights(order)
    assert not got.saved_weights.exists(), "it is converted already"
    for a, b in zip(values(got), values(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("encoding", "format", "warns"),
    [
        (Encoding.of("rawint4"), "rawint4", False),
        (Encoding.of("rawint4"), "int4_kgroup", False),
        (Encoding.of("fp8_block"), "int8", True),
        (Encoding.of("int8"), "bf16", False),
    ],
)
def test_conversion_from_quantised_experts(tmp_path, encoding, format, warns, recwarn):
    path = tmp_path / "m.safetensors"
    save_file(path, expert_tensors(base(), encoding))
    steps = []
    convert_checkpoint(
        path, tmp_path / "out", format, on_progress=lambda *step: steps.append(step)
    )
    assert any("quantised again" in str(w.message) for w in recwarn) == warns
    stored = Checkpoint(path)
    total = sum(stored[name].nbytes for name in stored)
    assert steps[-1] == (total, total)
    weights = [
        read_experts(Checkpoint(p), 0, EXPERTS) for p in (path, tmp_path / "out")
    ]
    with (
        make_store(weights[0], [format], where="test") as want,
        make_store(weights[1], [format], where="test") as got,
    ):
        assert got.geometry == want.geometry
        for a, b in zip(got.dequantize(), want.dequantize(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_conversion_holds_one_layer_at_a_time(tmp_path):
    """Four layers of 6 MiB in bfloat16: as stacked, and as codes."""
    layers, tensors = 4, {}
    weights = matrices(8, 256, 512)
    for layer in range(layers):
        tensors |= expert_tensors(weights, Encoding.of("bf16"), layer)
    path = tmp_path / "m.safetensors"
    save_file(path, tensors)
    layer_bytes = sum(array.nbytes for array in tensors.values()) // layers
    assert layer_bytes == 6 << 20
    del tensors, weights
    tracemalloc.start()
    convert_checkpoint(path, tmp_path / "out", "int8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.6 * layer_bytes


def test_errors_of_conversion(tmp_path, capsys):
    dense = tmp_path / "dense.safetensors"
    save_file(dense, {"x": np.ones(3, np.float32)})
    bad = tmp_path / "bad.safetensors"
    gate, up, down = base()
    down[3, 2, 1] = np.inf
    save_file(bad, expert_tensors((gate, up, down), Encoding.of("bf16"), 4))
    out = tmp_path / "out"
    for arguments, words in (
        ((tmp_path / "no", out), "no: no such file or directory"),
        ((dense, out), "no layer has routed experts to convert"),
        ((bad, out), "convert: layer 4: down weights of expert 3: NaN or Inf in row 2"),
        ((DEMO, out, "--experts", "int3"), "format: expected one of ['bf16', 'int8'"),
        ((DEMO, out, "--group-size", "32"), "group_size: expected None"),
        ((DEMO, out, "--experts", "int4_kgroup"), "multiple of the group size 128"),
        ((DEMO, tmp_path), "exists already"),
    ):
        code, _, err = run(capsys, "convert", *arguments)
        assert (code, words in err) == (2, True), err
        assert not out.exists()
    assert not list(tmp_path.glob(".writing*"))


def test_other_files_and_tensors_are_copied(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "pytorch_model.bin").write_bytes(b"old")
    out = tmp_path / "out"
    convert_checkpoint(model, out, "int4")
    assert not (out / "pytorch_model.bin").exists()
    ours, theirs = Checkpoint(out), Checkpoint(model)
    rest = [name for name in theirs if ".mlp.experts." not in name]
    assert rest
    for name in rest:
        assert ours[name].tobytes() == theirs[name].tobytes()
    converted = set(ours) - set(rest)
    assert len(converted) == 3 * len(NAMES) * 2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ours)
