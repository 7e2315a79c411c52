"""Every kernel on every storage format, against the reference on the stored values."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ISAS
from moe_cases import (
    Case,
    Inputs,
    assert_close,
    make_inputs,
    named_results,
    reference_on,
    run_kernels,
)
from quant_cases import QUANTIZED as ALL
from quant_cases import encoding_id, gaussian, options

import ktjax
from ktjax import backend
from ktjax.quant import Encoding

# Of the group sizes each once, with zero points and without; test_store_formats.py has
# the values of every combination.
QUANTIZED = [
    e
    for e in ALL
    if not e.spec.group_sizes
    or (e.group_size, e.zero_point) in ((32, False), (64, True), (128, False))
]
# Sizes that every group divides, and more than one panel of 64 outputs.
CASES = [
    Case(tokens=1, experts=8, k=8, rank=1, hidden=128, intermediate=128),
    Case(tokens=33, k=2, rank=16, hidden=256, intermediate=384),
    Case(
        tokens=110, experts=12, rank=5, hidden=128, intermediate=128, routing="ragged"
    ),
    Case(tokens=20, rank=8, hidden=128, intermediate=256, dtype="float32"),
    Case(tokens=20, rank=8, hidden=128, intermediate=256, dropout=0.3),
]
# Sizes that panels and tiles do not divide; by the depth that a format's groups need.
TAILS = {
    1: Case(tokens=21, k=3, rank=5, hidden=41, intermediate=75),
    32: Case(tokens=33, k=2, rank=4, hidden=96, intermediate=160),
    64: Case(tokens=33, k=2, rank=4, hidden=192, intermediate=320),
    128: Case(tokens=17, k=2, rank=4, hidden=384, intermediate=128),
}
ROUTED = Case(tokens=260, k=1, rank=8, hidden=128, intermediate=128, routing="one")
# compute="int8" exists for these.
INTEGER = [e for e in QUANTIZED if e.spec.int8_compute]


def tail(encoding: Encoding) -> Case:
    cut = encoding.spec.block_outputs > 1
    return TAILS[1 if cut else encoding.group_size or 1]


def store_of(case: Case, encoding: Encoding) -> ktjax.ExpertStore:
    return ktjax.ExpertStore.from_arrays(*make_inputs(case).base, **options(encoding))


def check(case: Case, encoding: Encoding, policy: str = "save") -> None:
    with store_of(case, encoding) as store:
        got = named_results(*run_kernels(case, store, policy))
        want = reference_on(case, store.dequantize())
    exact = case.dtype == case.lora_dtype == "float32"
    assert_close(got, want, "float32" if exact else "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_matches_reference(use_pool, encoding, case):
    use_pool()
    check(case, encoding)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_matches_reference_on_every_isa(use_pool, isa, encoding):
    use_pool(isa)
    check(CASES[1], encoding)
    check(tail(encoding), encoding)
    check(CASES[-1], encoding)


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_matches_reference_with_many_rows(use_pool, encoding):
    use_pool()
    check(ROUTED, encoding)


@pytest.mark.parametrize("subpools", [2, 3])
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_matches_reference_in_slices(use_pool, subpools, encoding):
    use_pool(threads=1, subpools=subpools)
    check(CASES[1], encoding)
    check(CASES[1], encoding, "recompute")


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_recomputed_activations_give_the_same_bits(use_pool, encoding):
    use_pool()
    for case in (CASES[1], tail(encoding), CASES[-1]):
        with store_of(case, encoding) as store:
            saved = run_kernels(case, store, "save")
            recomputed = run_kernels(case, store, "recompute")
        assert_same_bits(saved, recomputed)


@pytest.mark.parametrize("isa", ["", "amx_emulated"])
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_any_number_of_threads_gives_the_same_bits(use_pool, isa, encoding):
    results = []
    for threads in (1, 3):
        use_pool(isa, threads)
        with store_of(CASES[1], encoding) as store:
            results.append(jax.tree.map(np.array, run_kernels(CASES[1], store)))
    assert_same_bits(*results)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_a_store_of_values_gives_the_same_result(use_pool, encoding):
    """A bfloat16 store of the very same values, the format's decoding apart."""
    use_pool()
    case = CASES[1]
    with store_of(case, encoding) as store:
        got = named_results(*run_kernels(case, store))
        values = store.dequantize()
    with ktjax.ExpertStore.from_arrays(*values) as store:
        want = named_results(*run_kernels(case, store))
    assert_close(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_the_backward_uses_the_values_of_the_forward(use_pool, isa, encoding):
    """Not those of a second, transposed and quantised copy.

    Such a copy has scales along the other dimension, so it is off by about as much as
    the quantisation itself, 0.008 (INT8) to 0.13 of the result: more than a rounding.
    One token, one expert and an output gradient with a single nonzero value make the
    gradient of x, which is linear in the weights, show single weights.
    """
    use_pool(isa)
    base = [gaussian((1, 128, 128), seed, std=128**-0.5) for seed in range(3)]
    with ktjax.ExpertStore.from_arrays(*base, **options(encoding)) as store:
        gate, up, down = (w[0].astype(np.float64) for w in store.dequantize())
        ids, w = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.float32)
        x = jnp.asarray(gaussian((1, 128), 7))
        grad_y = jnp.zeros((1, 128)).at[0, 3].set(1.0)
        _, pullback = jax.vjp(lambda x: ktjax.moe(x, ids, w, store), x)
        (grad_x,) = pullback(grad_y)
    x64 = np.asarray(x, np.float64)[0]
    g, u = gate @ x64, up @ x64
    sigma = 1 / (1 + np.exp(-g))
    dh = down[3]
    dg, du = dh * u * sigma * (1 + g * (1 - sigma)), dh * g * sigma
    want = dg @ gate + du @ up
    # float32 activations: every rounding is one of 16 bits; see moe_cases.
    error = np.linalg.norm(np.asarray(grad_x)[0] - want) / np.linalg.norm(want)
    assert error <= 0.006 * 2**-8
    again = [
        ktjax.quant.encode(np.swapaxes(w, 1, 2), **options(encoding)) for w in base
    ]
    if encoding.spec.block_outputs > 1:
        return  # square blocks have the same scales in either direction
    transposed = [
        np.swapaxes(ktjax.quant.decode(q, encoding.format), 1, 2)[0] for q in again
    ]
    dh = transposed[2][3]
    dg, du = dh * u * sigma * (1 + g * (1 - sigma)), dh * g * sigma
    other = dg @ transposed[0] + du @ transposed[1]
    # The test can fail: that copy is farther off than the tolerance.
    assert np.linalg.norm(other - want) / np.linalg.norm(want) > 0.006


@functools.cache
def int8_case(tokens: int) -> Case:
    return Case(tokens=tokens, k=2, rank=8, hidden=256, intermediate=384)


def forward(case: Case, store, compute, inputs: Inputs | None = None):
    inputs = inputs or make_inputs(case)
    return ktjax.moe(
        inputs.x,
        inputs.ids,
        inputs.w,
        store,
        inputs.lora,
        scaling=case.scaling,
        compute=compute,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_int8_forward_is_near_the_reference(use_pool, isa, encoding):
    """Activations at 8 bits: their steps leave 0.008 at each of two products and more
    where a token has outliers; 0.03 is what is promised."""
    use_pool(isa)
    for tokens in (1, 5, 33, 70):
        case = int8_case(tokens)
        with store_of(case, encoding) as store:
            got = np.asarray(forward(case, store, "int8"), np.float64)
            plain = np.asarray(forward(case, store, "bf16"), np.float64)
            want = reference_on(case, store.dequantize())["y"]
        norm = np.linalg.norm(want)
        assert np.linalg.norm(got - want) / norm <= 0.03
        # It is another arithmetic: the attribute arrives.
        assert np.linalg.norm(got - plain) / norm >= 1e-3


@pytest.mark.parametrize("subpools", [2, 3])
@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_int8_forward_in_slices(use_pool, subpools, encoding):
    use_pool(threads=1, subpools=subpools)
    case = int8_case(33)
    with store_of(case, encoding) as store:
        got = np.asarray(forward(case, store, "int8"), np.float64)
        want = reference_on(case, store.dequantize())["y"]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 0.03


@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_int8_forward_of_tails(use_pool, encoding):
    use_pool()
    case = tail(encoding)
    with store_of(case, encoding) as store:
        got = np.asarray(forward(case, store, "int8"), np.float64)
        want = reference_on(case, store.dequantize())["y"]
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 0.03


@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_int8_recomputation_gives_the_same_bits(use_pool, encoding):
    use_pool()
    case = int8_case(33)
    with store_of(case, encoding) as store:
        saved = run_kernels(case, store, "save", compute="int8")
        recomputed = run_kernels(case, store, "recompute", compute="int8")
    assert_same_bits(saved, recomputed)


@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_int8_threads_and_batches_do_not_matter(use_pool, encoding):
    case = int8_case(70)
    inputs = make_inputs(case)
    results = []
    for threads in (1, 3):
        use_pool(threads=threads)
        with store_of(case, encoding) as store:
            results.append(np.array(forward(case, store, "int8")))
            few = inputs.first(9)
            part = np.array(forward(case, store, "int8", few))
        np.testing.assert_array_equal(part, results[-1][:9])
    np.testing.assert_array_equal(*results)


def test_default_policy_is_bfloat16(use_pool):
    use_pool()
    case = int8_case(33)
    with store_of(case, Encoding.of("int8")) as store:
        assert_same_bits(forward(case, store, None), forward(case, store, "bf16"))


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.parametrize("encoding", INTEGER, ids=encoding_id)
def test_the_registered_path_gives_the_same_bits(use_pool, encoding, compute):
    use_pool()
    case = int8_case(33)
    inputs = make_inputs(case)
    args = (inputs.x, inputs.ids, inputs.w)
    with store_of(case, encoding) as store:
        backend.register_lora(store, inputs.lora, case.scaling)
        got = backend.forward_registered(store, *args, compute=compute)
        np.testing.assert_array_equal(got, np.asarray(forward(case, store, compute)))


def test_policies_are_checked(use_pool):
    use_pool()
    case = int8_case(5)
    inputs = make_inputs(case)
    args = (inputs.x, inputs.ids, inputs.w)
    for encoding in QUANTIZED:
        with store_of(case, encoding) as store:
            if encoding.spec.int8_compute:
                forward(case, store, "int8")
                continue
            match = rf"moe: compute: 'int8' needs .* got '{encoding.format}'"
            with pytest.raises(ValueError, match=match):
                forward(case, store, "int8")
            with pytest.raises(ValueError, match="forward: compute: 'int8' needs"):
                backend.submit_forward_registered(store, *args, compute="int8")
    with store_of(case, Encoding.of("int8")) as store:
        with pytest.raises(ValueError, match=r"compute: expected one of .* got 'fp16'"):
            forward(case, store, "fp16")
        with pytest.raises(ValueError, match="got a bare handle"):
            forward(case, store.handle, "int8")
