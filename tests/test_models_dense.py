"""Projections of models in stores: which, what they compute, who frees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_checkpoint import FAMILIES, make_model, save, torch_logits

from ktjax.config import LoRAConfig
from ktjax.models import from_pretrained
from ktjax.nn import FrozenLinear

IDS = np.random.default_rng(0).integers(2, 101, (2, 12))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(make_model(family="deepseek_v2"), tmp_path_factory.mktemp("model"))


def load(path, **kwargs):
    return from_pretrained(path, **{"dtype": jnp.float32, **kwargs})


def logits(model):
    return np.asarray(nnx.jit(lambda m, i: m(i))(model, jnp.asarray(IDS)))


def stored(model):
    """Where `FrozenLinear`s are, and the formats of their stores."""
    return {
        ".".join(map(str, at)): node.store.format
        for at, node in nnx.iter_graph(model)
        if isinstance(node, FrozenLinear)
    }


def test_which_projections_are_in_stores(path):
    assert stored(load(path, dense="xla")) == {}
    found = stored(load(path, dense="bf16"))
    assert set(found.values()) == {"bf16"}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert found.keys() == {
        "head",
        *(f"layers.{i}.attention.{name}" for i in range(2) for name in attention),
        *(f"layers.0.mlp.{name}" for name in mlp),  # dense
        *(f"layers.1.mlp.shared_experts.{name}" for name in mlp),
    }
    assert set(stored(load(path, dense="int8")).values()) == {"int8"}


def test_the_default_is_a_store_where_it_is_faster_and_exact(path, tmp_path):
    assert stored(load(path)) == {}  # too small, all of them
    model = make_model(intermediate_size=1024, mlp_only_layers=[0, 1])
    large = {
        f"layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up", "down")
    }
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[3, 5] = 1 + 2**-12  # what bfloat16 lacks
    path = save(model, tmp_path)
    ours = load(path)
    assert stored(ours).keys() == large - {"layers.1.mlp.up_proj"}
    assert relative(logits(ours), torch_logits(model, IDS)) <= 1e-4
    # A model in bfloat16 rounds it anyway.
    assert stored(load(path, dtype=jnp.bfloat16)).keys() == large
    assert stored(load(path, experts="reference")) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    model = make_model(family=family)
    ours = load(save(model, tmp_path), dense="bf16")
    assert stored(ours)
    assert relative(logits(ours), torch_logits(model, IDS)) <= 1e-4


def test_formats_change_values_a_little(path):
    # Eight bits a weight: 1% of each of some ten products.
    want = logits(load(path, dense="xla"))
    assert 1e-4 < relative(logits(load(path, dense="int8")), want) <= 0.1


def test_gradients_go_through(path):
    lora = LoRAConfig(4, 8.0)
    grads = []
    for dense in ("bf16", "xla"):
        model = load(path, dense=dense, lora=lora)
        for name, value in nnx.iter_graph(model):
            if isinstance(value, nnx.LoRAParam) and name[-1].endswith("_b"):
                value.set_value(jnp.full(value.shape, 0.1))

        def loss(model):
            losses, _ = model.token_losses(
                jnp.asarray(IDS[:, :-1]), jnp.asarray(IDS[:, 1:])
            )
            return jnp.mean(losses)

        gradient = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
        grads.append(jax.block_until_ready(gradient(model)))
        model.close()
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        assert relative(np.asarray(a), np.asarray(b)) <= 1e-3


def test_the_model_owns_its_stores(path):
    model = load(path, dense="bf16")
    logits(model)
    model.close()
    with pytest.raises((RuntimeError, ValueError), match=r"ktjax\.linear: the store"):
        nnx.jit(lambda head, x: head(x))(model.head, jnp.zeros((1, 64)))


def test_bad_choices(path):
    with pytest.raises(ValueError, match="dense must be None, xla or one of bf16"):
        load(path, dense="fp16")
    with pytest.raises(ValueError, match=r"lm_head\.weight: LinearStore: in_features"):
        load(path, dense="int4_kgroup")
