"""The formats of GGUF: the gguf package's values to the last bit, in every kernel."""

from __future__ import annotations

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import ISAS
from gguf_cases import BLOCKS, halves
from moe_cases import (
    Case,
    assert_close,
    make_inputs,
    named_results,
    reference_on,
    run_kernels,
)

import ktjax
from benchmarks.blocks import random_blocks, with_halves
from ktjax import quant
from ktjax.quant import FORMATS, Quantized

make = ktjax.ExpertStore.from_arrays
# Two formats, for what does not depend on which: with blocks of 32 and of 256.
FEW = ["q5_0", "q4_k"]


def shapes(experts, hidden, intermediate):
    wide = (experts, intermediate, hidden)
    return wide, wide, (experts, hidden, intermediate)


def blocks_of(format, down=None, experts=3, hidden=256, intermediate=512, up=None):
    """gate, up and down in their blocks."""
    formats = (format, up or format, down or format)
    sizes = shapes(experts, hidden, intermediate)
    return [
        Quantized(random_blocks(name, shape, seed))
        for seed, (name, shape) in enumerate(zip(formats, sizes, strict=True))
    ]


def any_blocks(format, rows, depth, seed=0):
    """Any bytes, but finite scales: denormal, zero, -0 and the largest among them."""
    spec, rng = FORMATS[format], np.random.default_rng(seed)
    count = rows * depth // spec.group
    blocks = rng.integers(0, 256, (count, spec.block_bytes), dtype=np.uint8)
    values = []
    for half in halves(blocks, format):
        half = np.where(np.isfinite(half), half, np.float16(65504))
        half[:4] = [0, -0.0, 2**-24, -65504]
        values.append(half)
    return with_halves(blocks, format, values).reshape(rows, -1)


def bits(array):
    return np.ascontiguousarray(array).view(np.uint32)


@pytest.mark.parametrize("format", BLOCKS)
def test_values_are_those_of_the_gguf_package(format):
    gguf = pytest.importorskip("gguf")
    type = gguf.GGMLQuantizationType(BLOCKS[format])
    assert type.name.lower() == format
    block, size = gguf.GGML_QUANT_SIZES[type]
    assert (FORMATS[format].group, FORMATS[format].block_bytes) == (block, size)
    blocks = any_blocks(format, 40, 1024)
    got = quant.dequantize_blocks(blocks, format)
    np.testing.assert_array_equal(bits(got), bits(gguf.quants.dequantize(blocks, type)))
    # NaN and Inf come through.
    bad = with_halves(
        blocks.reshape(-1, size)[:2],
        format,
        [[np.nan, np.inf]] * len(halves(blocks, format)),
    )
    got = quant.dequantize_blocks(bad, format)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got, gguf.quants.dequantize(bad, type))
    assert not np.isfinite(got).any(axis=1).all()


def assert_values(store, arrays, formats):
    """To the bit, signs of zeros included."""
    for got, q, format in zip(store.dequantize(), arrays, formats, strict=True):
        want = quant.dequantize_blocks(q.values, format)
        want = want.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(bits(got), bits(want))
        np.testing.assert_array_equal(bits(quant.decode(q, format)), bits(want))


@pytest.mark.parametrize("isa", ISAS)
def test_stores_have_these_values_rounded_once(use_pool, isa):
    use_pool(isa)
    for format in BLOCKS:
        arrays = [
            Quantized(any_blocks(format, outputs, depth, seed)[None])
            for seed, (_, outputs, depth) in enumerate(shapes(1, 256, 512))
        ]
        with make(*arrays, format=format) as store:
            assert_values(store, arrays, [format] * 3)
            group = FORMATS[format].group
            assert store.geometry == (format, 1, 256, 512, group, False, None, None)


@pytest.mark.parametrize("subpools", [2, 3])
@pytest.mark.parametrize("format", FEW)
def test_values_in_slices(use_pool, subpools, format):
    use_pool(threads=1, subpools=subpools)
    arrays = blocks_of(format, intermediate=1280)
    with make(*arrays, format=format) as store:
        assert_values(store, arrays, [format] * 3)


@pytest.mark.parametrize("hidden", [32, 96, 160])
def test_values_beside_tiles(use_pool, hidden):
    use_pool()
    arrays = blocks_of("q8_0", hidden=hidden, intermediate=224)
    with make(*arrays, format="q8_0") as store:
        assert_values(store, arrays, ["q8_0"] * 3)


def test_formats_mix(use_pool):
    use_pool(threads=1, subpools=2)
    for format, down in (("q4_k", "q6_k"), ("q4_k", "q8_0"), ("iq4_nl", "q2_k")):
        arrays = blocks_of(format, down)
        with make(*arrays, format=format, down_format=down) as store:
            assert_values(store, arrays, [format, format, down])
            assert (store.format, store.down_format) == (format, down)
    gate, up, down = blocks_of("q4_k")
    values = quant.decode(down, "q4_k")
    with make(gate, up, values, format="q4_k", down_format="bf16") as store:
        np.testing.assert_array_equal(store.dequantize()[2], values)
    values = [quant.decode(q, "q4_k") for q in (gate, up)]
    with make(*values, down, format="bf16", down_format="q4_k") as store:
        np.testing.assert_array_equal(store.dequantize()[0], values[0])
    # Down's slices alone must hold whole blocks.
    few = blocks_of("q4_k", "q8_0", intermediate=192)
    with make(*few, format="q4_k", down_format="q8_0") as store:
        assert_values(store, few, ["q4_k", "q4_k", "q8_0"])


# gate, up and down: 8 and 4 bits, minima and none, tables, halves for 32 and for 256.
MIXES = [
    ("q4_k", "q6_k", "q5_k"),
    ("q8_0", "q4_0", "q8_0"),
    ("iq4_nl", "q5_1", "q4_1"),
    ("q2_k", "q3_k", "q2_k"),
    ("q6_k", "iq4_xs", "q6_k"),
]


@pytest.mark.parametrize("isa", ISAS)
def test_gate_and_up_mix(use_pool, isa):
    use_pool(isa, threads=1, subpools=2)
    for gate, up, down in MIXES:
        arrays = blocks_of(gate, down, up=up)
        options = {"format": gate, "up_format": up, "down_format": down}
        with make(*arrays, **options) as store:
            assert_values(store, arrays, [gate, up, down])
            assert (store.up_format, store.down_format) == (up, down)
            size = sum(q.values.nbytes for q in arrays)
            assert size <= store.nbytes <= 1.10 * size, (gate, up, down)
    arrays = blocks_of("q8_0", "q5_0", up="q4_0", hidden=96, intermediate=160)
    options = {"format": "q8_0", "up_format": "q4_0", "down_format": "q5_0"}
    with make(*arrays, **options) as store:
        assert_values(store, arrays, ["q8_0", "q4_0", "q5_0"])


@pytest.mark.parametrize(("gate", "up", "down"), MIXES[:2])
def test_mixes_match_the_reference(use_pool, gate, up, down):
    use_pool()
    for case in CASES:
        check(case, gate, down, up=up)


@pytest.mark.parametrize("isa", ISAS)
def test_a_mix_matches_the_reference_on_every_isa(use_pool, isa):
    use_pool(isa, threads=1, subpools=2)
    check(CASES[1], "q4_k", "q5_k", "recompute", up="q6_k")


def test_memory_is_that_of_the_blocks(use_pool):
    use_pool()
    for format in BLOCKS:
        # At a depth of 512 a panel's distance to the next weighs most.
        arrays = blocks_of(format, hidden=512)
        size = sum(q.values.nbytes for q in arrays)
        with make(*arrays, format=format) as store:
            assert size <= store.nbytes <= 1.10 * size, format


CASES = [
    Case(tokens=1, experts=8, k=8, rank=16, hidden=256, intermediate=256),
    Case(tokens=33, k=2, rank=16, hidden=256, intermediate=512),
    Case(tokens=20, rank=8, hidden=256, intermediate=256, dtype="float32"),
    Case(tokens=260, k=1, rank=8, hidden=256, intermediate=256, routing="one"),
]


def store_of(case, format, down=None, up=None):
    sizes = (case.experts, case.hidden, case.intermediate)
    arrays = blocks_of(format, down, *sizes, up=up)
    return make(*arrays, format=format, up_format=up, down_format=down)


def check(case, format, down=None, policy="save", up=None):
    with store_of(case, format, down, up) as store:
        got = named_results(*run_kernels(case, store, policy))
        want = reference_on(case, store.dequantize())
    exact = case.dtype == case.lora_dtype == "float32"
    assert_close(got, want, "float32" if exact else "bfloat16")


@pytest.mark.parametrize("format", BLOCKS)
def test_matches_reference(use_pool, format):
    """The output and every gradient; down in another format, which is its neighbour."""
    use_pool()
    down = list(BLOCKS)[list(BLOCKS).index(format) - 1]
    for case in CASES:
        check(case, format, down)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FEW)
def test_matches_reference_on_every_isa(use_pool, isa, format):
    use_pool(isa)
    check(CASES[1], format, "q6_k")


@pytest.mark.parametrize("down", ["q6_k", "bf16"])
def test_slices_and_recomputation(use_pool, down):
    use_pool(threads=1, subpools=2)
    case = CASES[1]
    gate, up, other = blocks_of(
        "q4_k", None, case.experts, case.hidden, case.intermediate
    )
    last = make_inputs(case).base[2] if down == "bf16" else other
    down = "bf16" if down == "bf16" else "q4_k"
    with make(gate, up, last, format="q4_k", down_format=down) as store:
        saved = run_kernels(case, store, "save")
        recomputed = run_kernels(case, store, "recompute")
        want = reference_on(case, store.dequantize())
    assert_close(named_results(*saved), want)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_threads_do_not_matter(use_pool):
    results = []
    for threads in (1, 3):
        use_pool(threads=threads)
        with store_of(CASES[1], "q4_k", "q6_k") as store:
            results.append(jax.tree.map(np.array, run_kernels(CASES[1], store)))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_bad_scales(use_pool):
    use_pool()
    for format, value in zip(BLOCKS, itertools.cycle([np.nan, np.inf, -np.inf])):
        size = FORMATS[format].block_bytes
        gate, up, down = blocks_of(format)
        flat = down.values.reshape(-1, size)
        message = (
            f"down weights of expert 1 in {format}: NaN or Inf as a scale of block 1 "
            "of row 5"
        )
        for which in range(len(halves(flat, format))):
            values = halves(flat, format)
            values[which][(256 + 5) * (512 // FORMATS[format].group) + 1] = value
            bad = with_halves(flat, format, values).reshape(down.values.shape)
            with pytest.raises(ValueError, match=message):
                make(gate, up, Quantized(bad), format=format)


def test_bad_arrays(use_pool):
    use_pool()
    gate, up, down = arrays = blocks_of("q4_k")

    def other(change, scales=None):
        return gate, Quantized(change(up.values), scales), down

    floats = np.zeros((3, 512, 256), np.float32)
    cases = [
        (
            other(lambda a: a[:, :9]),
            {},
            ValueError,
            r"up: expected shape \(3, 512, 144",
        ),
        (other(lambda a: a[:2]), {}, ValueError, "up: expected shape .* for 3 experts"),
        (other(lambda a: a[0]), {}, ValueError, "up: expected 3 dimensions"),
        (
            other(lambda a: a.view(np.int8)),
            {},
            TypeError,
            "up: expected uint8, got int8",
        ),
        (other(lambda a: a, floats), {}, ValueError, "up: .* has its scales in the"),
        (
            (gate, floats, down),
            {},
            TypeError,
            r"up: expected ktjax\.Quantized .*ndarray",
        ),
        ((gate, up, floats), {}, TypeError, r"down: expected ktjax\.Quantized"),
        (arrays, {"down_format": "bf16"}, TypeError, "down: expected arrays in format"),
        (arrays, {"down_format": "int8"}, ValueError, "down_format: .* mixed among"),
        (arrays, {"down_format": "q9"}, ValueError, "down_format: .* mixed among"),
        (arrays, {"up_format": "bf16"}, ValueError, "up_format: .* got 'bf16'"),
        (arrays, {"up_format": "int8"}, ValueError, "up_format: .* got 'int8'"),
        (arrays, {"up_format": "q6_k"}, ValueError, "up: expected shape .*'q6_k'"),
        (arrays, {"group_size": 32}, ValueError, r"expected one of \[256\]"),
        (
            arrays,
            {"zero_point": True},
            ValueError,
            "zero_point: format 'q4_k' has none",
        ),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            make(*given, **{"format": "q4_k", **options})
    short = blocks_of("q8_0", hidden=288)
    with pytest.raises(
        ValueError, match=r"gate: depth: expected a multiple .* 256 .* 288"
    ):
        make(*short, format="q4_k")
    with pytest.raises(ValueError, match="format: formats can only be mixed"):
        make(floats, floats, down, format="int8", down_format="q4_k")
    with pytest.raises(ValueError, match=r"format: formats can only .* got 'bf16'"):
        make(floats, up, down, format="bf16", up_format="q4_k")


def test_nothing_is_quantised_to_them(use_pool):
    use_pool()
    with pytest.raises(ValueError, match="encode: format: 'q4_k' is read from GGUF"):
        quant.encode(np.zeros((4, 256), np.float32), "q4_k")
    floats = [np.zeros(shape, np.float32) for shape in shapes(1, 256, 256)]
    with pytest.raises(TypeError, match=r"gate: expected ktjax\.Quantized"):
        make(*floats, format="q4_k")


def test_dequantize_blocks_refuses():
    row = np.zeros((3, 144), np.uint8)
    with pytest.raises(ValueError, match=r"expected one of \['q4_0', .* got 'int8'"):
        quant.dequantize_blocks(row, "int8")
    with pytest.raises(ValueError, match="whole q4_k blocks of 144 bytes, got shape"):
        quant.dequantize_blocks(row[:, :143], "q4_k")
    with pytest.raises(TypeError, match="expected uint8, got int8"):
        quant.dequantize_blocks(row.view(np.int8), "q4_k")
