"""Recomputed layers: the same gradient, and memory that hardly grows with depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from demo_cases import gradient, load
from flax import nnx
from train_standin import make_config

from ktjax import assets
from ktjax.models import ModelConfig
from ktjax.train import Batcher, Example, make_train_step, plan_program, split_model
from ktjax.train.optimizer import make_optimizer
from ktjax.train.step import init_state


@pytest.mark.parametrize("policy", ["save", "recompute"])
def test_recomputed_layers_give_the_same_gradient(policy):
    ids = jnp.arange(48).reshape(2, 24) % 40
    models = [load(remat=remat, activation_policy=policy) for remat in (False, True)]
    try:
        (loss, grad), (again, regrad) = (gradient(model, ids) for model in models)
    finally:
        for model in models:
            model.close()
    assert loss == pytest.approx(float(again), rel=1e-6)
    for one, two in zip(jax.tree.leaves(grad), jax.tree.leaves(regrad), strict=True):
        # XLA fuses the two programs differently, so float32 sums of `hidden` terms
        # differ; the kernels read float32 as two bfloat16, which keep 16 bits.
        error = np.linalg.norm(one - two) / np.linalg.norm(one)
        assert error < 2.0**-14


def step_bytes(depth, **changes):
    """What a step of the demo's shape allocates, with so many layers."""
    geometry = ModelConfig.from_pretrained(assets.demo_model())
    geometry = dataclasses.replace(geometry, num_hidden_layers=depth)
    changes = {"lora_rank": 2, **changes}
    config = make_config(batch_size=8, sequence_length=256, **changes)
    return plan_program.compiled_bytes(geometry, config)


def test_memory_hardly_grows_with_depth():
    usual, remat = (
        step_bytes(4, remat=remat) - step_bytes(2, remat=remat)
        for remat in (False, True)
    )
    kept = 2 * 8 * 256 * 128 * 4  # the float32 inputs of two layers more
    assert kept <= remat < 4 * kept
    assert remat < usual / 4


def test_there_is_one_copy_of_the_gradients():
    """And none of what the optimizer makes of them."""
    changes = {"remat": True, "lora_rank": 64, "moment_dtype": "bfloat16"}
    grown = step_bytes(6, **changes) - step_bytes(4, **changes)
    adapters = 3 * 8 * 64 * (128 + 64) * 4  # a layer's, in float32
    kept = 8 * 256 * 128 * 4  # its input, gone when its gradients come
    assert grown < 2 * (adapters + kept) * 1.1


def test_weights_outside_the_adapters_get_their_gradients_too():
    """Nothing is taken for frozen that somebody differentiates by."""
    model = load(experts="reference")
    ids = jnp.arange(16).reshape(2, 8)
    weights = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    grads = []
    for model.remat in (False, True):
        graph, params, rest = nnx.split(model, weights, ...)

        def loss(params, graph=graph, rest=rest):
            return jnp.mean(nnx.merge(graph, params, rest)(ids) ** 2)

        grads.append(jax.jit(jax.grad(loss))(params))
    one, two = map(jax.tree.leaves, grads)
    assert len(one) == len(two) > 20
    for left, right in zip(one, two, strict=True):
        scale = float(jnp.abs(left).max())
        assert scale > 0
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * scale)


def test_the_first_moment_can_be_bfloat16():
    model = load(experts="reference")
    config = make_config(moment_dtype="bfloat16", learning_rate=1e-3)
    split = split_model(model)
    state = init_state(split, make_optimizer(config))
    (adam,) = (
        part
        for part in jax.tree.leaves(
            state.optimizer, is_leaf=lambda p: isinstance(p, optax.ScaleByAdamState)
        )
        if isinstance(part, optax.ScaleByAdamState)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
    example = Example(np.arange(12, dtype=np.int32), np.ones(12, bool))
    batch = next(Batcher.from_config(config, config.batch_size).once([example] * 4))
    step = make_train_step(split.graph, config)
    losses = []
    for _ in range(3):
        state, metrics = step(state, split.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.lora)} == {
        jnp.dtype("float32")
    }
