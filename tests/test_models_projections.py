"""LoRA beyond the routed experts: values, gradients, which modules have it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx
from linear_cases import Case, make_inputs

import ktjax
from ktjax import assets
from ktjax.config import LoRAConfig
from ktjax.io import Adapter, AdapterError
from ktjax.lora import LinearLoRA
from ktjax.models import apply_adapter, decoder, extract_adapter, from_pretrained
from ktjax.models.targets import adapted
from ktjax.nn import AdaptedLinear, FrozenLinear, token_losses
from ktjax.nn.dense import linear
from ktjax.ops.dropout import keep

TARGETS = ("experts", "q_proj", r"layers\.[01]\.self_attn\.o_proj", "lm_head")
NAMES = {
    "lm_head",
    *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
    *(f"model.layers.{i}.self_attn.o_proj" for i in range(2)),
}
IDS = np.random.default_rng(0).integers(2, 90, (2, 12))


def load(targets=TARGETS, **options):
    lora = LoRAConfig(4, 8.0, targets=targets)
    options = {"dtype": "float32", "experts": "reference", "lora": lora, **options}
    return from_pretrained(assets.demo_model(), **options)


def fill(model, scale=0.2):
    """Random adapters, the same for every model with the same ones."""
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.LoRAParam)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype))
    nnx.update(model, state)
    return model


@nnx.jit
def logits(model):
    return model(jnp.asarray(IDS))


def loss(model):
    losses, _ = model.token_losses(jnp.asarray(IDS[:, :-1]), jnp.asarray(IDS[:, 1:]))
    return jnp.mean(losses)


def gradients(model):
    of_adapters = nnx.DiffState(0, nnx.LoRAParam)
    return jax.tree.leaves(nnx.jit(nnx.grad(loss, argnums=of_adapters))(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_projection_of_xla_with_adapters(dtype):
    """Against the reference; bfloat16 rounds the base product and the sum."""
    inputs = make_inputs(Case(rows=12, rank=4))
    out, inner = inputs.weight.shape
    base = linear(inner, out, use_bias=True, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    base.kernel.set_value(jnp.asarray(inputs.weight.T, dtype))
    bias = jnp.linspace(-1, 1, out).astype(dtype)
    base.bias.set_value(bias)
    module = AdaptedLinear(base, lora_rank=4, lora_alpha=8.0, rngs=nnx.Rngs(0))
    x = inputs.x.astype(dtype)
    np.testing.assert_array_equal(module(x), base(x))  # B is zero
    module.lora_a[...], module.lora_b[...] = inputs.lora.a, inputs.lora.b
    got = module(x)
    assert got.dtype == jnp.dtype(dtype)
    want = ktjax.reference.linear(
        x.astype(jnp.float32), inputs.weight, inputs.lora, scaling=2.0
    ) + bias.astype(jnp.float32)
    # Three roundings of at most 2^-9 each (product, bias, sum), or float32's.
    assert relative(got, want) <= (3 * 2**-9 if dtype == "bfloat16" else 1e-6)
    assert set(nnx.state(module, nnx.LoRAParam)) == {"lora_a", "lora_b"}


@pytest.mark.parametrize("kind", [AdaptedLinear, FrozenLinear])
def test_dropout_is_of_the_adapters_input(kind, monkeypatch):
    inputs = make_inputs(Case(rows=12, rank=4))
    out, inner = inputs.weight.shape
    if kind is AdaptedLinear:
        base = linear(inner, out, dtype=jnp.float32, rngs=nnx.Rngs(0))
        base.kernel.set_value(jnp.asarray(inputs.weight.T, jnp.float32))
    else:
        base = ktjax.LinearStore.from_array(inputs.weight)
    module = kind(base, lora_rank=4, lora_alpha=8.0, dropout=0.25, rngs=nnx.Rngs(0))
    module.lora_a[...], module.lora_b[...] = inputs.lora.a, inputs.lora.b
    x = inputs.x.astype(jnp.float32).reshape(3, 4, inner)
    assert relative(module(x), module(x)) > 0.01  # another mask
    module.eval()
    plain = ktjax.reference.linear(x, inputs.weight, inputs.lora, scaling=2.0)
    assert relative(module(x), plain) <= 1e-4
    module.train()
    seed = jnp.array([1, 2], jnp.uint32)
    monkeypatch.setattr(type(module.dropout), "seed", lambda self: seed)
    seen = jnp.where(keep(seed, 12, inner, "x", 0.25).reshape(x.shape), x, 0) / 0.75
    adapters = inputs.lora
    want = ktjax.reference.linear(x, inputs.weight)
    want += 2.0 * (seen @ adapters.a.T.astype(jnp.float32)) @ adapters.b.T
    assert relative(module(x), want) <= 1e-4


def test_which_modules_have_adapters():
    model = load()
    places = adapted(model)
    assert places.keys() == {0, 1, 2, *NAMES}
    assert {type(places[name]) for name in NAMES} == {AdaptedLinear}
    # The experts start as they do alone.
    alone = load(("experts",))
    assert adapted(alone).keys() == {0, 1, 2}
    for index, experts in adapted(alone).items():
        for mine, theirs in zip(
            experts.lora.arrays(), places[index].lora.arrays(), strict=True
        ):
            np.testing.assert_array_equal(mine, theirs)
    # An untrained adapter changes nothing.
    np.testing.assert_array_equal(logits(model), logits(alone))
    some = load((r"layers\.1\.mlp\.experts", r"layers\.2\.self_attn\..*_proj"))
    kinds = (f"model.layers.2.self_attn.{n}_proj" for n in "qkvo")
    assert adapted(some).keys() == {1, *kinds}


def test_ranks_and_scalings_by_pattern():
    lora = LoRAConfig(
        *(4, 8.0, True),
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 6},
        alpha_pattern={"lm_head": 3.0},
        targets=TARGETS,
    )
    places = adapted(load(lora=lora))
    at = "model.layers.1.self_attn"
    ranks = {f"{at}.q_proj": 2, f"{at}.o_proj": 6, 1: 6, 0: 4, "lm_head": 4}
    for place, rank in ranks.items():
        alpha = 3.0 if place == "lm_head" else 8.0
        assert places[place].lora_rank == rank
        assert places[place].scaling == pytest.approx(alpha / rank**0.5)
    adapter = extract_adapter(load(lora=lora))
    again = load(lora=adapter.lora_config())
    apply_adapter(again, adapter)
    assert list(extract_adapter(again).differences(adapter)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stores_and_xla_agree(dtype):
    """Logits and the gradient of every adapter, of the kernels and of XLA."""
    models = [fill(load(dense=dense, dtype=dtype)) for dense in ("bf16", "xla")]
    assert type(models[0].head) is FrozenLinear
    assert type(models[1].head) is AdaptedLinear
    # Some tens of roundings of 2^-9, or of the kernels' float32, exact to 2^-16.
    limit = 0.05 if dtype == "bfloat16" else 2e-3
    ours, theirs = ([loss(m), *gradients(m)] for m in models)
    assert len(ours) == 1 + 3 * 6 + 2 * len(NAMES)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.linalg.norm(np.asarray(other, np.float32)) > 0
        assert relative(mine, other) <= limit
    models[0].close()


def test_recomputed_layers_have_the_same_gradients():
    want = gradients(fill(load()))
    for got, value in zip(gradients(fill(load(remat=True))), want, strict=True):
        assert relative(got, value) <= 1e-5


def test_dropout_is_the_same_in_stores_and_recomputations():
    """Seeds are drawn in the same order; another mask would be another gradient."""
    lora = LoRAConfig(4, 8.0, targets=TARGETS[:-1], dropout=0.25)
    kinds = {"dense": "bf16", "remat": True}, {"dense": "xla"}
    ours, theirs = (fill(load(lora=lora, **options)) for options in kinds)
    want, loss_of_all = gradients(theirs), loss(theirs)
    for got, value in zip(gradients(ours), want, strict=True):
        assert relative(got, value) <= 2e-3
    theirs.eval()
    assert abs(loss(theirs) - loss_of_all) > 1e-4
    assert extract_adapter(ours).lora_config().dropout == 0
    ours.close()


@pytest.mark.parametrize("dense", ["bf16", "xla"])
def test_dropout_of_the_head_is_that_of_whole_logits(dense, monkeypatch):
    """In chunks of five of 22 tokens, whose logits the backward computes again."""
    lora = LoRAConfig(4, 8.0, targets=("lm_head",), dropout=0.25)
    model, twin = (fill(load(lora=lora, dense=dense)) for _ in range(2))
    vocab = model.config.vocab_size
    in_chunks = functools.partial(token_losses, chunk_values=5 * vocab)
    monkeypatch.setattr(decoder, "token_losses", in_chunks)
    of_adapters = nnx.DiffState(0, nnx.LoRAParam)
    got = nnx.jit(nnx.value_and_grad(loss, argnums=of_adapters))(model)

    seed = twin.head.draw_seed()  # the one that `model` has drawn
    hidden = twin.forward(jnp.asarray(IDS[:, :-1])).hidden.reshape(22, -1)
    seen = jnp.where(keep(seed, *hidden.shape, "x", 0.25), hidden, 0) / 0.75
    kernel = load(dense="xla").head.kernel[...]

    def of_whole(adapters):
        logits = hidden @ kernel + 2 * seen @ adapters.a.T @ adapters.b.T
        chosen = jnp.take_along_axis(logits, IDS[:, 1:].reshape(22, 1), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen[:, 0])

    want = jax.value_and_grad(of_whole)(twin.head.lora)
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(mine, other) <= 2e-3
    again = nnx.jit(loss)(model)
    assert abs(again - got[0]) > 1e-4  # another mask
    model.close()
    twin.close()


def test_adapters_into_a_model_with_others():
    adapter = extract_adapter(load())
    model = load(TARGETS[1:])
    with pytest.raises(AdapterError, match="model has no adapters in layer 0 and"):
        apply_adapter(model, adapter)
    fewer = dict(list(adapter.projections.items())[1:])
    fewer = Adapter(4, 8.0, {}, projections=fewer)
    with pytest.raises(AdapterError, match="adapter has no adapters in lm_head;"):
        apply_adapter(model, fewer)
    name = "model.layers.0.self_attn.q_proj"
    lora = adapter.projections[name]
    for where, array, words in (
        (
            "model.layers.0.mlp.up_proj",
            lora.b,
            "up_proj, which the model does",
        ),
        (name, lora.b[:-1], r"b of model\.layers\.0\.self_attn\.q_proj is \[127"),
    ):
        changed = {**adapter.projections, where: LinearLoRA(lora.a, array)}
        with pytest.raises(AdapterError, match=words):
            apply_adapter(model, Adapter(4, 8.0, {}, projections=changed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latent_attention_with_a_cache_is_that_without(tmp_path, dtype):
    """kv_b_proj's adapters on either side of the cached latents."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from models_checkpoint import make_model, save

    from ktjax.models import KVCache

    path = save(make_model(family="deepseek_v2"), tmp_path)
    targets = ("kv_b_proj", "q_b_proj", r"shared_experts\.up_proj")
    lora = LoRAConfig(4, 8.0, targets=targets)
    model = from_pretrained(path, dtype=dtype, experts="reference", lora=lora)
    plain = np.asarray(logits(model), np.float32)
    fill(model)
    want = np.asarray(logits(model), np.float32)
    assert relative(want, plain) > 0.1
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    cache = KVCache.empty(model.config, 2, 12, model.dtype)

    @nnx.jit
    def with_cache(model, cache):
        ids = jnp.asarray(IDS)
        output = model.forward(ids, positions=positions, cache=cache)
        return model.logits(output.hidden)

    got = with_cache(model, cache)
    assert relative(got, want) <= (0.05 if dtype == "bfloat16" else 1e-5)
