"""Bad input gives one clear exception."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import Case, make_inputs

import ktjax
from ktjax import backend
from ktjax.config import PoolConfig

CASE = Case(tokens=6, rank=4)


@pytest.fixture
def layer(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        yield inputs, store


def test_wrong_arguments(layer):
    inputs, store = layer
    x, ids, w, lora = inputs.x, inputs.ids, inputs.w, inputs.lora
    with pytest.raises(TypeError, match="x: expected float32 or bfloat16, got float16"):
        ktjax.moe(x.astype(jnp.float16), ids, w, store)
    with pytest.raises(TypeError, match="ids: expected int32, got float32"):
        ktjax.moe(x, w, w, store)
    with pytest.raises(TypeError, match="w: expected float32, got bfloat16"):
        ktjax.moe(x, ids, w.astype(jnp.bfloat16), store)
    with pytest.raises(ValueError, match=r"ids: expected \(6, 'k'\) .* got \(5, 2\)"):
        ktjax.moe(x, ids[:5], w, store)
    with pytest.raises(
        ValueError, match=r"w: expected \(6, 2\) like ids, got \(6, 1\)"
    ):
        ktjax.moe(x, ids, w[:, :1], store)
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 64"):
        ktjax.moe(x[:, :32], ids, w, store)
    with pytest.raises(ValueError, match="activation_policy: expected one of"):
        ktjax.moe(x, ids, w, store, activation_policy="none")
    with pytest.raises(
        ValueError, match="store: expected an ExpertStore or its handle"
    ):
        ktjax.moe(x, ids, w, jnp.zeros((3,), jnp.uint32))
    bad = ktjax.LoRA(*lora.arrays()[:5], lora.down_b[:, :, :2])
    with pytest.raises(ValueError, match=r"lora.down_b: expected \(4, 64, 4\), got"):
        ktjax.moe(x, ids, w, store, bad)
    half = jax.tree.map(lambda a: a.astype(jnp.float16), lora)
    with pytest.raises(TypeError, match=r"lora\.gate_a: expected float32 or bfloat16"):
        ktjax.moe(x, ids, w, store, half)
    wide = ktjax.LoRA(
        *(jnp.zeros(s) for s in ktjax.LoRA.shapes(4, 64, 64, 257).values())
    )
    with pytest.raises(ValueError, match="rank of 1 to 256, got 257"):
        ktjax.moe(x, ids, w, store, wide)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1])
def test_ids_out_of_range(layer, bad):
    inputs, store = layer
    ids = inputs.ids.at[3, 1].set(bad)
    message = rf"expert id {bad} of token 3, slot 1 is outside \[-1, 4\)"
    with pytest.raises((RuntimeError, ValueError), match=message):
        jax.block_until_ready(ktjax.moe(inputs.x, ids, inputs.w, store))
    f = jax.jit(lambda x, ids: ktjax.moe(x, ids, inputs.w, store))
    jax.block_until_ready(f(inputs.x, inputs.ids))
    with pytest.raises((RuntimeError, ValueError), match=message):
        jax.block_until_ready(f(inputs.x, ids))


def test_closed_store(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    store = ktjax.ExpertStore.from_arrays(*inputs.base)
    f = jax.jit(lambda x, s: ktjax.moe(x, inputs.ids, inputs.w, s))
    jax.block_until_ready(f(inputs.x, store))
    store.close()
    store.close()
    assert store.closed
    with pytest.raises((RuntimeError, ValueError), match="is closed or belongs to"):
        jax.block_until_ready(f(inputs.x, store))
    with pytest.raises(RuntimeError, match="is closed"):
        store.dequantize()
    # Its place may be taken, its handle may not.
    other = ktjax.ExpertStore.from_arrays(*inputs.base)
    with pytest.raises((RuntimeError, ValueError), match="is closed or belongs to"):
        jax.block_until_ready(f(inputs.x, store))
    other.close()


def test_a_collected_store_is_closed(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    handle = ktjax.ExpertStore.from_arrays(*inputs.base).handle
    with pytest.raises((RuntimeError, ValueError), match="is closed"):
        jax.block_until_ready(ktjax.moe(inputs.x, inputs.ids, inputs.w, handle))


def test_wrong_weights(use_pool):
    use_pool()
    gate, up, down = (np.asarray(a, np.float32) for a in make_inputs(CASE).base)
    make = ktjax.ExpertStore.from_arrays
    with pytest.raises(ValueError, match=r"format: expected one of \['bf16', .*'int3'"):
        make(gate, up, down, format="int3")
    with pytest.raises(
        ValueError, match=r"down: expected \(4, 64, 64\) .* got \(4, 64, 9"
    ):
        make(gate, up, down[..., :9])
    with pytest.raises(ValueError, match="gate: expected 3 dimensions"):
        make(gate[0], up, down)
    with pytest.raises(
        TypeError, match="gate: expected float32 or bfloat16, got float64"
    ):
        make(gate.astype(np.float64), up, down)
    with pytest.raises(TypeError, match="up: expected float32 like gate"):
        make(gate, up.astype(jnp.bfloat16), down)
    with pytest.raises(ValueError, match="sizes > 0"):
        make(gate[:0], up[:0], down[:0])
    with pytest.raises(ValueError, match="expected the running pool"):
        make(gate, up, down, pool=backend.Pool(PoolConfig(7), "portable"))


def test_views_cannot_be_closed(layer):
    _, store = layer
    view = jax.tree.map(lambda a: a, store)
    assert view.dequantize()[0].shape == (4, 64, 64)
    with pytest.raises(RuntimeError, match="this is a view"):
        view.close()


def test_pool_is_one_per_process(use_pool):
    pool = use_pool(threads=2)
    assert backend.get_pool() is pool
    assert backend.get_pool(PoolConfig(2)) is pool
    with pytest.raises(RuntimeError, match=r"release_pool\(\)"):
        backend.get_pool(PoolConfig(3))
    with (
        ktjax.ExpertStore.from_arrays(*make_inputs(CASE).base),
        pytest.raises(RuntimeError, match="1 stores still use the worker pool"),
    ):
        backend.release_pool()


def test_unknown_isa(use_pool):
    with pytest.raises(ValueError, match="portable"):
        use_pool("sse9")


def test_more_slices_than_the_intermediate_size_has(use_pool):
    use_pool(threads=1, subpools=3)
    with pytest.raises(ValueError, match="cannot be split over 3 sub-pools"):
        ktjax.ExpertStore.from_arrays(*make_inputs(CASE).base)


def test_pool_config_is_validated():
    with pytest.raises(ValueError, match="threads_per_subpool must be positive, got 0"):
        PoolConfig(0)
    with pytest.raises(ValueError, match="subpool_count must be positive, got -1"):
        PoolConfig(1, -1)
