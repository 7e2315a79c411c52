"""`FrozenLinear`: bias, adapters as parameters, training, ownership."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from linear_cases import TOLERANCES, Case, make_inputs

import ktjax
from ktjax.nn import FrozenLinear

CASE = Case(rows=12, rank=4)


@pytest.fixture
def store(use_pool):
    use_pool()
    with ktjax.LinearStore.from_array(make_inputs(CASE).weight) as store:
        yield store


@nnx.jit
def apply(module, x):
    return module(x)


def test_values(store):
    """Base, bias and adapters; B starts at zero."""
    inputs = make_inputs(CASE)
    bias = nnx.Param(jnp.linspace(-1, 1, 96))
    x = inputs.x.astype(jnp.float32)
    plain = apply(FrozenLinear(store), x)
    module = FrozenLinear(store, bias, lora_rank=4, lora_alpha=8.0, rngs=nnx.Rngs(0))
    assert module.scaling == 2.0
    np.testing.assert_allclose(apply(module, x), plain + bias[...], rtol=1e-6)
    module.lora_a[...], module.lora_b[...] = inputs.lora.a, inputs.lora.b
    want = ktjax.reference.linear(x, inputs.weight, inputs.lora, scaling=2.0)
    got = apply(module, x) - bias[...]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error <= TOLERANCES["float32"]
    assert apply(module, inputs.x).dtype == jnp.bfloat16


def test_only_adapters_are_trained(store):
    module = FrozenLinear(store, lora_rank=4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
    x = make_inputs(CASE).x.astype(jnp.float32)
    target = jnp.ones((12, 96))

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return jnp.mean((module(x) - target) ** 2)

        diff = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=diff)(module)
        optimizer.update(module, grads)
        return value

    handle = np.asarray(module.handle[...])
    losses = [float(step(module, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert set(nnx.state(module, nnx.LoRAParam)) == {"lora_a", "lora_b"}
    np.testing.assert_array_equal(module.handle[...], handle)


def test_the_module_keeps_its_store(use_pool):
    use_pool()
    inputs = make_inputs(CASE)
    module = FrozenLinear(ktjax.LinearStore.from_array(inputs.weight))
    gc.collect()
    jax.block_until_ready(apply(module, inputs.x))
    copy = nnx.clone(module)
    with pytest.raises(RuntimeError, match="this is a view"):
        copy.close()
    module.close()
    with pytest.raises((RuntimeError, ValueError), match="is closed"):
        jax.block_until_ready(apply(copy, inputs.x))


def test_wrong_ranks(store):
    with pytest.raises(ValueError, match="rank of 1 to 256, got 0"):
        FrozenLinear(store, lora_rank=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="lora_rank needs rngs"):
        FrozenLinear(store, lora_rank=4)
