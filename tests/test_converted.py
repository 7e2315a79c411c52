"""A layer of converted experts: written, read as it is, refused when damaged."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_formats import matrices
from quant_cases import ENCODINGS, encode, encoding_id, options

import ktjax
from ktjax.experts_load import encode_experts, make_store
from ktjax.io import Checkpoint, CheckpointError, read_experts, save_file
from ktjax.io.converted import layer_file, write_layer
from ktjax.io.experts import ExpertWeights, experts_of
from ktjax.quant import Encoding, Quantized

AT = "model.layers.0.mlp.experts"


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
