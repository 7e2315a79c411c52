"""The decoder against transformers, segments, routing loss, loading errors."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_checkpoint import SIZES, make_model, save, torch, torch_logits

from ktjax.config import LoRAConfig
from ktjax.models import ConfigError, ModelConfig, from_pretrained
from ktjax.nn import load_balancing_loss


@pytest.fixture(scope="module")
def theirs():
    return make_model()


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return save(theirs, tmp_path_factory.mktemp("model"))


def load(path, **kwargs):
    kwargs = {"dtype": jnp.float32, **kwargs}
    return from_pretrained(path, **kwargs)


@pytest.fixture(scope="module")
def ours(path):
    return load(path)


def run(model, ids, **kwargs):
    return np.asarray(nnx.jit(lambda m, i: m(i, **kwargs))(model, jnp.asarray(ids)))


VARIANTS = {
    "defaults": {},
    "dense layer": {"mlp_only_layers": [0]},
    "sparse step": {"decoder_sparse_step": 2},
    "raw weights": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "one kv head": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("experts", ["bf16", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_equal_transformers(name, experts, ids, tmp_path):
    model = make_model(seed=3, **VARIANTS[name])
    want = torch_logits(model, ids)
    got = run(load(save(model, tmp_path), experts=experts), ids)
    assert got.shape == want.shape
    assert relative(got, want) <= 1e-4


def test_sharded_checkpoint(theirs, ours, ids, tmp_path):
    save(theirs, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(run(load(tmp_path), ids), run(ours, ids))


def test_a_closed_model_says_so(path, ids):
    model = load(path)
    run(model, ids)
    assert model.moe_layers()
    model.close()
    with pytest.raises((RuntimeError, ValueError), match="is closed"):
        run(model, ids)


def test_bfloat16_logits_are_within_bfloat16_rounding(ids, tmp_path):
    # Every token uses every expert: otherwise rounding may send a token elsewhere, and
    # then its error says nothing about rounding.
    everywhere = {"num_experts_per_tok": SIZES["num_experts"]}
    exact = make_model(**everywhere)
    want = torch_logits(exact, ids)
    model = load(save(exact, tmp_path), dtype=jnp.bfloat16)
    assert model.embed.embedding.dtype == jnp.bfloat16
    logits = run(model, ids)
    assert logits.dtype == jnp.bfloat16
    theirs = torch_logits(make_model("bfloat16", **everywhere), ids)
    # About fourteen tensors of a layer, the embedding and the logits are rounded in
    # turn, each by at most 2^-9 of its size; independent errors add up as their root
    # sum of squares.
    bound = 2**-9 * np.sqrt(14 * SIZES["num_hidden_layers"] + 2)
    assert relative(logits.astype(np.float32), want) <= bound
    # And not worse than transformers in the same dtype, but for the luck of rounding.
    assert relative(logits.astype(np.float32), want) <= 1.1 * relative(theirs, want)


def test_router_loss_equals_transformers(ids, tmp_path, theirs, ours):
    mask = np.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        want = theirs(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            output_router_logits=True,
        ).aux_loss
    routings = nnx.jit(lambda m, i, s: m(i, segment_ids=s, return_routings=True)[1])(
        ours, jnp.asarray(ids), jnp.asarray(mask)
    )
    np.testing.assert_allclose(load_balancing_loss(routings), want, rtol=1e-5)


def test_packed_segments_equal_separate_sequences(ours):
    rng = np.random.default_rng(1)
    lengths = (9, 1, 12)
    parts = [rng.integers(2, SIZES["vocab_size"], (1, n)) for n in lengths]
    packed = np.concatenate([*parts, np.zeros((1, 6), int)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 6])[None]
    positions = np.concatenate([*map(np.arange, lengths), np.arange(6)])[None]
    counted = run(ours, packed, segment_ids=jnp.asarray(segments))
    given = run(
        ours,
        packed,
        segment_ids=jnp.asarray(segments),
        positions=jnp.asarray(positions),
    )
    np.testing.assert_array_equal(counted, given)
    assert np.all(np.isfinite(counted))
    start = 0
    for part in parts:
        got = counted[:, start : start + part.shape[1]]
        # Same operations in float32, in sums of another shape.
        assert relative(got, run(ours, part)) <= 1e-5
        start += part.shape[1]


def test_padding_does_not_leak(ours, ids):
    segments = jnp.asarray((np.arange(24) < 16).astype(np.int32)[None].repeat(2, 0))
    other = ids.copy()
    other[:, 16:] = 5
    a, b = (run(ours, value, segment_ids=segments)[:, :16] for value in (ids, other))
    np.testing.assert_array_equal(a, b)
    assert relative(a, run(ours, ids[:, :16])) <= 1e-5


def test_lora_starts_as_the_base_and_takes_gradients(path, ours, ids):
    model = load(path, lora=LoRAConfig(rank=4, alpha=8.0), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(run(model, ids), run(ours, ids), rtol=1e-6, atol=1e-6)
    lora = nnx.state(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(lora)) == 6 * SIZES["num_hidden_layers"]

    def loss(model):
        logits, routings = model(jnp.asarray(ids), return_routings=True)
        aux = load_balancing_loss(routings)
        return jnp.mean(jax.nn.logsumexp(logits, -1)) + 0.01 * aux

    grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    for layer, mlp in model.moe_layers():
        assert mlp.experts.scaling == 2.0
        # With B zero, B has a gradient and A has none.
        values = grad["layers"][layer]["mlp"]["experts"]
        for name in ("gate", "up", "down"):
            assert np.any(np.asarray(values[f"{name}_b"][...]))
            assert not np.any(np.asarray(values[f"{name}_a"][...]))
    other = load(path, lora=LoRAConfig(rank=4, alpha=8.0), rngs=nnx.Rngs(2))
    a, b = (jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, other))
    assert any(np.any(np.asarray(x != y)) for x, y in zip(a, b, strict=True))


def test_lora_equals_merged_weights(theirs, path, ids, tmp_path):
    """An adapter must do what adding s·B·A to transformers' weights does."""
    model = load(path, lora=LoRAConfig(rank=4, alpha=8.0))
    merged = make_model()
    rng = np.random.default_rng(5)
    for layer, mlp in model.moe_layers():
        experts = mlp.experts
        for name in ("gate_b", "up_b", "down_b"):
            param = getattr(experts, name)
            value = 0.1 * rng.normal(size=param.shape)
            param.set_value(jnp.asarray(value, jnp.float32))
        delta = {
            name: 2.0
            * np.einsum(
                "eor,eri->eoi",
                getattr(experts, f"{name}_b")[...],
                getattr(experts, f"{name}_a")[...],
            )
            for name in ("gate", "up", "down")
        }
        target = merged.model.layers[layer].mlp.experts
        gate_up = np.concatenate([delta["gate"], delta["up"]], axis=1)
        with torch.no_grad():
            target.gate_up_proj += torch.tensor(gate_up)
            target.down_proj += torch.tensor(delta["down"])
    want = torch_logits(merged, ids)
    assert relative(want, torch_logits(theirs, ids)) > 0.01
    assert relative(run(model, ids), want) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "of type 'llama3' is not"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is mi"),
        ({"rope_scaling": {"type": "yarn"}}, "contradict each other"),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        ({"layer_types": ["sliding_attention"]}, "'sliding_attention' is not"),
        ({"head_dim": 31}, "must be even, got 31"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers must be integers from 0"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config = .* not supported",
        ),
        (
            {"num_experts_per_tok": 7},
            "num_experts_per_tok = 7 must be 1 to num_experts = 6",
        ),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -1}, "vocab_size must be positive, got -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": "end"}, "eos_token_id must be token ids"),
    ],
)
def test_config_errors_name_the_feature(path, tmp_path, change, message):
    raw = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)


def test_config_reads_both_forms_of_rope(path):
    config = ModelConfig.from_pretrained(path)
    assert config.rope.theta == SIZES["rope_theta"]
    assert config.eos_token_ids == (1,)
    raw = json.loads((path / "config.json").read_text())
    del raw["rope_parameters"]
    old = ModelConfig.from_dict({**raw, "rope_theta": 123.0})
    rope = dataclasses.replace(config.rope, theta=123.0)
    assert old == dataclasses.replace(config, rope=rope)


def test_loading_errors(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="experts must be one of auto, bf16"):
        from_pretrained(path, experts="int3")
    with pytest.raises(ValueError, match="dtype must be bfloat16 or float32"):
        from_pretrained(path, dtype=jnp.float16)
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    raw = json.loads((path / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**raw, "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \[101, 64\]"):
        from_pretrained(tmp_path)
    file.write_text(json.dumps({**raw, "moe_intermediate_size": 16}))
    with pytest.raises(ValueError, match=r"layer 0 is \[6, 32, 64\]"):
        from_pretrained(tmp_path)
    file.write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    with pytest.raises(KeyError, match=r"no tensor 'model\.layers\.2"):
        from_pretrained(tmp_path)


def test_input_errors(ours):
    with pytest.raises(ValueError, match=r"must be \[batch, sequence\], got shape \[3"):
        ours(jnp.zeros(3, jnp.int32))


def test_dense_model_has_no_router_loss(tmp_path, ids):
    model = load(save(make_model(mlp_only_layers=[0, 1]), tmp_path))
    assert model.moe_layers() == []
    assert model(jnp.asarray(ids), return_routings=True)[1] == ()
    with pytest.raises(ValueError, match="no layer has a router"):
        load_balancing_loss([])
