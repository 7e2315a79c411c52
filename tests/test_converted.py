"""Converted experts: written, read as they are, and refused when they are damaged."""

import json
import os
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checkpoint_formats import expert_tensors, matrices
from inference_support import EXPERTS, base, make, tokens, values
from quant_cases import ENCODINGS, encode, encoding_id, options

import ktjax
from ktjax import _native, assets, cli
from ktjax.experts_convert import convert_checkpoint
from ktjax.experts_load import encode_experts, make_store
from ktjax.io import Checkpoint, CheckpointError, read_experts, save_file
from ktjax.io.converted import NAMES, fingerprint, layer_file, write_layer
from ktjax.io.experts import ExpertWeights, experts_of
from ktjax.models import from_pretrained
from ktjax.quant import Encoding, Quantized

AT = "model.layers.0.mlp.experts"
DEMO = assets.demo_model()


def plain(encoding, weights=None):
    arrays = [encode(w, encoding) for w in weights or matrices()]
    return [a.values for a in arrays] if encoding.format == "bf16" else arrays


def write(tmp_path, encoding, weights=None, layer=0):
    path = tmp_path / layer_file(layer)
    names = write_layer(path, layer, encoding, plain(encoding, weights))
    assert sorted(names) == sorted(Checkpoint(path))
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_native_arrays_are_those_of_the_codec(encoding, dtype):
    weights = [w.astype(dtype) for w in matrices(3, 128, 384)]
    given = ExpertWeights(Encoding.of("bf16"), *weights)
    chosen = options(encoding)
    formats = [chosen.pop("format")]
    got = encode_experts(given, formats, **chosen, where="test")
    assert got.encoding == encoding
    for matrix, w in zip(got.arrays(), weights, strict=True):
        want = encode(w, encoding)
        have = matrix if isinstance(matrix, Quantized) else Quantized(matrix, None)
        for a, b in zip(have, want, strict=True):
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_encoding_refuses_what_a_store_refuses():
    gate, up, down = matrices()
    bad = up.copy()
    bad[1, 2, 3] = np.nan
    given = ExpertWeights(Encoding.of("bf16"), gate, bad, down)
    match = "here: up weights of expert 1: NaN or Inf in row 2"
    with pytest.raises(ValueError, match=match):
        encode_experts(given, ["int8"], where="here")
    given = ExpertWeights(Encoding.of("bf16"), gate, up, down.astype(np.float16))
    with pytest.raises(TypeError, match="here: down: expected float32 or bfloat16"):
        encode_experts(given, ["int8"], where="here")
    given = ExpertWeights(Encoding.of("bf16"), gate, up, down)
    with pytest.raises(ValueError, match="multiple of the group size 128"):
        encode_experts(given, ["int4_kgroup"], where="here")
    arrays = plain(Encoding.of("int8"))
    arrays[0] = arrays[0]._replace(scales=-arrays[0].scales)
    given = ExpertWeights(Encoding.of("int8"), *arrays)
    with pytest.raises(ValueError, match="here: gate: scales: expected finite"):
        encode_experts(given, ["int8"], where="here")


@pytest.mark.parametrize("order", [None, [2, 0, 0]])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_a_layer_is_read_as_it_was_written(tmp_path, encoding, order):
    weights = matrices(3, 128, 384)
    path = write(tmp_path, encoding, weights, layer=7)
    checkpoint = Checkpoint(path)
    assert experts_of(checkpoint) == {7: 3}
    got = read_experts(checkpoint, 7, 3, physical_to_logical_map=order)
    assert got.encoding == encoding
    for matrix, want in zip(got.arrays(), plain(encoding, weights), strict=True):
        have, like = (
            m if isinstance(m, Quantized) else Quantized(m, None)
            for m in (matrix, want)
        )
        for a, b in zip(have, like, strict=True):
            if b is None:
                continue
            b = b if order is None else b[order]
            assert a.dtype == b.dtype
            assert a.flags.aligned
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
            # A view of the mapping, unless experts were picked.
            assert a.flags.writeable == (order is not None)


@pytest.mark.parametrize("subpools", [1, 2, 3])
def test_any_number_of_sub_pools(tmp_path, use_pool, subpools):
    weights = matrices(3, 128, 384)
    encoding = Encoding.of("int4_kgroup", 64)
    path = write(tmp_path, encoding, weights)
    use_pool(threads=1, subpools=subpools)
    read = read_experts(Checkpoint(path), 0, 3)
    with make_store(read, ["int4_kgroup"], where="test") as store:
        for got, q in zip(store.dequantize(), plain(encoding, weights), strict=True):
            want = ktjax.quant.decode(q, "int4_kgroup")
            np.testing.assert_array_equal(got, want)


def rewrite(path, change, metadata=None):
    """The same file with other tensors or metadata."""
    file = Checkpoint(path).file_of(f"{AT}.gate_proj.values")
    tensors = {name: np.array(file[name]) for name in file.entries}
    facts = dict(file.metadata)
    change(tensors)
    facts.update(metadata or {})
    save_file(path, tensors, {k: v for k, v in facts.items() if v is not None})


def nothing(tensors):
    pass


def cut(name, index):
    def change(tensors):
        tensors[f"{AT}.{name}"] = tensors[f"{AT}.{name}"][index]

    return change


def cast(name, dtype):
    def change(tensors):
        tensors[f"{AT}.{name}"] = tensors[f"{AT}.{name}"].astype(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "metadata", "words"),
    [
        (nothing, {"ktjax_experts": "2"}, "expected version '1' .* got '2'"),
        (nothing, {"ktjax_experts": None}, "expected version '1' .* got None"),
        (nothing, {"encoding": "int3"}, "names no storage format .*got 'int3'"),
        (nothing, {"encoding": None}, "names no storage format .'encoding'"),
        (nothing, {"group_size": "-"}, "names no storage format"),
        (nothing, {"zero_point": "maybe"}, "names no storage format .'maybe'"),
        (
            nothing,
            {"encoding": "int4"},
            r"gate_proj.values: expected uint8\[3, 128, 32",
        ),
        (nothing, {"encoding": "fp8_channel"}, "expected float8_e4m3fn.* got int8"),
        (
            cut("gate_proj.values", slice(2)),
            None,
            r"gate_proj.values: expected \[3, outputs, depth\], got \[2, 128, 64\]",
        ),
        (
            cut("down_proj.values", 0),
            None,
            r"down_proj.values: expected \[3, outputs, depth\], got \[64, 128\]",
        ),
        (
            cut("up_proj.values", np.s_[:, :, :63]),
            None,
            r"up_proj.values: expected int8\[3, 128, 64\] in format 'int8', got "
            r"int8\[3, 128, 63\]",
        ),
        (
            cut("down_proj.scales", np.s_[:, 1:]),
            None,
            r"down_proj.scales: expected float32\[3, 64\] .* got float32\[3, 63\]",
        ),
        (
            cast("up_proj.scales", np.float64),
            None,
            r"up_proj.scales: expected float32\[3, 128\] .* got float64",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, metadata, words):
    path = write(tmp_path, Encoding.of("int8"))
    rewrite(path, change, metadata)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_experts(Checkpoint(path), 0, 3)
    assert str(path) in str(caught.value)


def test_damaged_files(tmp_path):
    path = write(tmp_path, Encoding.of("int8"))
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|reach past"):
            Checkpoint(path)
    path.write_bytes(whole)
    rewrite(path, lambda tensors: tensors.pop(f"{AT}.up_proj.scales"))
    with pytest.raises(KeyError, match=r"up_proj\.scales"):
        read_experts(Checkpoint(path), 0, 3)
    path = write(tmp_path, Encoding.of("int8"))
    rewrite(path, lambda t: t[f"{AT}.up_proj.scales"].fill(np.nan))
    read = read_experts(Checkpoint(path), 0, 3)
    with pytest.raises(ValueError, match="up: scales: expected finite numbers"):
        make_store(read, ["int8"], where="test")
    with pytest.raises(KeyError, match="layer 1 has no routed experts"):
        read_experts(Checkpoint(path), 1, 3)


def test_noise_never_gets_past_the_checks(tmp_path):
    """Flipped bytes: an error of a known kind, or weights that are finite numbers."""
    rng = np.random.default_rng(0)
    whole = write(tmp_path, Encoding.of("fp8_block")).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "noisy.safetensors"
    outcomes = set()
    for trial in range(300):
        content = bytearray(whole)
        for _ in range(1 + trial % 3):
            # Half of them in the header, half in scales and codes.
            first, last = ((0, header), (header, len(whole)))[trial % 2]
            content[rng.integers(first, last)] = rng.integers(256)
        if trial % 10 == 9:
            del content[rng.integers(len(whole)) :]
        path.write_bytes(content)
        try:
            read = read_experts(Checkpoint(path), 0, 3)
            with make_store(read, ["fp8_block"], where="noise") as store:
                assert all(np.isfinite(m).all() for m in store.dequantize())
            outcomes.add("loaded")
        except (ValueError, KeyError, TypeError) as error:
            outcomes.add(type(error))
    assert {"loaded", ValueError, CheckpointError, KeyError} <= outcomes


# ---- cpu_save ----


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


def forbid(monkeypatch, name="encode"):
    def fail(*args):
        raise AssertionError("weights were quantised")

    monkeypatch.setattr(_native, name, fail)


@pytest.mark.parametrize("method", ["AMXINT4", "RAWINT4", "FP8", "BF16"])
def test_saved_weights_are_used_by_the_next_start(checkpoint, method, monkeypatch):
    plain = load(checkpoint, method)
    assert not plain.saved_weights.exists()
    first = load(checkpoint, method, cpu_save=True)
    saved = first.saved_weights
    folder = f"ktjax-{first._formats[0]}"
    assert saved == checkpoint / folder / "experts-00002.safetensors"
    stamp = saved.stat().st_mtime_ns
    forbid(monkeypatch)
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
    forbid(monkeypatch)
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
    forbid(monkeypatch)
    for got in (wrapper, load(path, "FP8"), load(path, "FP8_PERCHANNEL")):
        assert got._loaded().store.format == "fp8_channel"
        want = [ktjax.quant.decode(encode(w, encoding), "fp8_channel") for w in base()]
        for a, b in zip(values(got), want, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- ktjax convert ----


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
    forbid(monkeypatch)
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
