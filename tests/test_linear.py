"""`ktjax.linear`: every kernel and format against the reference; transformations."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ISAS
from linear_cases import Case, assert_close, make_inputs, reference_on, results, run
from quant_cases import QUANTIZED as ALL
from quant_cases import encoding_id, options

import ktjax
from ktjax.quant import Encoding

CASES = [
    Case(rows=1, rank=1),
    Case(rows=1, rank=None),
    Case(rows=33, rank=4, inputs=96, outputs=160),
    Case(rows=7, rank=5, inputs=41, outputs=75),  # odd everything
    Case(rows=34, rank=64, inputs=192, outputs=130),
    Case(rows=20, dtype="float32"),
    Case(rows=33, rank=5, inputs=41, outputs=75, dtype="float32"),
    Case(rows=33, rank=64, inputs=160, outputs=96, dtype="float32"),
    Case(rows=20, dtype="float32", lora_dtype="bfloat16"),
    Case(rows=20, lora_dtype="bfloat16"),
]
# Several blocks of rows, chunks of outputs, groups of ranks: on the fast paths only.
LARGE_CASES = [
    Case(rows=1300, inputs=64, outputs=96),
    Case(rows=40, inputs=64, outputs=9000),
    Case(rows=40, inputs=64, outputs=9000, dtype="float32"),
    Case(rows=40, inputs=64, outputs=4100, rank=None),
    Case(rows=70, inputs=2100, outputs=128, rank=200),
]
# Of the group sizes each once, with zero points and without.
QUANTIZED = [
    e
    for e in ALL
    if not e.spec.group_sizes
    or (e.group_size, e.zero_point) in ((32, False), (64, True), (128, False))
]


def check(case: Case, encoding: Encoding | None = None) -> None:
    chosen = {} if encoding is None else options(encoding)
    with ktjax.LinearStore.from_array(make_inputs(case).weight, **chosen) as store:
        got = results(*run(case, store))
        want = reference_on(case, store.dequantize())
    assert_close(case, got, want)


@pytest.mark.parametrize("isa", ISAS)
def test_matches_the_reference(use_pool, isa):
    use_pool(isa)
    for case in CASES:
        check(case)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_matches_the_reference_in_large_cases(use_pool, case):
    use_pool()
    check(case)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_formats(use_pool, isa, encoding):
    use_pool(isa)
    check(Case(rows=33, inputs=256, outputs=136), encoding)
    check(Case(rows=5, inputs=128, outputs=40, dtype="float32"), encoding)


@pytest.mark.parametrize("subpools", [2, 3])
def test_sub_pools(use_pool, subpools):
    """Slices of outputs, one of them empty: 96 outputs are one unit of 128."""
    use_pool(threads=1, subpools=subpools)
    for case in (CASES[2], CASES[4], CASES[6], LARGE_CASES[2]):
        check(case)
    check(Case(rows=33, inputs=256, outputs=300), Encoding.of("fp8_block"))


@pytest.mark.parametrize("isa", ["", "amx_emulated"])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_threads_and_batches_do_not_matter(use_pool, isa, format):
    case = Case(rows=150, inputs=128, outputs=200, rank=33)
    inputs = make_inputs(case)
    runs = []
    for threads in (1, 3):
        use_pool(isa, threads)
        with ktjax.LinearStore.from_array(inputs.weight, format=format) as store:
            runs.append(jax.tree.map(np.array, run(case, store)))
            few = np.array(
                ktjax.linear(inputs.x[:9], store, inputs.lora, scaling=case.scaling)
            )
        np.testing.assert_array_equal(few, runs[-1][0][:9])
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_rows(use_pool):
    use_pool()
    case = Case(rows=0)
    with ktjax.LinearStore.from_array(make_inputs(case).weight) as store:
        y, (grad_x, grad_lora) = run(case, store)
    assert y.shape == (0, 96)
    assert grad_x.shape == (0, 64)
    assert not np.asarray(grad_lora.a).any()
    assert not np.asarray(grad_lora.b).any()


def test_dtypes_and_leading_dimensions(use_pool):
    use_pool()
    case = Case(rows=24, lora_dtype="bfloat16")
    inputs = make_inputs(case)
    with ktjax.LinearStore.from_array(inputs.weight) as store:
        y, (grad_x, grad_lora) = run(case, store)
        x = inputs.x.reshape(2, 3, 4, 64)
        shaped = ktjax.linear(x, store, inputs.lora, scaling=case.scaling)
        one = ktjax.linear(inputs.x[0], store, inputs.lora, scaling=case.scaling)
        jax.block_until_ready((shaped, one))
    assert (y.dtype, grad_x.dtype, grad_lora.a.dtype) == ("bfloat16",) * 3
    np.testing.assert_array_equal(shaped, y.reshape(2, 3, 4, 96))
    np.testing.assert_array_equal(one, y[0])


@pytest.fixture
def projection(use_pool):
    use_pool()
    case = Case(rows=6)
    inputs = make_inputs(case)
    with ktjax.LinearStore.from_array(inputs.weight) as store:
        yield case, inputs, store


def test_only_what_is_asked_for_is_computed(projection):
    case, inputs, store = projection

    def loss(x, lora):
        y = ktjax.linear(x, store, lora, scaling=case.scaling)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    def attributes(f, *args):
        text = str(jax.make_jaxpr(f)(*args))
        return re.findall(r"\('(need_\w+)', (True|False)\)", text)

    for argnums, x, lora in ((0, True, False), (1, False, True), ((0, 1), True, True)):
        found = attributes(jax.grad(loss, argnums), inputs.x, inputs.lora)
        assert found == [("need_lora", str(lora)), ("need_x", str(x))]
    # Nothing asked: no backward at all.
    assert not attributes(jax.grad(lambda s: s * loss(inputs.x, None)), 1.0)
    both = jax.grad(loss, (0, 1))(inputs.x, inputs.lora)
    np.testing.assert_array_equal(both[0], jax.grad(loss)(inputs.x, inputs.lora))
    alone = jax.grad(loss, 1)(inputs.x, inputs.lora)
    for a, b in zip(jax.tree.leaves(both[1]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches(projection):
    """Over x, over adapters, and the gradients of both."""
    case, inputs, store = projection
    x = jnp.stack([inputs.x, inputs.x * 2, -inputs.x])
    loras = jax.tree.map(lambda a: jnp.stack([a, a * 2, a * 0]), inputs.lora)

    def both(x, lora):
        y, pullback = jax.vjp(
            lambda x, lora: ktjax.linear(x, store, lora, scaling=case.scaling), x, lora
        )
        return y, pullback(y)

    for axes in ((0, None), (None, 0), (0, 0)):
        args = (x if axes[0] == 0 else inputs.x, loras if axes[1] == 0 else inputs.lora)
        got = jax.jit(jax.vmap(both, axes))(*args)
        for i in range(3):
            one = [
                jax.tree.map(lambda a, i=i: a[i], arg) if axis == 0 else arg
                for arg, axis in zip(args, axes, strict=True)
            ]
            for a, b in zip(
                jax.tree.leaves(got), jax.tree.leaves(both(*one)), strict=True
            ):
                np.testing.assert_array_equal(a[i], b)


def test_gradients_of_x_fold_a_batch(projection):
    _, inputs, store = projection

    def grad_x(x):
        return jax.grad(lambda x: jnp.sum(ktjax.linear(x, store)))(x)

    x = jnp.stack([inputs.x, inputs.x * 2])
    np.testing.assert_array_equal(
        jax.vmap(grad_x)(x), jnp.stack([grad_x(each) for each in x])
    )
    assert "scan" not in str(jax.make_jaxpr(jax.vmap(grad_x))(x))


def test_scan_over_stores_and_checkpoint(use_pool):
    use_pool()
    case = Case(rows=6, inputs=64, outputs=64)
    inputs = make_inputs(case)
    weights = [inputs.weight, -inputs.weight]
    stores = [ktjax.LinearStore.from_array(w) for w in weights]
    stacked = jax.tree.map(lambda *handles: jnp.stack(handles), *stores)

    def chain(x, stores):
        def layer(x, store):
            return jax.checkpoint(
                lambda x: ktjax.linear(x, store, inputs.lora, scaling=case.scaling)
            )(x), None

        return jnp.sum(jax.lax.scan(layer, x, stores)[0].astype(jnp.float32))

    def unrolled(x):
        for store in stores:
            x = ktjax.linear(x, store, inputs.lora, scaling=case.scaling)
        return jnp.sum(x.astype(jnp.float32))

    got = jax.jit(jax.grad(chain))(inputs.x, stacked)
    np.testing.assert_array_equal(got, jax.jit(jax.grad(unrolled))(inputs.x))
    for store in stores:
        store.close()


def test_wrong_arguments(projection):
    _, inputs, store = projection
    with pytest.raises(TypeError, match="linear: store: expected a LinearStore, got"):
        ktjax.linear(inputs.x, store.handle)
    with pytest.raises(TypeError, match="x: expected float32 or bfloat16, got float16"):
        ktjax.linear(inputs.x.astype(jnp.float16), store)
    with pytest.raises(ValueError, match="x: expected a last dimension of 64"):
        ktjax.linear(inputs.x[:, :32], store)
    bad = ktjax.LinearLoRA(inputs.lora.a, inputs.lora.b[:, :2])
    with pytest.raises(ValueError, match=r"lora\.b: expected \(96, 8\), got \(96, 2\)"):
        ktjax.linear(inputs.x, store, bad)
    mixed = ktjax.LinearLoRA(inputs.lora.a, inputs.lora.b.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"lora\.b: expected float32 like a, got bfl"):
        ktjax.linear(inputs.x, store, mixed)
    wide = ktjax.LinearLoRA(jnp.zeros((257, 64)), jnp.zeros((96, 257)))
    with pytest.raises(ValueError, match="rank of 1 to 256, got 257"):
        ktjax.linear(inputs.x, store, wide)


def test_a_closed_store_and_one_of_another_kind(use_pool):
    use_pool()
    inputs = make_inputs(Case(rows=6))
    store = ktjax.LinearStore.from_array(inputs.weight)
    f = jax.jit(lambda x, store: ktjax.linear(x, store))
    jax.block_until_ready(f(inputs.x, store))
    ids, w = jnp.zeros((6, 1), jnp.int32), jnp.ones((6, 1))
    match = "store: expected a handle of ExpertStore, got one of LinearStore"
    with pytest.raises((RuntimeError, ValueError), match=match):
        jax.block_until_ready(ktjax.moe(inputs.x, ids, w, store.handle))
    view = jax.tree.map(lambda a: a, store)
    with pytest.raises(RuntimeError, match=r"LinearStore\.close: this is a view"):
        view.close()
    store.close()
    store.close()
    assert store.closed
    with pytest.raises((RuntimeError, ValueError), match="is closed or belongs to"):
        jax.block_until_ready(f(inputs.x, store))
    with pytest.raises(RuntimeError, match="is closed"):
        store.dequantize()
