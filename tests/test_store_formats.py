"""Stores in every format: exact values, plain arrays, errors, memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ISAS
from moe_cases import Case, make_inputs, run_kernels
from quant_cases import ENCODINGS, QUANTIZED, encode, encoding_id, gaussian, options

import ktjax
from ktjax import quant
from ktjax.quant import Encoding, Quantized

make = ktjax.ExpertStore.from_arrays


def weights(experts=3, hidden=128, intermediate=256, dtype=np.float32):
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return [
        gaussian((experts, *shape), seed, std=0.1).astype(dtype)
        for seed, shape in enumerate(shapes)
    ]


def plain(encoding, base=None):
    return [encode(w, encoding) for w in base or weights()]


def assert_values(store, base, encoding):
    for got, w in zip(store.dequantize(), base, strict=True):
        q = encode(w, encoding)
        want = quant.decode(q, encoding.format, depth=w.shape[-1])
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_values_are_those_of_the_codec(use_pool, isa, encoding):
    use_pool(isa)
    base = weights()
    with make(*base, **options(encoding)) as store:
        assert_values(store, base, encoding)
        assert store.format == encoding.format
        assert store.group_size == encoding.group_size
        assert store.zero_point == encoding.zero_point
        assert store.geometry == (
            encoding.format,
            3,
            128,
            256,
            *encoding[1:],
            None,
            None,
        )


@pytest.mark.parametrize("subpools", [1, 2, 3])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=encoding_id)
def test_values_in_slices(use_pool, subpools, encoding):
    use_pool(threads=1, subpools=subpools)
    base = weights(dtype=ml_dtypes.bfloat16, hidden=128, intermediate=384)
    with make(*base, **options(encoding)) as store:
        assert_values(store, base, encoding)


ODD_SIZES = [(100, 72), (41, 75), (130, 70), (32, 300)]


@pytest.mark.parametrize("subpools", [1, 2])
@pytest.mark.parametrize("sizes", ODD_SIZES)
@pytest.mark.parametrize("name", ["int8", "int4", "fp8_channel"])
def test_values_of_odd_sizes(use_pool, subpools, sizes, name):
    use_pool(threads=1, subpools=subpools)
    base = weights(2, *sizes)
    with make(*base, format=name) as store:
        assert_values(store, base, Encoding.of(name))


@pytest.mark.parametrize("sizes", ODD_SIZES)
def test_values_of_blocks_of_odd_sizes(use_pool, sizes):
    use_pool()
    base = weights(2, *sizes)
    with make(*base, format="fp8_block") as store:
        assert_values(store, base, Encoding.of("fp8_block"))


def test_slices_hold_whole_groups(use_pool):
    use_pool(threads=1, subpools=2)
    base = weights(2, 32, 300)
    with make(*base, format="fp8_block") as store:
        assert_values(store, base, Encoding.of("fp8_block"))
    message = (
        "intermediate size of 96 cannot be split over 2 sub-pools in slices of 128"
    )
    with pytest.raises(ValueError, match=message):
        make(*weights(2, 32, 96), format="fp8_block")


@pytest.mark.parametrize("hidden", [32, 96, 160])
@pytest.mark.parametrize("name", ["int4_kgroup", "rawint4", "mxfp4", "mxfp8"])
def test_values_of_groups_beside_tiles(use_pool, hidden, name):
    use_pool()
    encoding = Encoding.of(name, 32)
    base = weights(2, hidden, 224)
    with make(*base, **options(encoding)) as store:
        assert_values(store, base, encoding)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_hostile_weights_have_the_values_of_the_codec(use_pool, encoding):
    use_pool()
    base = weights()
    tiny = np.float32(2.0**-126)
    for w in base:
        w[0, 0] = 0
        w[0, 1] = -0.0
        w[0, 2] *= tiny  # denormals
        w[0, 3] *= tiny * 1000
        w[0, 4] *= np.float32(2.0**-70)  # squares of errors are denormals
        w[0, 5] *= np.float32(2.0**100)
        w[0, 6] = np.abs(w[0, 6])
        w[0, 7] = np.float32(1)
        w[1] = 0
    with make(*base, **options(encoding)) as store:
        assert_values(store, base, encoding)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_ties_have_the_values_of_the_codec(use_pool, encoding):
    use_pool()
    # Multiples of halves and quarters of a step, with an amax that makes the step 1.
    rng = np.random.default_rng(0)
    amax = {"int8": 127, "fp8_block": 448, "fp8_channel": 448, "mxfp4": 6, "mxfp8": 448}
    top = amax.get(encoding.format, 7)
    base = [rng.integers(-4 * top, 4 * top, w.shape) / np.float32(4) for w in weights()]
    for w in base:
        w[..., ::32] = top
    base = [w.astype(np.float32) for w in base]
    with make(*base, **options(encoding)) as store:
        assert_values(store, base, encoding)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_quantised_arrays_are_kept(use_pool, encoding):
    use_pool(threads=1, subpools=2)
    base = weights()
    arrays = plain(encoding, base)
    with make(*arrays, format=encoding.format) as store:
        assert store.geometry[4:6] == encoding[1:]
        assert_values(store, base, encoding)
    # JAX arrays too, where JAX has the dtype.
    with make(*jax.tree.map(jnp.asarray, arrays), format=encoding.format) as store:
        assert_values(store, base, encoding)


def test_the_same_bits_in_another_dtype(use_pool):
    use_pool()
    base = weights()
    for name, change in (
        ("rawint4", lambda q: q._replace(values=q.values.view(np.int32))),
        ("int4", lambda q: q._replace(values=q.values.view(np.int32))),
        ("fp8_block", lambda q: q._replace(values=q.values.view(np.uint8))),
        ("mxfp4", lambda q: q._replace(scales=q.scales.view(ml_dtypes.float8_e8m0fnu))),
    ):
        encoding = Encoding.of(name)
        with make(*map(change, plain(encoding, base)), format=name) as store:
            assert_values(store, base, encoding)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_every_code(use_pool, encoding):
    """Codes that no encoder writes: -128, -8, denormals of E4M3, -0."""
    use_pool()
    arrays = plain(encoding)
    codes = np.arange(256, dtype=np.uint8)
    if encoding.spec.code == "e4m3":
        codes = codes[(codes & 0x7F) != 0x7F]
    for q in arrays:
        bits = q.values.view(np.uint8)
        bits[...] = np.resize(codes, bits.shape)
    with make(*arrays, format=encoding.format) as store:
        for got, q in zip(store.dequantize(), arrays, strict=True):
            np.testing.assert_array_equal(got, quant.decode(q, encoding.format))


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_scales_of_zero(use_pool, encoding):
    use_pool()
    arrays = plain(encoding)
    dtype = arrays[0].scales.dtype
    for q in arrays:
        q.scales[0] = 0
        if dtype != np.uint8:
            flat = q.scales[1].reshape(-1)
            flat[0], flat[-1] = -0.0, 2.0**-127
    with make(*arrays, format=encoding.format) as store:
        for got, q in zip(store.dequantize(), arrays, strict=True):
            assert not got[0].any()
            np.testing.assert_array_equal(got, quant.decode(q, encoding.format))


def changed(arrays, which, **parts):
    """The arrays with parts of one matrix replaced by what a function makes of them."""
    q = arrays[which]
    parts = {name: f(getattr(q, name)) for name, f in parts.items()}
    return [q._replace(**parts) if i == which else a for i, a in enumerate(arrays)]


def put(value):
    def change(array):
        array = array.copy()
        array[1].reshape(-1)[-1] = value
        return array

    return change


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_bad_scales(use_pool, encoding):
    use_pool()
    arrays = plain(encoding)
    bad = (np.nan, np.inf, -1.0) if encoding.spec.scale != "e8m0" else (0xFF,)
    for value in bad:
        with pytest.raises(ValueError, match=r"down: scales: .* expert 1"):
            make(*changed(arrays, 2, scales=put(value)), format=encoding.format)


def test_bad_codes(use_pool):
    use_pool()
    for name in ("fp8_block", "fp8_channel"):
        arrays = plain(Encoding.of(name))
        bad = changed(arrays, 0, values=put(np.nan))
        with pytest.raises(ValueError, match=r"gate: values: .* got NaN for expert 1"):
            make(*bad, format=name)
    arrays = plain(Encoding.of("int4_kgroup", 32, True))
    with pytest.raises(ValueError, match="up: zeros: expected 0 to 15, got 16"):
        make(*changed(arrays, 1, zeros=put(16)), format="int4_kgroup")


def test_bad_arrays(use_pool):
    use_pool()
    arrays = plain(Encoding.of("int8"))
    cases = [
        ({"values": lambda a: a[:, :9]}, ValueError, r"up: values: expected shape"),
        ({"values": lambda a: a[0]}, ValueError, r"up: values: expected 3 dimensions"),
        ({"values": lambda a: a[:2]}, ValueError, "up: "),
        ({"values": lambda a: a.view(np.uint8)}, TypeError, "expected int8, got uint8"),
        ({"scales": lambda a: a[:, :9]}, ValueError, r"up: scales: expected shape"),
        (
            {"scales": lambda a: a.astype(ml_dtypes.bfloat16)},
            TypeError,
            "up: scales: expected float32, got bfloat16",
        ),
        ({"zeros": lambda _: arrays[0].scales}, ValueError, "without zero points"),
    ]
    for parts, error, match in cases:
        with pytest.raises(error, match=match):
            make(*changed(arrays, 1, **parts), format="int8")
    with pytest.raises(TypeError, match=r"down: expected ktjax\.Quantized .* ndarray"):
        make(arrays[0], arrays[1], weights()[2], format="int8")
    with pytest.raises(ValueError, match="format 'bf16' has no scales"):
        make(*arrays)
    with pytest.raises(TypeError, match="values: expected uint8, got int8"):
        make(*arrays, format="int4")
    groups = plain(Encoding.of("int4_kgroup", 64))
    with pytest.raises(ValueError, match=r"scales: expected shape \(3, 256, 4\)"):
        make(*groups, format="int4_kgroup", group_size=32)
    with pytest.raises(ValueError, match=r"with zero points: expected .*'zeros'"):
        make(*groups, format="int4_kgroup", zero_point=True)
    sixteen = [q._replace(scales=np.repeat(q.scales, 4, -1)) for q in groups]
    with pytest.raises(ValueError, match=r"one of \[32, 64, 128\] .* got 16"):
        make(*sixteen, format="int4_kgroup")


def test_bad_options(use_pool):
    use_pool()
    base = weights(2, 96, 64)
    with pytest.raises(ValueError, match=r"group_size: expected None for .*'int8'"):
        make(*base, format="int8", group_size=32)
    with pytest.raises(ValueError, match="zero_point: format 'rawint4' has none"):
        make(*base, format="rawint4", zero_point=True)
    with pytest.raises(ValueError, match=r"hidden size: .* group size 64 .* got 96"):
        make(*base, format="int4_kgroup", group_size=64)
    with pytest.raises(ValueError, match=r"intermediate size: .* 32 .* got 40"):
        make(*weights(2, 96, 40), format="mxfp4")
    with pytest.raises(TypeError, match=r"go in as ktjax.Quantized"):
        make(*(w.astype(np.int8) for w in base), format="int8")


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_no_numbers(use_pool, encoding, bad):
    use_pool()
    base = weights()
    base[1][2, 5, 100] = bad
    with pytest.raises(ValueError, match=r"up.*2.*5"):  # matrix, expert and row
        make(*base, **options(encoding))


def test_zero_points_beyond_float32(use_pool):
    """As the codec: an error, and no weights that are NaN."""
    use_pool()
    base = weights()
    base[0][0, 0, :2] = 3e38, -3e38
    with pytest.raises(ValueError, match="gate"):
        make(*base, format="int4_kgroup", group_size=32, zero_point=True)


def _resident() -> int:
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) * 1024


@pytest.mark.parametrize(
    "encoding",
    [Encoding.of("int8"), Encoding.of("int4"), Encoding.of("rawint4")],
    ids=encoding_id,
)
def test_memory_is_that_of_the_format(use_pool, encoding):
    use_pool()
    # 24 to 48 MiB: far above the noise of the allocator.
    case = Case(tokens=64, experts=32, k=2, hidden=1024, intermediate=512, rank=4)
    base = [np.asarray(a) for a in make_inputs(case).base]
    format_bytes = sum(len(w) * encoding.nbytes(w.shape[1], w.shape[2]) for w in base)
    # The pool's threads, the encoder's scratch and a first compilation.
    with make(*(a[:1] for a in base), **options(encoding)):
        pass
    before = _resident()
    with make(*base, **options(encoding)) as store:
        assert store.nbytes <= 1.10 * format_bytes
        assert _resident() - before <= 1.10 * format_bytes
        jax.block_until_ready(run_kernels(case, store))
        after_one = _resident()
        # The values and their compilation, but no decoded copy of the weights.
        decoded = sum(w.nbytes for w in base)
        assert after_one - before <= 1.10 * format_bytes + 0.5 * decoded
        for _ in range(3):
            jax.block_until_ready(run_kernels(case, store))
        assert _resident() - after_one <= 0.10 * format_bytes


def test_plain_arrays_are_checked_in_pieces(monkeypatch):
    """However little is looked at at a time, the last row is seen."""
    from ktjax.quant import plain as module

    monkeypatch.setattr(module, "_CHUNK", 1)
    encoding = Encoding.of("fp8_channel")
    q = plain(encoding)[0]
    assert module.check_quantized(q, encoding, 256, 128, where="test")
    with pytest.raises(ValueError, match=r"test: scales: .* got -1.0 for expert 1"):
        module.check_quantized(
            q._replace(scales=put(-1)(q.scales)), encoding, 256, 128, where="test"
        )
    assert isinstance(q, Quantized)
