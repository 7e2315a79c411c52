"""`compute="int8"` on the formats of GGUF: activations in 8 bits, weights unrounded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ISAS
from gguf_cases import BLOCKS
from moe_cases import Case, make_inputs, named_results, reference_on, run_kernels
from test_gguf_formats import MIXES, blocks_of, make, store_of

import ktjax
from ktjax import quant

# Blocks that end within the 128 depths whose codes share a scale.
TAILS = Case(tokens=9, k=2, rank=4, hidden=96, intermediate=160)
CASE = Case(tokens=33, k=2, rank=8, hidden=256, intermediate=512)


def forward(case, store, compute="int8", tokens=None):
    inputs = make_inputs(case)
    if tokens is not None:
        inputs = inputs.first(tokens)
    y = ktjax.moe(
        *(inputs.x, inputs.ids, inputs.w, store, inputs.lora),
        scaling=case.scaling,
        compute=compute,
    )
    return np.asarray(y, np.float64)


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", BLOCKS)
def test_is_near_the_reference(use_pool, isa, format):
    use_pool(isa)
    for case in (CASE, TAILS):
        if TAILS is case and ktjax.quant.FORMATS[format].group > 32:
            continue
        with store_of(case, format) as store:
            want = reference_on(case, store.dequantize())["y"]
            for tokens in (1, 2, 7, case.tokens):
                got = forward(case, store, tokens=tokens)
                assert error(got, want[:tokens]) <= 0.03
            # It is another arithmetic: the attribute arrives.
            assert error(got, forward(case, store, "bf16")) >= 1e-3


@pytest.mark.parametrize("tokens", [16, 512])
def test_with_many_rows(use_pool, tokens):
    use_pool()
    case = Case(tokens=tokens, k=2, rank=8, hidden=256, intermediate=256)
    for format in ("q4_k", "q6_k", "q4_0"):
        with store_of(case, format) as store:
            want = reference_on(case, store.dequantize())["y"]
            assert error(forward(case, store), want) <= 0.03


def quantised(rows):
    """The numbers that rows of activations become: in 8 bits, 128 to a scale."""
    groups = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 128)))
    groups = groups.reshape(len(rows), -1, 128)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    codes = np.rint(groups / np.where(scale == 0, 1, scale))
    return (codes * scale).reshape(len(rows), -1)[:, : rows.shape[1]]


@pytest.mark.parametrize("isa", ISAS)
def test_products_are_exact_but_for_the_activations(use_pool, isa):
    """Against the same quantisation of x and h in float64, with unrounded weights.

    What is left is the rounding of float32 sums, 2^-24 a sub-block, and of h to two
    bfloat16 parts, 2^-17, after which one of its codes in thousands may be another:
    less than one a row, and 1e-3 of the row. So the median row shows the products.
    Weights that were rounded to bfloat16 would be off by 2^-9 / sqrt(3) = 1.1e-3 in
    every row, codes of a neighbour by more.
    """
    use_pool(isa)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((9, 256)).astype(np.float32)
    ids, w = jnp.zeros((9, 1), jnp.int32), jnp.ones((9, 1), jnp.float32)
    for formats in [(format,) * 3 for format in BLOCKS] + MIXES:
        gate_format, up_format, down_format = formats
        arrays = blocks_of(gate_format, down_format, experts=1, up=up_format)
        gate, up, down = (
            quant.dequantize_blocks(q.values[0], format).astype(np.float64)
            for q, format in zip(arrays, formats, strict=True)
        )
        options = {
            "format": gate_format,
            "up_format": up_format,
            "down_format": down_format,
        }
        with make(*arrays, **options) as store:
            got = np.asarray(
                ktjax.moe(jnp.asarray(x), ids, w, store, compute="int8"), np.float64
            )
        rows = quantised(x.astype(np.float64))
        g, u = rows @ gate.T, rows @ up.T
        h = quantised(g / (1 + np.exp(-g)) * u)
        errors = [error(*rows) for rows in zip(got, h @ down.T, strict=True)]
        assert np.median(errors) <= 2**-15, formats


@pytest.mark.parametrize("isa", ["", "amx_emulated", "portable"])
@pytest.mark.parametrize(("gate", "up", "down"), MIXES)
def test_mixed_formats(use_pool, isa, gate, up, down):
    use_pool(isa)
    with store_of(CASE, gate, down, up) as store:
        want = reference_on(CASE, store.dequantize())["y"]
        assert error(forward(CASE, store), want) <= 0.03


@pytest.mark.parametrize("format", ["q4_k", "q3_k", "q5_1"])
def test_threads_slices_and_batches_do_not_matter(use_pool, format):
    case = Case(tokens=70, k=2, rank=8, hidden=256, intermediate=512)
    results = []
    for threads in (1, 3):
        use_pool(threads=threads)
        with store_of(case, format) as store:
            results.append(forward(case, store))
            np.testing.assert_array_equal(
                forward(case, store, tokens=9), results[-1][:9]
            )
    np.testing.assert_array_equal(*results)
    use_pool(threads=1, subpools=2)
    with store_of(case, format) as store:
        # Slices are added in float32: the same but for that.
        assert error(forward(case, store), results[0]) <= 2**-8


def test_training_steps(use_pool):
    """The forward in int8; the backward's products are those of bfloat16."""
    use_pool()
    with store_of(CASE, "q4_k", "q6_k") as store:
        saved = run_kernels(CASE, store, "save", compute="int8")
        recomputed = run_kernels(CASE, store, "recompute", compute="int8")
        want = reference_on(CASE, store.dequantize())
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Kept values, h among them, are those of the forward.
    for name, value in named_results(*saved).items():
        assert error(np.asarray(value, np.float64), want[name]) <= 0.03, name


def test_every_matrix_must_have_integers(use_pool):
    use_pool()
    sizes = (CASE.experts, CASE.hidden, CASE.intermediate)
    gate, up, _ = blocks_of("q4_k", None, *sizes)
    values = make_inputs(CASE).base[2]
    with (
        make(gate, up, values, format="q4_k", down_format="bf16") as store,
        pytest.raises(ValueError, match=r"moe: compute: 'int8' needs .* got 'bf16'"),
    ):
        forward(CASE, store)
