"""ktjax.moe under JAX's transformations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import Case, assert_close, make_inputs, named_results, reference_results

import ktjax

CASE = Case(tokens=24, rank=8)


@pytest.fixture
def layer(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        yield inputs, store


def loss(inputs, store, **options):
    def f(x, w, lora):
        y = ktjax.moe(x, inputs.ids, w, store, lora, scaling=2.0, **options)
        return jnp.sum(y.astype(jnp.float32) * inputs.grad_y.astype(jnp.float32))

    return f


def gradients(f, inputs):
    return jax.jit(jax.grad(f, argnums=(0, 1, 2)))(inputs.x, inputs.w, inputs.lora)


def assert_same(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


def test_eager_jit_and_value_and_grad_agree(layer):
    inputs, store = layer
    f = loss(inputs, store)
    args = (inputs.x, inputs.w, inputs.lora)
    value, grads = jax.value_and_grad(f, argnums=(0, 1, 2))(*args)
    assert_same(value, jax.jit(f)(*args))
    assert_same(grads, gradients(f, inputs))
    expected = reference_results(CASE)
    y = ktjax.moe(inputs.x, inputs.ids, inputs.w, store, inputs.lora, scaling=2.0)
    assert_close(named_results(y, grads), expected)


def test_store_as_an_argument_and_bare_handle(layer):
    inputs, store = layer
    f = jax.jit(lambda store: ktjax.moe(inputs.x, inputs.ids, inputs.w, store))
    expected = f(store)
    assert_same(f(store), expected)
    assert f._cache_size() == 1
    by_handle = ktjax.moe(inputs.x, inputs.ids, inputs.w, store.handle)
    assert_same(by_handle, expected)


@pytest.mark.parametrize("lead", [(24,), (4, 6), (2, 3, 4), (1, 24, 1)])
def test_leading_dimensions(layer, lead):
    inputs, store = layer
    flat = ktjax.moe(inputs.x, inputs.ids, inputs.w, store, inputs.lora)
    shaped = ktjax.moe(
        inputs.x.reshape(*lead, -1),
        inputs.ids.reshape(*lead, -1),
        inputs.w.reshape(*lead, -1),
        store,
        inputs.lora,
    )
    assert shaped.shape == (*lead, CASE.hidden)
    assert_same(shaped.reshape(flat.shape), flat)


def test_no_tokens(layer):
    inputs, store = layer
    x = jnp.zeros((0, CASE.hidden), jnp.bfloat16)
    ids, w = jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2), jnp.float32)

    def f(x, w, lora):
        return ktjax.moe(x, ids, w, store, lora).astype(jnp.float32).sum()

    value, (grad_x, grad_w, grad_lora) = jax.value_and_grad(f, argnums=(0, 1, 2))(
        x, w, inputs.lora
    )
    assert value == 0
    assert (grad_x.shape, grad_w.shape) == (x.shape, w.shape)
    assert not any(np.asarray(a).any() for a in grad_lora.arrays())


def test_all_slots_skipped(layer):
    inputs, store = layer
    ids = jnp.full_like(inputs.ids, -1)

    def f(x, w, lora):
        return ktjax.moe(x, ids, w, store, lora).astype(jnp.float32).sum()

    grads = jax.grad(f, argnums=(0, 1, 2))(inputs.x, inputs.w, inputs.lora)
    y = ktjax.moe(inputs.x, ids, inputs.w, store, inputs.lora)
    assert not np.asarray(y, np.float32).any()
    for leaf in jax.tree.leaves(grads):
        assert not np.asarray(leaf, np.float32).any()


def batches(inputs):
    def split(a):
        return a.reshape(3, 8, a.shape[-1])

    return split(inputs.x), split(inputs.ids), split(inputs.w)


def test_vmap_of_values_and_gradients(layer):
    inputs, store = layer
    xs, idss, ws = batches(inputs)

    def f(x, ids, w, lora):
        y = ktjax.moe(x, ids, w, store, lora, scaling=2.0)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    axes = (0, 0, 0, None)
    values = jax.vmap(f, axes)(xs, idss, ws, inputs.lora)
    expected = [f(x, i, w, inputs.lora) for x, i, w in zip(xs, idss, ws, strict=True)]
    np.testing.assert_allclose(values, jnp.stack(expected), rtol=1e-6)

    # Per example, and of the sum: the second adds up the first.
    g = jax.grad(f, argnums=(0, 2, 3))
    each = jax.vmap(g, axes)(xs, idss, ws, inputs.lora)
    for b in range(3):
        one = g(xs[b], idss[b], ws[b], inputs.lora)
        assert_same(jax.tree.map(lambda a, b=b: a[b], each), one)

    def total(xs, ws, lora):
        return jnp.sum(jax.vmap(f, axes)(xs, idss, ws, lora))

    _, _, grad_lora = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(xs, ws, inputs.lora)
    for summed, parts in zip(grad_lora.arrays(), each[2].arrays(), strict=True):
        np.testing.assert_allclose(summed, parts.sum(0), rtol=2e-5, atol=1e-6)


def test_vmap_folds_the_batch_into_one_call(layer):
    inputs, store = layer
    xs, idss, ws = batches(inputs)

    def f(x, ids, w):
        return ktjax.moe(x, ids, w, store, inputs.lora)

    text = jax.jit(jax.vmap(f)).lower(xs, idss, ws).as_text()
    assert text.count("custom_call @ktjax_moe_forward") == 1
    assert "while" not in text


def test_vmap_over_adapters(layer):
    inputs, store = layer
    two = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), inputs.lora)

    def f(lora):
        return ktjax.moe(inputs.x, inputs.ids, inputs.w, store, lora)

    got = jax.vmap(f)(two)
    assert_same(got[0], f(inputs.lora))
    assert_same(got[1], f(jax.tree.map(lambda a: 2 * a, inputs.lora)))


def test_checkpoint_gives_the_same_gradients(layer):
    inputs, store = layer
    f = loss(inputs, store)
    assert_same(gradients(jax.checkpoint(f), inputs), gradients(f, inputs))


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers_with_different_stores(use_pool, remat):
    use_pool()
    inputs = make_inputs(CASE)
    stores = [
        ktjax.ExpertStore.from_arrays(*(a * (1 + n) for a in inputs.base))
        for n in range(3)
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *stores)
    loras = jax.tree.map(lambda a: jnp.stack([a, -a, 2 * a]), inputs.lora)

    def layer(x, parameters):
        store, lora = parameters
        y = ktjax.moe(x, inputs.ids, inputs.w, store, lora)
        return x + y / 8, None

    body = jax.checkpoint(layer) if remat else layer

    def scanned(x, loras):
        y, _ = jax.lax.scan(body, x, (stacked, loras))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def unrolled(x, loras):
        for n, store in enumerate(stores):
            x, _ = layer(x, (store, jax.tree.map(lambda a, n=n: a[n], loras)))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    x = inputs.x.astype(jnp.float32)
    got = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(x, loras)
    expected = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(x, loras)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for store in stores:
        store.close()


def test_donation(layer):
    inputs, store = layer
    expected = ktjax.moe(inputs.x, inputs.ids, inputs.w, store)
    f = jax.jit(lambda x: ktjax.moe(x, inputs.ids, inputs.w, store), donate_argnums=0)
    x = inputs.x + 0
    assert_same(f(x), expected)
    assert x.is_deleted()


def test_ahead_of_time(layer):
    inputs, store = layer
    f = jax.jit(lambda x, s: ktjax.moe(x, inputs.ids, inputs.w, s))
    compiled = f.lower(jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype), store)
    assert_same(compiled.compile()(inputs.x, store), f(inputs.x, store))


def test_persistent_cache_in_a_new_process(tmp_path):
    program = textwrap.dedent(
        """
        import sys
        import jax, jax.numpy as jnp, numpy as np, ktjax
        jax.config.update("jax_compilation_cache_dir", sys.argv[1])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        hits = []
        jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name))
        rng = np.random.default_rng(0)
        shape = (2, 32, 32)
        for _ in range(int(sys.argv[2])):  # so that handles differ between processes
            ktjax.ExpertStore.from_arrays(*[np.zeros(shape, np.float32)] * 3)
        base = [rng.standard_normal(shape, np.float32) for _ in range(3)]
        store = ktjax.ExpertStore.from_arrays(*base)
        x = jnp.ones((4, 32))
        ids, w = jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1))
        y = jax.jit(lambda x, s: ktjax.moe(x, ids, w, s) * 3)(x, store)
        print(float(y.sum()), sum(n.endswith("cache_hits") for n in hits) > 0)
        """
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(extra)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ,
        ).stdout.split()
        for extra in (0, 3)
    ]
    assert outputs[0][0] == outputs[1][0]
    assert (outputs[0][1], outputs[1][1]) == ("False", "True")


@pytest.mark.parametrize("wanted", ["x", "w", "lora"])
def test_computes_only_what_is_asked_for(layer, wanted):
    inputs, store = layer
    f = loss(inputs, store)
    argument = ("x", "w", "lora").index(wanted)
    g = jax.jit(jax.grad(f, argnums=argument))
    text = g.lower(inputs.x, inputs.w, inputs.lora).as_text()
    for name in ("x", "w", "lora"):
        assert f"need_{name} = {str(name == wanted).lower()}" in text
    all_of_them = gradients(f, inputs)
    assert_same(g(inputs.x, inputs.w, inputs.lora), all_of_them[argument])


def test_forward_alone_keeps_nothing(layer):
    inputs, store = layer
    f = jax.jit(lambda x: ktjax.moe(x, inputs.ids, inputs.w, store, inputs.lora))
    assert "keep = false" in f.lower(inputs.x).as_text()


def test_no_copies_around_the_call(layer):
    inputs, store = layer
    f = jax.jit(lambda x, lora: ktjax.moe(x, inputs.ids, inputs.w, store, lora))
    text = f.lower(inputs.x, inputs.lora).compile().as_text()
    assert " copy(" not in text
    assert " transpose(" not in text
