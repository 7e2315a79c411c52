"""Dropout of the adapters' inputs: the masks, and `ktjax.moe` with them.

That the kernels compute with the masks of the reference, in every pass and on every
instruction set, is tested where the kernels are: cases with `dropout` in
test_moe_accuracy.py, test_moe_formats.py and test_moe_determinism.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import SEED, Case, make_inputs, reference_on, run_kernels

import ktjax
from ktjax.ops import dropout

SLOTS, COLUMNS, RATE = 512, 2048, 0.1
CASE = Case(tokens=24, rank=8, dropout=0.3)


def masks(rate=RATE, seed=SEED, of="x", slots=SLOTS):
    return np.asarray(dropout.keep(jnp.asarray(seed), slots, COLUMNS, of, rate))


def correlations(a, b):
    """Of every row of `a` with every row of `b`, in units of their deviation."""
    mean, deviation = 1 - RATE, (RATE * (1 - RATE)) ** 0.5
    a, b = ((m - mean) / deviation for m in (a, b))
    return a @ b.T / a.shape[1] ** 0.5


def assert_independent(products):
    """Products of independent masks are standard normal: no one stands out.

    Of a million such numbers the largest is near 5, and is above 7 once in 10^6 times.
    """
    assert np.abs(products).max() < 7
    assert abs(products.mean()) < 5 / products.size**0.5
    assert abs(products.std() - 1) < 0.02


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("of", ["x", "h"])
def test_the_share_of_kept_values(rate, of):
    kept = masks(rate, of=of)
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation / kept.size**0.5
    # Binomial in each row and in each column too.
    for axis, count in ((0, SLOTS), (1, COLUMNS)):
        z = (kept.mean(axis) - (1 - rate)) / (deviation / count**0.5)
        assert np.abs(z).max() < 6 + 20 * (rate < 0.01)  # a few hits are no normal
        assert abs(z.std() - 1) < 0.15


def test_slots_and_columns_are_independent():
    kept = masks()
    for matrix in (kept, kept.T):
        products = correlations(matrix, matrix)
        assert_independent(products[np.triu_indices(len(products), 1)])


@pytest.mark.parametrize("other", [[3, 6], [4, 5], [5, 3], [2**31 + 3, 5]])
def test_seeds_are_independent(other):
    """Counters as seeds too: the next step's mask is another in every slot."""
    assert_independent(correlations(masks(), masks(seed=np.uint32(other))))


def test_the_two_inputs_are_independent():
    assert_independent(correlations(masks(), masks(of="h")))


def test_a_slot_does_not_depend_on_how_many_there_are():
    np.testing.assert_array_equal(masks(slots=7), masks()[:7])


def test_masks_are_what_they_were():
    """Runs that were begun with an earlier version go on with the same masks."""
    kept = np.asarray(dropout.keep(jnp.asarray(SEED), 3, 16, "h", 0.5))
    rows = ["".join(map(str, row.astype(int))) for row in kept]
    assert rows == ["1001001111111000", "1001100100011011", "0100001001110111"]


@pytest.fixture
def layer(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        yield inputs, store


def assert_same_bits(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


def test_no_rate_is_no_dropout(layer):
    _, store = layer
    plain = dataclasses.replace(CASE, dropout=0.0)
    with_seed = run_kernels(plain, store)
    assert_same_bits(with_seed, run_kernels(plain, store, seed=None))
    text = (
        jax.jit(lambda x, i, w, s, lora: ktjax.moe(x, i, w, s, lora, dropout_seed=SEED))
        .lower(*_arguments(layer))
        .as_text()
    )
    assert "tensor<2xui32>" in text  # the handle
    (call,) = (line for line in text.splitlines() if "@ktjax_moe_forward" in line)
    assert call.count("tensor<2xui32>") == 1


def _arguments(layer):
    inputs, store = layer
    return inputs.x, inputs.ids, inputs.w, store, inputs.lora


def test_only_the_adapters_see_it(layer):
    x, ids, w, store, lora = _arguments(layer)
    zeros = jax.tree.map(jnp.zeros_like, lora)
    y = ktjax.moe(x, ids, w, store, zeros, dropout=0.5, dropout_seed=SEED)
    assert_same_bits(y, ktjax.moe(x, ids, w, store))


def test_seeds(layer):
    args = _arguments(layer)
    f = jax.jit(lambda seed: ktjax.moe(*args, dropout=0.3, dropout_seed=seed))
    one, other = (np.asarray(f(jnp.uint32(s))) for s in ([3, 5], [3, 6]))
    assert f._cache_size() == 1
    assert (one != other).mean() > 0.5
    assert_same_bits(one, f(jnp.uint32([3, 5])))
    for key in (jax.random.key(1), jax.random.key(1, impl="rbg")):
        words = jax.random.bits(key, (2,), jnp.uint32)
        assert_same_bits(f(words), ktjax.moe(*args, dropout=0.3, dropout_seed=key))


def test_a_seed_has_no_gradient(layer):
    """Whoever differentiates by everything gets the zeros that integers have."""
    x, ids, w, store, lora = _arguments(layer)

    def f(x, seed):
        y = ktjax.moe(x, ids, w, store, lora, dropout=0.3, dropout_seed=seed)
        return jnp.sum(y.astype(jnp.float32))

    _, grad = jax.grad(f, (0, 1), allow_int=True)(x, jnp.asarray(SEED))
    assert grad.dtype == jax.dtypes.float0


@pytest.mark.parametrize("seeds_differ", [False, True])
def test_vmap_is_one_element_after_the_other(layer, seeds_differ):
    x, ids, w, store, lora = _arguments(layer)
    xs, idss, ws = (a.reshape(3, 8, -1) for a in (x, ids, w))
    seeds = jnp.uint32([[3, 5]] * 3) + (seeds_differ * jnp.arange(3)[:, None]).astype(
        jnp.uint32
    )

    def f(x, w, ids, seed):
        y = ktjax.moe(x, ids, w, store, lora, dropout=0.3, dropout_seed=seed)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    # Without gradients of LoRA, of which each element has its own in any case.
    run = jax.value_and_grad(f, (0, 1))
    if seeds_differ:
        got = jax.vmap(run)(xs, ws, idss, seeds)
    else:
        got = jax.vmap(run, (0, 0, 0, None))(xs, ws, idss, seeds[0])
    each = [run(*args) for args in zip(xs, ws, idss, seeds, strict=True)]
    assert_same_bits(got, jax.tree.map(lambda *a: jnp.stack(a), *each))


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_checkpoint_in_a_scan_uses_the_same_masks(layer, policy):
    x, ids, w, store, lora = _arguments(layer)
    seeds = jnp.uint32([[1, 2], [3, 4]])

    def loss(lora, wrap):
        def body(x, seed):
            y = ktjax.moe(
                *(x, ids, w, store, lora),
                activation_policy=policy,
                dropout=0.3,
                dropout_seed=seed,
            )
            return x + y, None

        return jnp.sum(jax.lax.scan(wrap(body), x, seeds)[0].astype(jnp.float32) ** 2)

    plain, again = (
        jax.jit(jax.grad(loss), static_argnums=1)(lora, wrap)
        for wrap in (lambda f: f, jax.checkpoint)
    )
    assert_same_bits(plain, again)


@pytest.mark.parametrize("tokens", [3, 33])
def test_integer_products(use_pool, tokens):
    """Activations of the base in 8 bits: 0.03, as without dropout."""
    use_pool()
    case = Case(tokens=tokens, k=2, rank=8, hidden=256, intermediate=384, dropout=0.3)
    with ktjax.ExpertStore.from_arrays(*make_inputs(case).base, format="int4") as store:
        saved = run_kernels(case, store, "save", "int8")
        assert_same_bits(saved, run_kernels(case, store, "recompute", "int8"))
        want = reference_on(case, store.dequantize())["y"]
    error = np.linalg.norm(np.asarray(saved[0], np.float64) - want)
    assert error <= 0.03 * np.linalg.norm(want)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rates_out_of_range(layer, rate):
    words = rf"moe: dropout: expected a rate of at least 0 and below 1, got {rate}"
    with pytest.raises(ValueError, match=words):
        ktjax.moe(*_arguments(layer), dropout=rate, dropout_seed=SEED)


def test_what_goes_with_a_rate(layer):
    x, ids, w, store, lora = _arguments(layer)
    with pytest.raises(ValueError, match=r"dropout_seed: expected uint32.* got None"):
        ktjax.moe(x, ids, w, store, lora, dropout=0.1)
    with pytest.raises(ValueError, match=r"expected adapters.* got lora=None"):
        ktjax.moe(x, ids, w, store, dropout=0.1, dropout_seed=SEED)
    for seed, got in (
        (jnp.int32([1, 2]), r"int32\[2\]"),
        (jnp.uint32(1), r"uint32\[\]"),
        (jnp.uint32([1, 2, 3]), r"uint32\[3\]"),
        (jax.random.split(jax.random.key(0)), r"key<fry>\[2\]"),
    ):
        with pytest.raises(TypeError, match=rf"dropout_seed: expected .* got {got}"):
            ktjax.moe(x, ids, w, store, lora, dropout=0.1, dropout_seed=seed)
