"""Experts from GGUF files: every layout, and the wrappers that compute on them."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf_cases import BLOCKS, Tensor, tensor, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_support import Sizes, make, reference, tokens
from wrapper_support import assert_close, check_training

from benchmarks.blocks import random_blocks
from ktjax import quant
from ktjax.experts_load import make_store
from ktjax.io import CheckpointError, GGUFCheckpoint, read_gguf_experts, save_file
from ktjax.quant import Quantized

LAYER = Sizes(4, 3, 256, 512)
EXPERTS, _, HIDDEN, INNER = LAYER
loaded, inputs = LAYER.load, LAYER.tokens
# With activations in 8 bits, LLAMAFILE's default.
INT8_LIMIT = 0.03
SHAPES = {
    "gate": (EXPERTS, INNER, HIDDEN),
    "up": (EXPERTS, INNER, HIDDEN),
    "down": (EXPERTS, HIDDEN, INNER),
}


def matrix(name, format):
    """What a file holds of one matrix: blocks, or numbers of a dtype."""
    shape, seed = SHAPES[name], list(SHAPES).index(name)
    if format in BLOCKS:
        return random_blocks(format, shape, seed)
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (values * shape[-1] ** -0.5).astype(format)


def values_of(array, format):
    """The float32 values that the kernels use."""
    if format in BLOCKS:
        return quant.decode(Quantized(array), format)
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def layer(gate="q4_k", down="q6_k", layout="merged", index=0, up=None):
    """The tensors of a layer, and its values."""
    formats = {"gate": gate, "up": up or gate, "down": down}
    arrays = {name: matrix(name, format) for name, format in formats.items()}
    values = [values_of(arrays[name], formats[name]) for name in arrays]

    def stored(array, name):
        format = formats[name]
        return tensor(array, format if format in BLOCKS else None)

    at = f"blk.{index}.ffn"
    tensors = {}
    if layout == "gate_up":
        both = np.concatenate([arrays["gate"], arrays["up"]], axis=1)
        tensors[f"{at}_gate_up_exps.weight"] = stored(both, "gate")
        arrays = {"down": arrays["down"]}
    for name, array in arrays.items():
        if layout == "split":
            for expert, one in enumerate(array):
                tensors[f"{at}_{name}.{expert}.weight"] = stored(one, name)
        else:
            tensors[f"{at}_{name}_exps.weight"] = stored(array, name)
    return tensors, values


def write(tmp_path, *args, **options):
    tensors, values = layer(*args, **options)
    return write_gguf(tmp_path / "model.gguf", tensors), values


def read(path, order=None, experts=EXPERTS, index=0):
    return read_gguf_experts(
        GGUFCheckpoint(path), index, experts, physical_to_logical_map=order
    )


@pytest.mark.parametrize("layout", ["merged", "split", "gate_up"])
@pytest.mark.parametrize(
    ("gate", "down"),
    [
        ("q4_k", "q6_k"),
        ("q8_0", "q8_0"),
        ("iq4_xs", np.float16),
        (np.float32, "q5_k"),
        (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        (np.float16, np.float32),
    ],
)
def test_layouts_and_types(tmp_path, layout, gate, down):
    path, values = write(tmp_path, gate, down, layout)
    for order in (None, [2, 0, 3, 3]):
        weights = read(path, order)
        for got, want in zip(weights.dequantize(), values, strict=True):
            want = want if order is None else want[order]
            np.testing.assert_array_equal(got.astype(np.float32), want)
        encodings = [format if format in BLOCKS else "bf16" for format in (gate, down)]
        assert [weights.encodings[i].format for i in (0, 2)] == encodings


@pytest.mark.parametrize("layout", ["merged", "split"])
@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [("q4_k", "q6_k", "q5_k"), (np.float16, ml_dtypes.bfloat16, "q8_0")],
)
def test_types_of_gate_and_up_may_differ(tmp_path, layout, gate, up, down):
    path, values = write(tmp_path, gate, down, layout, up=up)
    for order in (None, [2, 0, 3, 3]):
        weights = read(path, order)
        for got, want in zip(weights.dequantize(), values, strict=True):
            want = want if order is None else want[order]
            np.testing.assert_array_equal(got.astype(np.float32), want)
    wrapper = loaded(path, "GGUF_SFT")
    store = store_of(wrapper)
    got = (store.format, store.up_format, store.down_format)
    assert got == tuple(f if f in BLOCKS else "bf16" for f in (gate, up, down))
    for array, value in zip(store.dequantize(), values, strict=True):
        np.testing.assert_array_equal(array, value)
    if gate in BLOCKS:
        check_training(wrapper, *inputs(), values)


def test_blocks_stay_in_the_file(tmp_path):
    path, _ = write(tmp_path, "q4_k", ml_dtypes.bfloat16)
    weights = read(path)
    for array in (weights.gate.values, weights.up.values, weights.down):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_layers_are_told_apart(tmp_path):
    tensors, _ = layer(index=7)
    path = write_gguf(tmp_path / "model.gguf", tensors)
    read(path, index=7)
    with pytest.raises(KeyError, match=r"layer 0 has no routed .* blk\.0\.ffn_gate_e"):
        read(path)


def changed(tmp_path, layout="merged", drop=(), **tensors):
    """A file with some tensors of the layer replaced or left out."""
    kept = {n: t for n, t in layer(layout=layout)[0].items() if n not in drop}
    names = {f"blk.0.ffn_{name}.weight": t for name, t in tensors.items()}
    return write_gguf(tmp_path / "model.gguf", kept | names)


def test_files_that_do_not_fit(tmp_path):
    def refused(error, message, experts=EXPERTS, **changes):
        with pytest.raises(error, match=message):
            read(changed(tmp_path, **changes), experts=experts)

    q4 = tensor(matrix("up", "q4_k"), "q4_k")
    refused(CheckpointError, r"expected \[5, outputs, depth\], got \[4, 512", 5)
    refused(KeyError, "no tensor .*ffn_up_exps", drop=["blk.0.ffn_up_exps.weight"])
    refused(KeyError, "no tensor .*ffn_down_exps", drop=["blk.0.ffn_down_exps.weight"])
    refused(CheckpointError, "ffn_down_exps.weight: expected experts of", down_exps=q4)
    f16 = tensor(matrix("up", np.float16))
    refused(CheckpointError, "is F16 and .* Q4_K: .* both be in bl", up_exps=f16)
    iq2 = Tensor(16, (EXPERTS, HIDDEN, INNER), bytes(EXPERTS * HIDDEN * 2 * 66))
    refused(CheckpointError, "down_exps.weight: experts of type IQ2_XXS", down_exps=iq2)
    odd = tensor(random_blocks("q4_k", (EXPERTS, 33, HIDDEN)), "q4_k")
    refused(CheckpointError, "outputs, an even number, got 33", gate_up_exps=odd)

    split = {"layout": "split"}
    one = tensor(random_blocks("q8_0", (INNER, HIDDEN)), "q8_0")
    missing = ["blk.0.ffn_up.2.weight"]
    refused(KeyError, r"no tensor 'blk\.0\.ffn_up\.2", drop=missing, **split)
    refused(CheckpointError, "expected Q4_K .* got Q8_0", **{"up.1": one}, **split)
    refused(CheckpointError, "expected 3 experts, there are more", 3, **split)
    with pytest.raises(ValueError, match=r"map must be within 0\.\.3"):
        read(changed(tmp_path), [4, 0, 0, 0])


def store_of(wrapper):
    return wrapper._loaded().store


@pytest.mark.parametrize("layout", ["merged", "split"])
def test_inference(tmp_path, layout):
    path, values = write(tmp_path, layout=layout)
    order = [1, 3, 0, 2]
    for chosen, where in ((None, path), (order, tmp_path)):
        wrapper = loaded(where, "LLAMAFILE", chosen)
        store = store_of(wrapper)
        assert (store.format, store.down_format) == ("q4_k", "q6_k")
        want = [v if chosen is None else v[chosen] for v in values]
        for got, value in zip(store.dequantize(), want, strict=True):
            np.testing.assert_array_equal(got, value)
        for count in (1, 2, 33):
            x, ids, w = inputs(count)
            y = wrapper.forward(x, ids, w)
            assert_close(y, reference(x, ids, w, want), INT8_LIMIT)
            np.testing.assert_array_equal(y, wrapper(*map(jnp.asarray, (x, ids, w))))
        wrapper.close()


def test_experts_on_an_accelerator(tmp_path):
    path, values = write(tmp_path)
    wrapper = loaded(path, "LLAMAFILE", num_gpu_experts=2)
    x, ids, w = inputs()
    y = wrapper.forward(x, ids, w)
    assert_close(y, reference(x, ids, w, values), INT8_LIMIT)
    exact = loaded(path, "LLAMAFILE", num_gpu_experts=2, compute="bf16")
    assert_close(exact.forward(x, ids, w), reference(x, ids, w, values))


def test_compute_is_the_layers_or_what_was_chosen(tmp_path):
    """Activations in 8 bits unless the user, or a matrix without integers, says no."""
    x, ids, w = inputs()
    path, values = write(tmp_path)
    wrapper = loaded(path, "LLAMAFILE")
    assert wrapper.compute == "int8"
    exact = loaded(path, "LLAMAFILE", compute="bf16")
    assert exact.compute == "bf16"
    assert_close(exact.forward(x, ids, w), reference(x, ids, w, values))
    path, values = write(tmp_path, "q4_k", ml_dtypes.bfloat16)
    for method in ("LLAMAFILE", "GGUF_SFT"):
        message = r"load_weights: layer 0: compute: 'int8' needs .* got 'bf16'"
        with pytest.raises(ValueError, match=message):
            loaded(path, method, compute="int8")
    wrapper = loaded(path, "LLAMAFILE")
    assert wrapper.compute == "bf16"
    assert_close(wrapper.forward(x, ids, w), reference(x, ids, w, values))


def test_training(tmp_path):
    path, values = write(tmp_path)
    wrapper = loaded(path, "GGUF_SFT")
    check_training(wrapper, *inputs(), values)


def test_a_method_of_another_format_quantises_again(tmp_path):
    path, values = write(tmp_path)
    with pytest.warns(UserWarning, match="stored as q4_k are quantised again as int8"):
        wrapper = loaded(path, "AMXINT8")
    for got, value in zip(store_of(wrapper).dequantize(), values, strict=True):
        want = quant.decode(quant.encode(value, "int8"), "int8")
        np.testing.assert_array_equal(got, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # bfloat16 holds the values exactly
        wrapper = loaded(path, "BF16")
    for got, value in zip(store_of(wrapper).dequantize(), values, strict=True):
        np.testing.assert_array_equal(got, value)


def test_what_was_saved_of_a_gguf_file_is_loaded(tmp_path):
    path, _ = write(tmp_path)
    with pytest.warns(UserWarning, match="quantised again"):
        first = loaded(path, "AMXINT8", cpu_save=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loaded(path, "AMXINT8")
        kept = loaded(path, "LLAMAFILE")
    for a, b in zip(*(store_of(s).dequantize() for s in (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert store_of(kept).format == "q4_k"


def test_half_of_a_mix_is_not_kept(tmp_path):
    """A store that takes one of the formats takes none as it is."""
    path, values = write(tmp_path, "q4_k", "q4_k", up="q6_k")
    with make_store(read(path), ["bf16"], where="test") as store:
        for got, value in zip(store.dequantize(), values, strict=True):
            np.testing.assert_array_equal(got, value)
    with (
        pytest.warns(UserWarning, match="stored as q4_k are quantised again as int8"),
        make_store(read(path), ["int8"], where="test") as store,
    ):
        assert {store.format, store.up_format, store.down_format} == {"int8"}
    for gate, down in (("q4_k", ml_dtypes.bfloat16), (np.float32, "q4_k")):
        path, values = write(tmp_path, gate, down)
        with make_store(read(path), ["bf16"], where="test") as store:
            assert (store.format, store.down_format) == ("bf16", "bf16")
            for got, value in zip(store.dequantize(), values, strict=True):
                np.testing.assert_array_equal(got, value)


def test_refusals(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(path, {"t": np.zeros(3, np.float32)})
    for method in ("LLAMAFILE", "GGUF_SFT"):
        with pytest.raises(ValueError, match=f"method '{method}' reads GGUF: .* got '"):
            loaded(path, method)
    with pytest.raises(FileNotFoundError, match="no such"):
        loaded(tmp_path / "no.gguf", "LLAMAFILE")
    path, _ = write(tmp_path)
    with pytest.raises(ValueError, match="gate of layer 0 must have shape"):
        loaded(path, "LLAMAFILE", moe_intermediate_size=256)
    with pytest.raises(KeyError, match="layer 3 has no routed experts"):
        loaded(path, "LLAMAFILE", layer_idx=3)
    wrapper = make("LLAMAFILE", weights=False, **LAYER.arguments())
    blocks = [Quantized(matrix(name, "q4_k")) for name in SHAPES]
    with pytest.raises(ValueError, match="do not say which format"):
        wrapper.load_weights_from_arrays(*blocks)


def test_float_arrays_stay_bfloat16():
    wrapper = make("LLAMAFILE")
    assert store_of(wrapper).format == "bf16"
    x, ids, w = tokens()
    base = store_of(wrapper).dequantize()
    assert_close(wrapper.forward(x, ids, w), reference(x, ids, w, base))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    format=st.sampled_from(list(BLOCKS)),
    damage=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=8),
)
def test_any_bytes_in_blocks_are_numbers_or_an_error(tmp_path_factory, format, damage):
    one = random_blocks(format, (1, 256, 256))
    content = np.tile(one.reshape(-1), 3)
    for at, value in damage:
        content[at % len(content)] = value
    names = [f"blk.0.ffn_{name}_exps.weight" for name in SHAPES]
    pieces = content.reshape(3, *one.shape)
    tensors = {n: tensor(p, format) for n, p in zip(names, pieces, strict=True)}
    path = write_gguf(tmp_path_factory.getbasetemp() / "damaged.gguf", tensors)
    weights = read(path, experts=1)
    try:
        store = make_store(weights, [format], where="test")
    except ValueError as error:
        assert "NaN or Inf as a scale" in str(error)  # noqa: PT017
        return
    with store:
        for got, piece in zip(store.dequantize(), pieces, strict=True):
            want = quant.decode(Quantized(piece), format)
            np.testing.assert_array_equal(got, want)
            assert np.isfinite(got).all()
