"""Checkpoints of quantised experts: read as they are, or converted; never silently."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from checkpoint_formats import expert_tensors, matrices
from quant_cases import encode, encoding_id

from ktjax.experts_load import choose_encoding, make_store
from ktjax.io import Checkpoint, CheckpointError, load_experts, read_experts, save_file
from ktjax.io.stored import read_dense
from ktjax.quant import Encoding, decode

# Without zero points: compressed-tensors packs those in another layout.
STORED = [
    Encoding.of("int8"),
    Encoding.of("int4"),
    Encoding.of("int4_kgroup", 64),
    Encoding.of("fp8_block"),
    Encoding.of("fp8_channel"),
    Encoding.of("rawint4"),
    Encoding.of("mxfp4"),
    Encoding.of("mxfp8"),
]
AT = "model.layers.0.mlp.experts"


@pytest.fixture
def write(tmp_path):
    """`write(tensors)` makes a checkpoint of them."""
    numbers = itertools.count()

    def make(tensors):
        path = tmp_path / f"{next(numbers)}.safetensors"
        save_file(path, tensors)
        return Checkpoint(path)

    return make


def stored(encoding, write, weights=None):
    weights = matrices() if weights is None else weights
    return read_experts(write(expert_tensors(weights, encoding)), 0, len(weights[0]))


@pytest.mark.parametrize("encoding", STORED, ids=encoding_id)
@pytest.mark.parametrize("order", [None, [2, 0, 1, 1]])
def test_quantised_experts_are_read_as_they_are(write, encoding, order):
    weights = matrices()
    checkpoint = write(expert_tensors(weights, encoding))
    got = read_experts(checkpoint, 0, 3, physical_to_logical_map=order)
    slots = list(range(3)) if order is None else order
    assert got.encoding == encoding
    assert got.shape == (len(slots), 128, 64)
    for q, w in zip(got.arrays(), weights, strict=True):
        want = encode(w, encoding)
        for part, like in zip(q, want, strict=True):
            if like is None:
                assert part is None
                continue
            np.testing.assert_array_equal(
                part.view(np.uint8), like[slots].view(np.uint8)
            )
            assert part.dtype == like.dtype


@pytest.mark.parametrize("encoding", STORED, ids=encoding_id)
def test_load_experts_gives_the_exact_values(write, encoding):
    weights = matrices()
    got = load_experts(write(expert_tensors(weights, encoding)), 0, 3)
    for array, w in zip(got, weights, strict=True):
        assert array.dtype == ml_dtypes.bfloat16
        want = decode(encode(w, encoding), encoding.format)
        np.testing.assert_array_equal(array.astype(np.float32), want)


def test_scales_of_other_dtypes_are_kept_exactly(write):
    tensors = expert_tensors(matrices(), Encoding.of("fp8_block"))
    for key, dtype in itertools.product(tensors, (ml_dtypes.bfloat16, np.float16)):
        if key.endswith("scale_inv"):
            tensors[key] = tensors[key].astype(dtype)
    got = read_experts(write(tensors), 0, 3)
    assert got.gate.scales.dtype == np.float32
    want = tensors[f"{AT}.1.gate_proj.weight_scale_inv"].astype(np.float32)
    np.testing.assert_array_equal(got.gate.scales[1], want)


def test_scale_vectors_and_columns_are_the_same(write):
    tensors = expert_tensors(matrices(), Encoding.of("fp8_channel"))
    flat = {k: v[:, 0] if k.endswith("scale") else v for k, v in tensors.items()}
    for name in ("gate", "up", "down"):
        a, b = (getattr(read_experts(write(t), 0, 3), name) for t in (tensors, flat))
        np.testing.assert_array_equal(a.scales, b.scales)


def test_e8m0_scales_in_their_own_dtype(write):
    tensors = expert_tensors(matrices(), Encoding.of("mxfp8"))
    own = {
        key: t.view(ml_dtypes.float8_e8m0fnu) if key.endswith("scale") else t
        for key, t in tensors.items()
    }
    a, b = (read_experts(write(t), 0, 3).down for t in (tensors, own))
    assert b.scales.dtype == np.uint8
    np.testing.assert_array_equal(a.scales, b.scales)


def test_groups_of_32_with_float_scales(write):
    encoding = Encoding.of("int4_kgroup", 32)
    assert stored(encoding, write).encoding == encoding


def test_rows_as_long_as_a_group(write):
    """One scale a row in one matrix and two in the other: groups all the same."""
    encoding = Encoding.of("int4_kgroup", 64)
    got = stored(encoding, write, matrices(hidden=64, intermediate=128))
    assert got.encoding == encoding
    # Rows of different lengths with one scale each.
    assert stored(Encoding.of("int4"), write).encoding == Encoding.of("int4")


def test_dense_matrices(write):
    w = matrices()[0][0]
    q = encode(w, Encoding.of("fp8_block"))
    checkpoint = write(
        {"a.weight": q.values, "a.weight_scale_inv": q.scales, "b.weight": w}
    )
    np.testing.assert_array_equal(read_dense(checkpoint, "a"), decode(q, "fp8_block"))
    np.testing.assert_array_equal(read_dense(checkpoint, "b"), w)
    with pytest.raises(KeyError, match=r"no tensor 'c\.weight'"):
        read_dense(checkpoint, "c")


def refused(tensors, write, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        read_experts(write(tensors), 0, 3)


def test_damaged_checkpoints(write):
    fp8 = expert_tensors(matrices(), Encoding.of("fp8_block"))
    first = f"{AT}.0.gate_proj"
    scale = f"{first}.weight_scale_inv"
    refused({k: v for k, v in fp8.items() if k != scale}, write, "no tensor", KeyError)
    refused({**fp8, scale: fp8[scale][:, :0]}, write, "weight_scale_inv: expected a")
    refused(
        {**fp8, scale: fp8[scale].astype(np.float64)}, write, r"got float64\[1, 1\]"
    )
    gone = f"{AT}.2.up_proj.weight_scale_inv"
    refused({k: v for k, v in fp8.items() if k != gone}, write, "no tensor", KeyError)
    plain = {**fp8, f"{first}.weight": matrices()[0][0]}
    refused(plain, write, "expected one storage format")

    mx = expert_tensors(matrices(), Encoding.of("mxfp8"))
    scale = f"{first}.weight_scale"
    refused(
        {**mx, scale: mx[scale][:, :1]},
        write,
        r"or of 32 depths in E8M0, of .*\[128, 64\], got uint8\[128, 1\]",
    )
    refused(
        {**mx, f"{first}.weight": np.ones((128, 64), np.int8)},
        write,
        r"a scale for every row of int8\[128, 64\], got uint8\[128, 2\]",
    )

    packed = expert_tensors(matrices(), Encoding.of("rawint4"))
    refused(
        {**packed, f"{AT}.1.up_proj.weight_shape": np.array([128, 32])},
        write,
        r"weight_shape: expected \[128, 64\].*got \[128, 32\]",
    )
    refused(
        {**packed, f"{first}.weight_zero_point": np.zeros(3)}, write, "are not read"
    )
    refused(
        {**packed, f"{first}.weight_packed": np.zeros((128, 8), np.int64)},
        write,
        "expected int32 with float scales",
    )
    few = {
        key: value[:, ::2].copy() if key.endswith("gate_proj.weight_scale") else value
        for key, value in packed.items()
    }
    refused(few, write, r"got one for every \[32.0, 64.0\]")
    other = f"{AT}.2.down_proj.weight_scale"
    refused(
        {**packed, other: packed[other][:, :2]},
        write,
        rf"{other} is bfloat16\[64, 2\], expert 0 has bfloat16\[64, 4\]",
        ValueError,
    )


BF16, RAW, GROUPS = Encoding.of("bf16"), Encoding.of("rawint4"), "int4_kgroup"


@pytest.mark.parametrize(
    ("have", "formats", "options", "want"),
    [
        (BF16, ["int8"], {}, Encoding.of("int8")),
        (BF16, [GROUPS], {}, Encoding.of(GROUPS, 128)),
        (BF16, [GROUPS], {"zero_point": True}, Encoding.of(GROUPS, 128, True)),
        (BF16, ["fp8_block", "fp8_channel"], {}, Encoding.of("fp8_block")),
        (
            Encoding.of("fp8_channel"),
            ["fp8_block", "fp8_channel"],
            {},
            Encoding.of("fp8_channel"),
        ),
        (RAW, ["rawint4"], {}, RAW),
        (RAW, [GROUPS], {}, Encoding.of(GROUPS, 32)),
        (RAW, [GROUPS], {"group_size": 32}, Encoding.of(GROUPS, 32)),
        (RAW, [GROUPS], {"group_size": 64}, Encoding.of(GROUPS, 64)),
        (RAW, [GROUPS], {"zero_point": True}, Encoding.of(GROUPS, 128, True)),
        (Encoding.of(GROUPS, 64), [GROUPS], {}, Encoding.of(GROUPS, 64)),
        (Encoding.of(GROUPS, 64, True), [GROUPS], {}, Encoding.of(GROUPS, 64, True)),
        (Encoding.of(GROUPS, 32), ["rawint4"], {}, RAW),
        (RAW, ["int4"], {}, Encoding.of("int4")),
    ],
)
def test_choice_of_the_encoding(have, formats, options, want):
    assert choose_encoding(have, formats, **options, where="test") == want


def test_options_that_a_format_lacks():
    with pytest.raises(ValueError, match="test: group_size: expected None"):
        choose_encoding(BF16, ["int8"], 32, where="test")


@pytest.mark.parametrize("encoding", [BF16, *STORED], ids=encoding_id)
def test_a_store_of_the_stored_format(use_pool, write, encoding, recwarn):
    use_pool()
    weights = stored(encoding, write)
    with make_store(weights, [encoding.format], where="test") as store:
        assert store.format == encoding.format
        assert store.group_size == encoding.group_size
        for got, want in zip(store.dequantize(), weights.dequantize(), strict=True):
            np.testing.assert_array_equal(got, want.astype(np.float32))
    assert not recwarn


def test_compressed_tensors_in_groups_without_loss(use_pool, write, recwarn):
    use_pool()
    weights = stored(RAW, write)
    with make_store(weights, [GROUPS], where="test") as store:
        assert store.geometry[4:6] == (32, False)
        for got, want in zip(store.dequantize(), weights.dequantize(), strict=True):
            np.testing.assert_array_equal(got, want.astype(np.float32))
    assert not recwarn


def test_bfloat16_values_of_quantised_weights_are_exact(use_pool, write, recwarn):
    use_pool()
    weights = stored(Encoding.of("fp8_block"), write)
    with make_store(weights, ["bf16"], where="test") as store:
        for got, want in zip(store.dequantize(), weights.dequantize(), strict=True):
            np.testing.assert_array_equal(got, want.astype(np.float32))
    assert not recwarn


def test_a_second_quantisation_is_warned_of(use_pool, write):
    use_pool()
    weights = stored(Encoding.of("fp8_block"), write)
    with pytest.warns(UserWarning, match="as fp8_block are quantised again as int4"):
        store = make_store(weights, ["int4"], where="test")
    with store:
        for got, values in zip(store.dequantize(), weights.dequantize(), strict=True):
            want = decode(encode(values, Encoding.of("int4")), "int4")
            np.testing.assert_array_equal(got, want)
