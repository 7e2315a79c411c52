"""GPTQ's and AWQ's checkpoints: exact values in stores, and errors that say why not."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_formats import NAMES
from gptq_cases import AWQ, GPTQ, Matrix, layer, tensors_of, write
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_support import Sizes, make, reference, tokens
from wrapper_support import assert_close, check_training

import ktjax
from ktjax import assets
from ktjax.io import Checkpoint, CheckpointError, read_experts
from ktjax.io.stored import read_dense
from ktjax.quant import Encoding, Quantized

LAYER = Sizes(3, 2, 128, 256)
EXPERTS = LAYER.experts
loaded, inputs = LAYER.load, LAYER.tokens
GROUPS = Encoding.of("int4_kgroup", 32, True)
AT = "model.layers.0.mlp.experts"


def read(path, order=None):
    return read_experts(Checkpoint(path), 0, EXPERTS, physical_to_logical_map=order)


def values_of(matrices, order=range(EXPERTS)):
    return [np.stack([experts[e].values() for e in order]) for experts in matrices]


def assert_values(weights, want):
    for got, value in zip(weights.dequantize(), want, strict=True):
        np.testing.assert_array_equal(got.astype(np.float32), value)


@pytest.mark.parametrize("order", [None, [2, 0, 0, 1]])
@pytest.mark.parametrize(
    ("group", "symmetric", "encoding"),
    [
        (32, False, GROUPS),
        (64, True, Encoding.of("int4_kgroup", 64)),
        (128, False, Encoding.of("int4_kgroup", 128, True)),
        (-1, True, Encoding.of("int4")),
        # Rows of 128 and 256 depths.
        (-1, False, Encoding.of("int4_kgroup", 128, True)),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_is_read_as_it_is(tmp_path, group, symmetric, encoding, version, order):
    matrices = layer(group, symmetric=symmetric)
    config = {**GPTQ, "group_size": group, "sym": symmetric}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    tensors = tensors_of(matrices, lambda m, at: m.gptq(at, version))
    weights = read(write(tmp_path, tensors, config), order)
    assert weights.encoding == encoding
    assert_values(weights, values_of(matrices, order or range(EXPERTS)))


@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq_is_read_as_it_is(tmp_path, group):
    matrices = layer(group)
    tensors = tensors_of(matrices, Matrix.awq)
    weights = read(write(tmp_path, tensors, AWQ))
    size = 128 if group == -1 else group
    assert weights.encoding == Encoding.of("int4_kgroup", size, True)
    assert_values(weights, values_of(matrices))


def test_wide_groups_are_several_with_one_scale(tmp_path):
    """Groups of 160 depths are five of 32; those of 192, three of 64."""
    for group, size in ((160, 32), (192, 64)):
        matrices = layer(group, hidden=group, inner=2 * group)
        weights = read(write(tmp_path, tensors_of(matrices)))
        assert weights.encoding == Encoding.of("int4_kgroup", size, True)
        assert_values(weights, values_of(matrices))


def test_zero_points_at_their_ends(tmp_path):
    """The first format stores 0 as a borrow from the next output's."""
    matrices = layer(64)
    for matrix in (m for experts in matrices for m in experts):
        matrix.zeros[:] = np.resize([0, 5, 0, 0, 1, 15, 0, 15, 0], matrix.zeros.shape)
    assert_values(read(write(tmp_path, tensors_of(matrices))), values_of(matrices))


def test_scales_of_every_kind_are_exact(tmp_path):
    matrices = layer(32)
    scales = matrices[0][0].scales
    # Denormal halves, the largest one, and zero.
    scales[:3, 0] = [2.0**-24, 65504, 0]
    path = write(tmp_path, tensors_of(matrices))
    assert_values(read(path), values_of(matrices))
    for dtype in (ml_dtypes.bfloat16, np.float32):
        for matrix in (m for experts in matrices for m in experts):
            matrix.scales = matrix.scales.astype(dtype)
        assert_values(read(write(tmp_path, tensors_of(matrices))), values_of(matrices))


def test_other_names_and_one_file(tmp_path):
    matrices = layer(32)
    tensors = tensors_of(
        matrices, folder="block_sparse_moe.experts", names=("w1", "w3", "w2")
    )
    path = write(tmp_path, tensors, {"bits": 4}, "quantize_config.json")
    assert_values(read(path / "model.safetensors"), values_of(matrices))


def test_g_idx_may_be_missing(tmp_path):
    matrices = layer(32)
    tensors = {k: v for k, v in tensors_of(matrices).items() if "g_idx" not in k}
    assert_values(read(write(tmp_path, tensors)), values_of(matrices))
    with pytest.raises(CheckpointError, match="act-order"):
        read(write(tmp_path, tensors, {**GPTQ, "desc_act": True}))


def test_an_order_that_is_none_is_read(tmp_path):
    matrices = layer(32)
    path = write(tmp_path, tensors_of(matrices), {**GPTQ, "desc_act": True})
    assert_values(read(path), values_of(matrices))


def test_dense_matrices(tmp_path):
    matrix = layer(64)[0][0]
    checkpoint = Checkpoint(write(tmp_path, matrix.gptq("a.q_proj")))
    np.testing.assert_array_equal(read_dense(checkpoint, "a.q_proj"), matrix.values())


def changed(tmp_path, quantization=GPTQ, pack=Matrix.gptq, **tensors):
    """A checkpoint with tensors of expert 1's up_proj changed, or left out."""
    kept = tensors_of(layer(32), pack)
    for name, change in tensors.items():
        key = f"{AT}.1.up_proj.{name}"
        kept[key] = change(kept[key])
        if kept[key] is None:
            del kept[key]
    return write(tmp_path, kept, quantization)


def permuted(g_idx):
    return g_idx[::-1].copy()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            CheckpointError,
            "desc_act = true, also called act-order",
            {"g_idx": permuted},
        ),
        (CheckpointError, "for each of 128 depths, got", {"g_idx": lambda a: a[1:]}),
        (
            CheckpointError,
            "groups of the same size for 128 depths, got 3",
            {"scales": lambda a: a[:3], "qzeros": lambda a: a[:3]},
        ),
        (CheckpointError, "expected int32 in 2", {"qweight": lambda a: a.view("u4")}),
        (CheckpointError, "expected int32 in 2", {"qzeros": lambda a: a[0]}),
        (CheckpointError, "in 2 dimensions, got float64", {"scales": np.float64}),
        (CheckpointError, "in 2 dimensions", {"scales": lambda a: a[:0]}),
        (CheckpointError, r"expected \[16, 255\]", {"scales": lambda a: a[:, 1:]}),
        (CheckpointError, r"expected \[4, 32\] in GPTQ", {"qzeros": lambda a: a[1:]}),
        (KeyError, "no tensor .*up_proj.scales", {"scales": lambda a: None}),
        (KeyError, "no tensor .*up_proj.qzeros", {"qzeros": lambda a: None}),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, error, message, changes):
    with pytest.raises(error, match=message):
        read(changed(tmp_path, **changes))


def test_groups_of_another_size(tmp_path):
    matrices = layer(64)
    matrices[1][1] = layer(32)[1][1]
    with pytest.raises(CheckpointError, match=r"multiple of 64 depths, .* got 32"):
        read(write(tmp_path, tensors_of(matrices)))
    # A last group that is shorter than the others looks like equal ones.
    short = {k: v for k, v in tensors_of(layer(64)).items() if "g_idx" not in k}
    path = write(tmp_path, short, {**GPTQ, "group_size": 96})
    with pytest.raises(CheckpointError, match=r"groups of 96 depths, .* got 2 for 128"):
        read(path)
    with pytest.raises(CheckpointError, match=r"multiple of 32 depths, .*\[16\]"):
        read(write(tmp_path, tensors_of(layer(16))))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "expected quantization_config in a config.json, or a quantize"),
        ({**GPTQ, "bits": 8}, "bits must be 4 for packed weights, got 8"),
        ({**GPTQ, "quant_method": "hqq"}, "must be 'gptq' or 'awq' .* got 'hqq'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'gptq' or 'gptq_v2' .* 'marlin'"),
        ({**GPTQ, "sym": "yes"}, "sym must be False or True .* got 'yes'"),
        ({**GPTQ, "desc_act": []}, r"desc_act must be .* got \[\]"),
        ({**AWQ, "version": "gemv"}, "version must be 'gemm' .* got 'gemv'"),
        (AWQ, r"expected \[16, 32\] in AWQ's layout"),
        ({**GPTQ, "sym": True}, "expected zero points of 8, since .* sym = true, got"),
        ("gptq", "quantization_config must be an object, got 'gptq'"),
    ],
)
def test_configurations_that_do_not_fit(tmp_path, quantization, message):
    with pytest.raises(CheckpointError, match=message):
        read(changed(tmp_path, quantization))


def test_symmetric_zeros_of_the_other_format(tmp_path):
    """What would be off by one everywhere is an error."""
    config = {**GPTQ, "sym": True, "checkpoint_format": "gptq_v2"}
    path = write(tmp_path, tensors_of(layer(32, symmetric=True)), config)
    with pytest.raises(CheckpointError, match=r"points of 8, .* got 7; correct sym or"):
        read(path)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_damaged_configurations(tmp_path, content):
    path = changed(tmp_path)
    (path / "config.json").write_text(content)
    message = "not valid JSON" if content == "{" else "expected a JSON object"
    with pytest.raises(CheckpointError, match=message):
        read(path)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]),
    at=st.integers(0, 2**20),
    value=st.integers(0, 255),
)
def test_any_bytes_are_numbers_or_an_error(tmp_path_factory, which, at, value):
    kept = tensors_of(layer(32, experts=1, hidden=32, inner=32))
    key = f"{AT}.0.down_proj.{which}"
    damaged = kept[key].copy()
    content = damaged.reshape(-1).view(np.uint8)
    content[at % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    write(path, {**kept, key: damaged})
    try:
        weights = read_experts(Checkpoint(path), 0, 1)
        store = ktjax.ExpertStore.from_arrays(
            *weights.arrays(),
            format="int4_kgroup",
            group_size=32,
            zero_point=True,
        )
    except ValueError as error:  # a CheckpointError is one
        assert "act-order" in str(error) or "scales: expected finite" in str(error)  # noqa: PT017
        return
    with store:
        for got, want in zip(store.dequantize(), weights.dequantize(), strict=True):
            np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("pack", [Matrix.gptq, Matrix.awq])
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (-1, True)])
def test_inference(tmp_path, pack, group, symmetric, recwarn):
    matrices = layer(group, symmetric=symmetric)
    config = {**GPTQ, "sym": symmetric} if pack is Matrix.gptq else AWQ
    path = write(tmp_path, tensors_of(matrices, pack), config)
    want = values_of(matrices)
    for compute, limit in (("bf16", 0.006), ("int8", 0.03)):
        wrapper = loaded(path, "GPTQ_INT4", compute=compute)
        for got, value in zip(wrapper._loaded().store.dequantize(), want, strict=True):
            np.testing.assert_array_equal(got, value)
        for count in (1, 33):
            x, ids, w = inputs(count)
            y = wrapper.forward(x, ids, w)
            assert_close(y, reference(x, ids, w, want), limit)
            np.testing.assert_array_equal(y, wrapper(*map(jnp.asarray, (x, ids, w))))
        wrapper.close()
    assert not recwarn


def test_training(tmp_path):
    matrices = layer(64)
    path = write(tmp_path, tensors_of(matrices))
    wrapper = loaded(path, "AMXINT4_KGroup_SFT", [1, 0, 2])
    assert wrapper._loaded().store.geometry[4:6] == (64, True)
    check_training(wrapper, *inputs(), values_of(matrices, [1, 0, 2]))


def test_arrays_say_their_format():
    wrapper = make("GPTQ_INT4", weights=False)
    x, ids, w = tokens()
    shapes = ((6, 256, 128), (6, 256, 128), (6, 128, 256))
    rng = np.random.default_rng(0)
    for format, zeros in (("int4", False), ("int4_kgroup", True)):
        options = {"group_size": 32, "zero_point": True} if zeros else {}
        arrays = [
            ktjax.quant.encode(rng.standard_normal(s, np.float32), format, **options)
            for s in shapes
        ]
        assert all(isinstance(a, Quantized) for a in arrays)
        wrapper.load_weights_from_arrays(*arrays)
        store = wrapper._loaded().store
        assert store.format == format
        assert_close(
            wrapper.forward(x, ids, w), reference(x, ids, w, store.dequantize()), 0.03
        )


def test_a_saved_layer_loads_again(tmp_path):
    path = write(tmp_path, tensors_of(layer(64)))
    first = loaded(path, "GPTQ_INT4", cpu_save=True)
    assert first.saved_weights.is_file()
    again = loaded(path, "GPTQ_INT4")
    for a, b in zip(
        *(s._loaded().store.dequantize() for s in (first, again)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_whole_model(tmp_path):
    """The demo model with every projection in GPTQ's layout."""
    source, rng = Checkpoint(assets.demo_model()), np.random.default_rng(0)
    tensors, matrices = {}, {}
    for name in source:
        at, tensor = name.removesuffix(".weight"), source[name]
        # As most of these checkpoints have what is not quantised.
        tensors[name] = tensor.astype(np.float16)
        if name.endswith("_proj.weight"):
            matrices[at] = Matrix(*tensors.pop(name).shape, 32, rng)
            tensors |= matrices[at].gptq(at)
    path = write(tmp_path / "model", tensors)
    config = json.loads((assets.demo_model() / "config.json").read_text())
    content = json.dumps({**config, "quantization_config": GPTQ})
    (path / "config.json").write_text(content)
    model = ktjax.models.from_pretrained(path, experts="auto", dense="xla")
    norm = np.asarray(model.norm.scale[...], np.float32)
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"].astype(np.float32))
    for index, moe in model.moe_layers():
        at = f"model.layers.{index}"
        query = model.layers[index].attention.q_proj.kernel[...]
        want = matrices[f"{at}.self_attn.q_proj"].values()
        np.testing.assert_array_equal(np.asarray(query, np.float32).T, want)
        assert moe.experts.store.geometry[4:6] == (32, True)
        got = moe.experts.store.dequantize()
        for name, values in zip(NAMES, got, strict=True):
            for expert, value in enumerate(values):
                want = matrices[f"{at}.mlp.experts.{expert}.{name}"].values()
                np.testing.assert_array_equal(value, want)
    model.close()
