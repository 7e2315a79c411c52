"""Every model family against transformers: logits, generation, packing, training."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models_checkpoint import (
    FAMILIES,
    GLM4_MOE_PLAIN,
    SIZES,
    make_model,
    save,
    torch,
    torch_logits,
    transformers,
)
from train_standin import Silent, make_config

from ktjax.config import LoRAConfig
from ktjax.models import (
    ConfigError,
    KVCache,
    ModelConfig,
    from_pretrained,
    generate_batch,
)
from ktjax.nn import CorrectionBias, load_balancing_loss
from ktjax.train.data import Example
from ktjax.train.loop import fit

VOCAB = SIZES["vocab_size"]
NEW = 64

# What configurations of a family differ in, beside the family itself.
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES if family != "qwen3_moe"},
    "qwen3 yarn": (
        "qwen3_moe",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "qwen3 linear": ("qwen3_moe", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "qwen2 sparse step": (
        "qwen2_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "mixtral wide heads": ("mixtral", {"head_dim": 32, "sliding_window": 256}),
    "olmoe clip": ("olmoe", {"clip_qkv": 0.5, "attention_bias": True}),
    "deepseek_v3 halves": (
        "deepseek_v3",
        {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False},
    ),
    "glm4_moe plain": ("glm4_moe", GLM4_MOE_PLAIN),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model, ours, and the directory."""
    theirs = make_model(seed=5, family=request.param)
    path = save(theirs, tmp_path_factory.mktemp("model"))
    return theirs, load(path), path


def load(path, **kwargs):
    return from_pretrained(path, **{"dtype": jnp.float32, **kwargs})


@nnx.jit
def forward(model, ids, segments):
    """One function, so that models of one structure share a program."""
    output = model.forward(ids, segment_ids=segments)
    return model.logits(output.hidden), output.routings


def run(model, ids, segments=None):
    segments = np.ones_like(ids) if segments is None else segments
    return np.asarray(forward(model, jnp.asarray(ids), jnp.asarray(segments))[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_equal_transformers(name, ids, tmp_path):
    family, changes = VARIANTS[name]
    theirs = make_model(seed=3, family=family, **changes)
    want = torch_logits(theirs, ids)
    path = save(theirs, tmp_path / "per expert")
    got = run(load(path), ids)
    assert relative(got, want) <= 1e-4
    assert relative(run(load(path, experts="reference"), ids), want) <= 1e-4
    fused = load(save(theirs, tmp_path / "fused", save_original_format=False))
    np.testing.assert_array_equal(run(fused, ids), got)


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_float16_checkpoints(family, fused, ids, tmp_path):
    half = make_model(seed=5, family=family).half()
    path = save(half, tmp_path, save_original_format=not fused)
    # Read again: half() has rounded the frequencies of the positions too.
    auto = transformers.AutoModelForCausalLM
    want = torch_logits(auto.from_pretrained(path, dtype=torch.float32), ids)
    assert relative(run(load(path, experts="reference"), ids), want) <= 1e-4
    # Weights below 2^-14 may have more bits in float16 than in bfloat16.
    assert relative(run(load(path), ids), want) <= 2**-8


def test_greedy_generation_token_for_token(pair):
    theirs, ours, _ = pair
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, VOCAB, n).tolist() for n in (5, 17)]
    want = []
    for prompt in prompts:
        out = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=-2,
            pad_token_id=0,
        )
        want.append(out[0, len(prompt) :].tolist())
    assert generate_batch(ours, prompts, NEW, eos_ids=()) == want
    assert len(set(want[0])) > 4


def test_cache_equals_no_cache(pair, ids):
    _, ours, _ = pair

    @nnx.jit
    def in_two_parts(model, ids):
        cache = KVCache.empty(model.config, 2, 32, jnp.float32)
        index = jnp.broadcast_to(jnp.arange(24), (2, 24))
        first = model.forward(ids[:, :9], positions=index[:, :9], cache=cache)
        second = model.forward(ids[:, 9:], positions=index[:, 9:], cache=first.cache)
        return model.logits(jnp.concatenate([first.hidden, second.hidden], axis=1))

    # Same operations in float32, in sums of another order.
    assert relative(in_two_parts(ours, jnp.asarray(ids)), run(ours, ids)) <= 1e-5


def test_packed_segments_equal_separate_sequences(pair, ids):
    _, ours, _ = pair
    segments = np.tile(np.repeat([1, 2, 0], [9, 11, 4]), (2, 1))
    got = run(ours, ids, segments)
    other = ids.copy()
    other[:, 20:] = 5
    np.testing.assert_array_equal(got[:, :20], run(ours, other, segments)[:, :20])
    for part in (slice(9), slice(9, 20)):
        # Same operations in float32, in sums of another shape.
        assert relative(got[:, part], run(ours, ids[:, part])) <= 1e-5


def test_a_latent_cache_is_narrow(tmp_path):
    config = ModelConfig.from_pretrained(
        save(make_model(family="deepseek_v3"), tmp_path)
    )
    cache = KVCache.empty(config, 2, 16, jnp.bfloat16)
    shapes = {leaf.shape for leaf in jax.tree.leaves(cache)}
    assert shapes == {(2, 16, 1, 24 + 8)}
    assert len(jax.tree.leaves(cache)) == config.num_hidden_layers


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "olmoe"])
def test_router_loss_equals_transformers(family, ids, tmp_path):
    theirs = make_model(seed=5, family=family)
    with torch.no_grad():
        want = theirs(torch.tensor(ids), output_router_logits=True).aux_loss
    # The loss counts choices, and the kernels' rounding might turn a near-tie.
    ours = load(save(theirs, tmp_path), experts="reference")
    routings = nnx.jit(lambda m, i: m(i, return_routings=True)[1])(
        ours, jnp.asarray(ids)
    )
    aux = load_balancing_loss(routings)
    np.testing.assert_allclose(aux, want, rtol=1e-5)


def test_routing_statistics(pair, ids):
    """What the load-balancing loss is made of, whatever the scores are."""
    _, ours, _ = pair
    ones = jnp.ones(ids.shape, jnp.int32)
    _, routings = forward(ours, jnp.asarray(ids), ones)
    assert len(routings) == len(ours.moe_layers()) > 0
    for routing in routings:
        np.testing.assert_allclose(np.sum(routing.probability), 1.0, rtol=1e-5)
        k = ours.config.num_experts_per_tok
        np.testing.assert_allclose(np.sum(routing.load), k, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_adapters_alone_and_learns(family, tmp_path):
    path = save(make_model(seed=5, family=family), tmp_path / "model")
    model = load(path, lora=LoRAConfig(rank=4, alpha=8.0), rngs=nnx.Rngs(1))
    before = jax.tree.map(np.array, nnx.split(model, nnx.LoRAParam, ...)[1:])
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(2, VOCAB, 16, np.int32), np.arange(16) >= 4)
        for _ in range(8)
    ]
    for example in examples:
        example.ids[example.learn] = 7
    config = make_config(steps=8, learning_rate=3e-2, router_aux_weight=0.01)
    result = fit(model, examples, [], config, tmp_path / "run", Silent())
    assert result.losses[-1] < 0.5 * result.losses[0]
    after = jax.tree.map(np.array, nnx.split(model, nnx.LoRAParam, ...)[1:])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert all(jax.tree.leaves(changed[0]))
    assert not any(jax.tree.leaves(changed[1]))
    model.close()


def test_bfloat16_keeps_the_correction_bias(tmp_path, ids):
    theirs = make_model(family="deepseek_v3")
    model = load(save(theirs, tmp_path), dtype=jnp.bfloat16)
    biases = jax.tree.leaves(nnx.state(model, CorrectionBias))
    for layer, got in zip(theirs.model.layers[1:], biases, strict=True):
        want = layer.mlp.gate.e_score_correction_bias.numpy()
        np.testing.assert_array_equal(np.asarray(got), want)
    assert np.all(np.isfinite(run(model, ids).astype(np.float32)))


def test_yarn_of_deepseek_v3():
    """The published configuration: the scale is the query's, the tables' cancel."""
    raw = make_model(family="deepseek_v3").config.to_dict() | {
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rope_parameters": None,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    config = ModelConfig.from_dict(raw)
    mscale = 0.1 * math.log(40) + 1
    np.testing.assert_allclose(config.attention.scale, 192**-0.5 * mscale**2)
    assert config.rope.magnitude == 1.0
    cos, sin = config.rope.tables(jnp.array([[1]]))
    angle = np.arctan2(np.asarray(sin), np.asarray(cos)).ravel()
    plain = 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    # Pair i turns 4096 plain_i / 2π times: 32 times at i = 10.5, once at i = 22.5.
    np.testing.assert_allclose(angle[:11], plain[:11], rtol=1e-5)
    np.testing.assert_allclose(angle[23:], plain[23:] / 40, rtol=1e-5)
    assert np.all((angle < plain)[11:23] & (angle > plain / 40)[11:23])


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("mixtral", {"sliding_window": 128}, "sliding_window = 128 is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not"),
        ("mixtral", {"num_local_experts": None}, "num_experts is missing"),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": 0},
            "must be positive, got 0",
        ),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv must be a positive number, got -1"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method = 'best' is not supp"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supp"),
        ("deepseek_v2", {"topk_group": 5}, "1 to groups = 4, got 5"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not"),
        ("deepseek_v3", {"n_group": 3}, "must be a multiple of groups = 3"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "must be even, got 7"),
        (
            "glm4_moe",
            {"first_k_dense_replace": -1},
            "must be an integer from 0, got -1",
        ),
        (
            "glm4_moe",
            {"model_type": "glm4_moe_lite"},
            "'glm4_moe_lite' is not supported",
        ),
    ],
)
def test_config_errors_name_the_feature(family, change, message, tmp_path):
    raw = json.loads(make_model(family=family).config.to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "dim", "theta"), [("glm4_moe", 16, 1e4), ("mixtral", 16, 1e6)]
)
def test_rope_defaults_are_the_family_s(family, dim, theta):
    raw = make_model(family=family).config.to_dict()
    rope = ModelConfig.from_dict({**raw, "rope_parameters": None}).rope
    assert (rope.dim, rope.theta) == (dim, theta)


def test_the_latent_rank_of_queries_must_be_said(tmp_path):
    raw = make_model(family="deepseek_v2_lite").config.to_dict()
    del raw["q_lora_rank"]
    with pytest.raises(ConfigError, match="q_lora_rank is missing; null stands for"):
        ModelConfig.from_dict(raw)
