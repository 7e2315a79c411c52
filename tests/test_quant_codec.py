"""The codecs: bits, rounding, packing, scales, hostile input, errors of weights."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from quant_cases import (
    ENCODINGS,
    QUANTIZED,
    encode,
    encoding_id,
    gaussian,
)

from ktjax import quant
from ktjax.quant import Encoding, Quantized, floats

TINY = np.float32(2.0**-126)
BF16 = Encoding.of("bf16")


def bfloat16_values(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def decode(q, encoding, depth=None):
    return quant.decode(q, encoding.format, depth=depth)


def test_small_float_codes_are_those_of_ml_dtypes():
    for values, dtype, count in (
        (floats.E4M3_VALUES, ml_dtypes.float8_e4m3fn, 256),
        (floats.E2M1_VALUES, ml_dtypes.float4_e2m1fn, 16),
    ):
        codes = np.arange(count, dtype=np.uint8)
        want = codes.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(values, want)
        np.testing.assert_array_equal(np.signbit(values), np.signbit(want))


@pytest.mark.parametrize("bits", [8, 4])
def test_small_floats_round_as_ml_dtypes(bits):
    convert, dtype, values = {
        8: (floats.to_e4m3, ml_dtypes.float8_e4m3fn, floats.E4M3_VALUES),
        4: (floats.to_e2m1, ml_dtypes.float4_e2m1fn, floats.E2M1_VALUES),
    }[bits]
    exact = np.sort(values[np.isfinite(values)])
    ties = (exact[1:] + exact[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(side)) for side in (-1e9, 1e9)]
    random = gaussian(4000, std=exact.max() / 3)
    x = np.concatenate([exact, ties, *beside, random]).astype(np.float32)
    x = np.clip(x, -exact.max(), exact.max())
    np.testing.assert_array_equal(convert(x), x.astype(dtype).view(np.uint8))


def test_small_floats_saturate():
    huge = np.array([460, 470, 1e9, np.inf], np.float32)
    assert (floats.to_e4m3(huge) == 0x7E).all()
    assert (floats.to_e4m3(-huge) == 0xFE).all()
    assert (floats.to_e2m1(huge) == 7).all()
    assert (floats.to_e2m1(-huge) == 15).all()


def test_e8m0_scales_are_those_of_ml_dtypes():
    codes = np.arange(1, 255, dtype=np.uint8)
    q = Quantized(np.full((254, 16), 0x22, np.uint8), codes[:, None])
    with np.errstate(over="ignore"):
        want = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(quant.decode(q, "mxfp4")[:, 0], want)
    # 2^-127 is a denormal.
    assert not quant.decode(Quantized(q.values[:1], codes[:1, None] * 0), "mxfp4").any()


def test_mxfp8_is_e4m3_times_powers_of_two():
    """Every code at every scale, by the dtypes of ml_dtypes."""
    finite = np.array([*range(0x7F), *range(0x80, 0xFF)], np.uint8)
    values = np.resize(finite, (254, 256)).view(ml_dtypes.float8_e4m3fn)
    scales = np.arange(1, 255, dtype=np.uint8).repeat(8).reshape(254, 8)
    got = quant.decode(Quantized(values, scales), "mxfp8")
    with np.errstate(over="ignore"):
        powers = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        want = values.astype(np.float64) * powers.repeat(32, axis=1)
        want = np.where(np.abs(want) < 2.0**-126, 0, want).astype(np.float32)
        np.testing.assert_array_equal(got, bfloat16_values(want))


def test_mxfp8_scales_follow_the_largest_of_32():
    w = np.zeros((1, 96), np.float32)
    w[0, :3] = [448, -3, 0.4]
    w[0, 32:34] = [500, -511]  # beyond 448: saturated, as the specification has it
    w[0, 64] = 2.0**-20
    q = quant.encode(w, "mxfp8")
    assert (q.scales.astype(int) - 127).tolist() == [[0, 0, -28]]
    got = q.values.astype(np.float32)
    assert got[0, [0, 1, 2, 32, 33, 64]].tolist() == [448, -3, 0.40625, 448, -448, 256]


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_plain_arrays(encoding):
    q = encode(gaussian((3, 130, 256)), encoding)
    expected = encoding.shapes(130, 256)
    arrays = {name: a for name, a in q._asdict().items() if a is not None}
    assert arrays.keys() == expected.keys()
    for name, (shape, dtype) in expected.items():
        assert arrays[name].shape == (3, *shape)
        assert arrays[name].dtype == dtype
    assert encoding.nbytes(130, 256) == sum(a.nbytes for a in arrays.values()) // 3


@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_leading_dimensions_and_chunks_do_not_matter(encoding, lead, monkeypatch):
    w = gaussian((*lead, 300, 128))
    whole = encode(w, encoding)
    values = decode(whole, encoding)
    assert values.shape == w.shape
    assert values.dtype == np.float32
    # Each value is a bfloat16 number.
    np.testing.assert_array_equal(values, bfloat16_values(values))
    monkeypatch.setattr(quant.codec, "_CHUNK", 1)
    for a, b in zip(whole, encode(w, encoding), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(values, decode(whole, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_bfloat16_and_float32_weights_give_the_same_codes(encoding):
    w = gaussian((64, 128)).astype(ml_dtypes.bfloat16)
    for a, b in zip(
        encode(w, encoding), encode(w.astype(np.float32), encoding), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_packing_has_the_even_depth_in_the_low_half():
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = [7, -7, 3, -8]
    rawint4 = quant.encode(w, "rawint4")
    # amax / 7 in bfloat16 is 1.140625.
    assert float(rawint4.scales[0, 0]) == 1.140625
    assert rawint4.values[0, :3].tolist() == [0x2E, 0x1B, 0x88]
    w[0, 3] = 0
    assert quant.encode(w, "rawint4").values[0, :3].tolist() == [0x1F, 0x8B, 0x88]
    w[0, :4] = [6, -0.5, 2, -3]
    mxfp4 = quant.encode(w, "mxfp4")
    assert mxfp4.scales[0, 0] == 127
    assert mxfp4.values[0, :3].tolist() == [0x97, 0xD4, 0x00]
    q = Quantized(np.array([[0x80]], np.uint8), np.ones(1, np.float32))
    assert quant.decode(q, "int4").tolist() == [[-8, 0]]


def test_an_odd_depth_is_padded_to_a_byte():
    w = gaussian((3, 7))
    q = quant.encode(w, "int4")
    assert q.values.shape == (3, 4)
    values = quant.decode(q, "int4", depth=7)
    assert values.shape == (3, 7)
    even = quant.decode(q, "int4")
    np.testing.assert_array_equal(even[:, :7], values)
    assert not even[:, 7].any()


def test_int8_rounds_ties_to_even():
    w = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32)
    q = quant.encode(w, "int8")
    assert q.scales.tolist() == [1]
    assert q.values.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_int4_takes_the_clip_of_least_error():
    w = gaussian((40, 96))
    q = quant.encode(w, "int4")
    amax = np.abs(w).max(1) / np.float32(7)

    def error(scales):
        codes = np.clip(np.rint(w / scales[:, None]), -7, 7)
        return ((w - codes * scales[:, None]).astype(np.float64) ** 2).sum(1)

    candidates = [amax * np.float32((32 - i) / 32) for i in range(20)]
    errors = np.stack([error(scales) for scales in candidates])
    # float32 sums of 96 squares: two candidates as near as that may change places.
    np.testing.assert_allclose(error(q.scales), errors.min(0), rtol=96 * 2**-24)
    assert (errors.argmin(0) > 0).any()
    for row, scale in enumerate(q.scales):
        assert scale in [candidate[row] for candidate in candidates]


def test_int4_prefers_the_widest_of_equal_clips():
    # Exact at the first clip; every other one has an error.
    w = np.tile(np.arange(-7, 8, dtype=np.float32), (1, 3))
    q = quant.encode(w, "int4")
    assert q.scales.tolist() == [1]
    np.testing.assert_array_equal(quant.decode(q, "int4", depth=45), w)
    # Squares that underflow are equal: all zero.
    assert quant.encode(w * TINY * 2, "int4").scales[0] == 2 * TINY


def test_zero_points_follow_the_range_of_a_group():
    w = gaussian((2, 64)) + np.float32(1)
    w[0, :32] = np.abs(w[0, :32])
    w[1, 32:] = -np.abs(w[1, 32:])
    q = quant.encode(w, "int4_kgroup", group_size=32, zero_point=True)
    assert q.zeros[0, 0] == 0
    assert q.zeros[1, 1] == 15
    step = np.repeat(q.scales, 32, axis=1)
    # Half a step of the code, half of the zero point, a bfloat16 rounding.
    error = np.abs(quant.decode(q, "int4_kgroup") - w)
    assert (error <= step + np.abs(w) * 2**-8).all()


def test_fp8_blocks_at_the_edges():
    w = gaussian((130, 200)) * np.float32(100)
    q = quant.encode(w, "fp8_block")
    for i, j in itertools.product(range(2), range(2)):
        block = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        assert q.scales[i, j] == np.abs(block).max() / np.float32(448)
        codes = (block / q.scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        got = q.values[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        np.testing.assert_array_equal(got.view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize("name", ["fp8_block", "fp8_channel", "mxfp4", "mxfp8"])
def test_representable_weights_are_exact(name):
    rng = np.random.default_rng(0)
    finite = np.array([*range(0x7F), *range(0x80, 0xFF)], np.uint8)
    largest = 448.0
    if name == "mxfp4":
        w = floats.E2M1_VALUES[rng.integers(0, 16, (64, 128))]
        largest = 6.0
    else:
        w = finite.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        w = w[rng.integers(0, len(w), (64, 128))]
    w[:, ::32] = largest
    w *= np.float32(2.0**-9)
    q = quant.encode(w, name)
    np.testing.assert_array_equal(quant.decode(q, name), w)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_zeros_and_denormals(encoding):
    w = np.zeros((2, 128), np.float32)
    w[1] = 2.0**-127
    w[1, 1] = -(2.0**-130)
    w[1, 2] = -0.0
    values = decode(encode(w, encoding), encoding)
    if encoding == BF16:  # kept as they are: nothing is computed
        return
    assert not values.any()
    q = encode(w, encoding)
    assert not (q.scales != (127 if encoding.spec.scale == "e8m0" else 0)).any()


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_the_smallest_and_the_largest_weights(encoding):
    w = gaussian((4, 128))
    w *= np.array([[2.0**-120], [2.0**-60], [2.0**60], [2.0**120]], np.float32)
    q = encode(w, encoding)
    assert np.isfinite(q.scales.astype(np.float32)).all()
    values = decode(q, encoding)
    assert np.isfinite(values).all()
    if encoding.format == "fp8_block":  # one scale for all: only the largest remain
        assert not values[:3].any()
        return
    # The error of a row does not depend on its magnitude.
    for row in range(1, 4):
        error = np.linalg.norm(values[row] / w[row].max() - w[row] / w[row].max())
        assert error / np.linalg.norm(w[row] / w[row].max()) < 0.2


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(encoding, bad):
    w = gaussian((2, 6, 128))
    w[1, 4, 100] = bad
    with pytest.raises(ValueError, match="matrix 1, row 4 has NaN or Inf"):
        encode(w, encoding)


def test_a_range_beyond_float32_is_an_error():
    w = np.full((1, 32), 3e38, np.float32)
    w[0, 0] = -3e38
    with pytest.raises(ValueError, match="range that float32 cannot hold"):
        quant.encode(w, "int4_kgroup", group_size=32, zero_point=True)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_scales_of_zero_make_zeros(encoding):
    q = encode(gaussian((2, 128)), encoding)
    # A denormal scale is no more than zero; E8M0 has only the byte 0.
    small = 0 if encoding.spec.scale == "e8m0" else 2.0**-127
    for scale in (0, small):
        zero = q._replace(scales=np.full_like(q.scales, scale))
        assert not decode(zero, encoding).any()


def test_encode_refuses():
    w = gaussian((2, 96))
    with pytest.raises(ValueError, match=r"expected one of .*'int8'.* got 'int7'"):
        quant.encode(w, "int7")
    with pytest.raises(TypeError, match="expected float32 or bfloat16, got float64"):
        quant.encode(w.astype(np.float64), "int8")
    with pytest.raises(ValueError, match=r"expected \[..., outputs, depth\]"):
        quant.encode(w[0], "int8")
    with pytest.raises(ValueError, match=r"with sizes > 0, got \(0, 96\)"):
        quant.encode(w[:0], "int8")
    with pytest.raises(ValueError, match=r"multiple of the group size 128 .* got 96"):
        quant.encode(w, "int4_kgroup")
    with pytest.raises(ValueError, match=r"multiple of the group size 32 .* got 40"):
        quant.encode(w[:, :40], "mxfp4")
    with pytest.raises(ValueError, match=r"one of \[32, 64, 128\] .* got 48"):
        quant.encode(w, "int4_kgroup", group_size=48)
    with pytest.raises(ValueError, match="expected None for format 'int8', got 32"):
        quant.encode(w, "int8", group_size=32)
    with pytest.raises(ValueError, match="zero_point: format 'int4' has none"):
        quant.encode(w, "int4", zero_point=True)


# Relative L2 errors of Gaussian weights, depth 2048. Uniform steps of s give
# s / sqrt(12): for int8, amax = 3.5 sigma over such a row and s = 3.5 / 127, 0.008. The
# best 15 uniform levels leave 0.11 (Max, 1960). E4M3 has 3 bits of mantissa: steps of
# 2^-3 of the power of two below, 0.026 on average; MXFP8 also saturates the largest of
# 32 where it is in the upper quarter of its binade, by up to an eighth.
LIMITS = {
    "bf16": 0.002,
    "int8": 0.01,
    "int4": 0.12,
    "int4_kgroup-32": 0.10,
    "int4_kgroup-64": 0.11,
    "int4_kgroup-128": 0.12,
    "int4_kgroup-32-zeros": 0.10,
    "int4_kgroup-64-zeros": 0.11,
    "int4_kgroup-128-zeros": 0.12,
    "fp8_block": 0.028,
    "fp8_channel": 0.028,
    "rawint4": 0.10,
    "mxfp4": 0.13,
    "mxfp8": 0.031,
}


@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_errors_of_gaussian_weights(encoding):
    w = gaussian((256, 2048), std=0.02)
    values = decode(encode(w, encoding), encoding)
    error = np.linalg.norm(values - w) / np.linalg.norm(w)
    assert error <= LIMITS[encoding_id(encoding)]
