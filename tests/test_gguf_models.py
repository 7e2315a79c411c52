"""Whole models from GGUF files against transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers
from gguf_models import save_values, write_gguf_model
from models_checkpoint import (
    FAMILIES,
    GLM4_MOE_PLAIN,
    SIZES,
    make_model,
    save,
    torch,
    torch_logits,
)

from ktjax.io import CheckpointError
from ktjax.models import ConfigError, ModelConfig, from_pretrained, generate_batch

VOCAB = SIZES["vocab_size"]
# float32 sums in another order; experts' operands have 16 bits (design.md, Precision).
TOLERANCE = 1e-4

_ROPE = {**FAMILIES["deepseek_v3"]["rope_parameters"], "mscale": 0.7}
VARIANTS = {
    **{name: (name, {}) for name in FAMILIES if "deepseek" not in name},
    # GGUF keeps one of DeepSeek's two weights, which its models have alike.
    **{
        name: (name, {"rope_parameters": _ROPE})
        for name in FAMILIES
        if "deepseek" in name
    },
    "qwen3 tied, yarn, biases": (
        "qwen3_moe",
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16,
                "beta_slow": 2,
            },
        },
    ),
    "mixtral wide heads": ("mixtral", {"head_dim": 32}),
    "glm4_moe plain": ("glm4_moe", GLM4_MOE_PLAIN),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(make_model(seed=3), tmp_path_factory.mktemp("model"))


def logits(path, ids, **options):
    model = from_pretrained(path, **{"dtype": jnp.float32, **options})
    try:
        return np.asarray(nnx.jit(lambda m, i: m(i))(model, jnp.asarray(ids)))
    finally:
        model.close()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_architecture_equals_transformers(name, ids, tmp_path):
    family, changes = VARIANTS[name]
    theirs = make_model(seed=3, family=family, **changes)
    source = save(theirs, tmp_path / "source")
    write_gguf_model(source, tmp_path / "model.gguf")
    want = torch_logits(theirs, ids)
    assert relative(logits(tmp_path / "model.gguf", ids), want) <= TOLERANCE
    config = ModelConfig.from_pretrained(tmp_path / "model.gguf")
    assert config.eos_token_ids == (1,)
    assert config.tie_word_embeddings == changes.get("tie_word_embeddings", False)


@pytest.mark.parametrize(("experts", "dense"), [("Q8_0", "F16"), ("Q4_0", "Q8_0")])
def test_quantised_tensors(source, experts, dense, ids, tmp_path):
    write_gguf_model(source, tmp_path / "m.gguf", experts=experts, dense=dense)
    values = save_values(source, tmp_path / "values", experts=experts, dense=dense)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        values, dtype=torch.float32
    )
    want = torch_logits(theirs, ids)
    assert relative(logits(tmp_path / "m.gguf", ids), want) <= TOLERANCE
    assert relative(logits(source, ids), want) > 10 * TOLERANCE


def converted(source, path, **options):
    write_gguf_model(source, path / "model.gguf", **options)
    return path / "model.gguf"


def test_experts_keep_their_blocks(source, tmp_path):
    path = converted(source, tmp_path, experts="Q4_0", down="Q8_0")

    def formats(**options):
        model = from_pretrained(path, **options)
        stores = [layer.experts.store for _, layer in model.moe_layers()]
        return {(store.format, store.down_format) for store in stores}

    assert formats() == formats(experts="auto") == {("q4_0", "q8_0")}
    assert formats(experts="bf16") == {("bf16", "bf16")}
    with pytest.warns(UserWarning, match="stored as q4_0 are quantised again as int8"):
        formats(experts="int8")


def test_projections_in_stores(source, ids, tmp_path):
    """Dense tensors in blocks, and what LinearStore makes of their values."""
    path = converted(source, tmp_path, dense="Q8_0")
    model = from_pretrained(path, dense="int8")
    assert model.layers[0].attention.q_proj.store.format == "int8"
    model.close()
    want = logits(path, ids)
    # Two quantisations to 8 bits of a row of weights: 2^-8 of the largest each.
    assert 1e-4 < relative(logits(path, ids, dense="int8"), want) < 0.1


def test_greedy_generation_token_for_token(source, tmp_path):
    path = converted(source, tmp_path, experts="Q8_0", dense="Q8_0")
    values = save_values(source, tmp_path / "values", experts="Q8_0", dense="Q8_0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        values, dtype=torch.float32
    )
    prompt = np.random.default_rng(3).integers(2, VOCAB, 11).tolist()
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=-2,
        pad_token_id=0,
    )
    ours = from_pretrained(path, dtype=jnp.float32)
    (got,) = generate_batch(ours, [prompt], 64, eos_ids=())
    assert got == out[0, len(prompt) :].tolist()
    assert len(set(got)) > 4


def test_a_split_model(source, ids, tmp_path):
    path = converted(source, tmp_path, experts="Q8_0")
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf_model(source, folder / "model.gguf", experts="Q8_0", parts=10)
    parts = sorted(folder.iterdir())
    assert len(parts) > 2
    want = logits(path, ids)
    for name in (folder, parts[1]):
        np.testing.assert_array_equal(logits(name, ids), want)


def test_an_older_deepseek_file(ids, tmp_path):
    """kv_b_proj as one tensor, with or without its halves; widths of the heads."""
    theirs = make_model(seed=3, family="deepseek_v3", rope_parameters=_ROPE)
    source = save(theirs, tmp_path / "source")
    whole = {
        f"blk.{layer}.attn_kv_b.weight": module.self_attn.kv_b_proj.weight
        for layer, module in enumerate(theirs.model.layers)
    }

    def older(tensors, metadata, drop):
        for name, weight in whole.items():
            tensors[name] = weight.detach().numpy(), "F32"
            if drop:
                for half in ("attn_k_b", "attn_v_b"):
                    del tensors[name.replace("attn_kv_b", half)]
        for key in ("key_length", "value_length"):
            mla = metadata.pop(f"deepseek2.attention.{key}_mla")
            metadata[f"deepseek2.attention.{key}"] = mla

    def flat(tensors, metadata):
        k_b = "blk.0.attn_k_b.weight"
        tensors[k_b] = tensors[k_b][0].reshape(4, -1), "F32"

    with pytest.raises(CheckpointError, match=r"attn_k_b.weight has shape \[4, 384\]"):
        from_pretrained(converted(source, tmp_path, change=flat))
    for drop in (True, False):
        write_gguf_model(
            source, tmp_path / "m.gguf", change=lambda *a, d=drop: older(*a, d)
        )
        want = torch_logits(theirs, ids)
        assert relative(logits(tmp_path / "m.gguf", ids), want) <= TOLERANCE


def test_layers_that_predict_further_tokens_are_left_out(ids, tmp_path):
    theirs = make_model(seed=3, family="glm4_moe")
    source = save(theirs, tmp_path / "source")

    def change(tensors, metadata):
        for name in [name for name in tensors if name.startswith("blk.1.")]:
            tensors[name.replace("blk.1.", "blk.2.")] = tensors[name]
        tensors["blk.2.nextn.enorm.weight"] = np.ones(64, np.float32), "F32"
        metadata["glm4moe.block_count"] = 3
        metadata["glm4moe.nextn_predict_layers"] = 1

    path = converted(source, tmp_path, change=change)
    assert relative(logits(path, ids), torch_logits(theirs, ids)) <= TOLERANCE


KEY = "qwen3moe."
REFUSED = {
    "architecture": (
        {"general.architecture": "gemma3"},
        "general.architecture = 'gemma3' is not supported; supported: qwen3moe, qwen2",
    ),
    "no experts": ({f"{KEY}expert_count": None}, r"qwen3moe\.expert_count is missing"),
    "no eps": (
        {f"{KEY}attention.layer_norm_rms_epsilon": None},
        r"qwen3moe\.attention\.layer_norm_rms_epsilon is missing",
    ),
    "no heads": ({f"{KEY}attention.head_count": 0}, "head_count must be positive"),
    "gating": ({f"{KEY}expert_gating_func": 3}, "expert_gating_func = 3 is not supp"),
    "rope": ({f"{KEY}rope.scaling.type": "longrope"}, r"rope\.scaling\.factor is miss"),
    "longrope": (
        {f"{KEY}rope.scaling.type": "longrope", f"{KEY}rope.scaling.factor": 2.0},
        "of type 'longrope' is not supported",
    ),
    "attention factor": (
        {f"{KEY}rope.scaling.yarn_attn_factor": 0.5},
        "yarn_attn_factor = 0.5 is not supported",
    ),
    "window": (
        {f"{KEY}attention.sliding_window": 64},
        "sliding_window = 64 is not supported: it is shorter than .* = 256",
    ),
    "no string": (
        {"general.architecture": ["qwen3moe"]},
        r"architecture = \['qwen3moe'\] is not supported",
    ),
    "heads by layer": (
        {f"{KEY}attention.head_count": [4, 4]},
        r"qwen3moe\.attention\.head_count must be positive, got \[4, 4\]",
    ),
    "a scale": (
        {f"{KEY}attention.scale": [0.5]},
        r"attention\.scale = \[0.5\] is not supported",
    ),
    "half a head": ({f"{KEY}rope.dimension_count": 8}, "dimension_count = 8 is not"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_are_refused(name, source, tmp_path):
    changes, message = REFUSED[name]

    def change(tensors, metadata):
        metadata |= changes
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]

    path = converted(source, tmp_path, change=change)
    with pytest.raises(ConfigError, match=message) as caught:
        from_pretrained(path)
    assert str(path) in str(caught.value)


def test_tensors_that_do_not_fit(source, tmp_path):
    def refused(error, message, drop=None, said=(), **tensors):
        def change(written, metadata):
            metadata.update(said)
            if drop is not None:
                del written[drop]
            for name, array in tensors.items():
                written[name] = array, "F32"

        with pytest.raises(error, match=message):
            from_pretrained(converted(source, tmp_path, change=change))

    q = "blk.1.attn_q.weight"
    refused(KeyError, r"no tensor 'blk\.1\.attn_q\.weight' .* close:", q)
    refused(KeyError, r"no tensor 'blk\.0\.ffn_up_exps", "blk.0.ffn_up_exps.weight")
    wrong = {q: np.zeros((64, 64), np.float32)}
    refused(
        ValueError,
        r"blk\.1\.attn_q\.weight has shape \[64, 64\], .* for \[128",
        **wrong,
    )
    many = {"qwen3moe.block_count": 2**31 - 1}
    refused(KeyError, r"no tensor 'blk\.2147483646\.attn_norm", None, many)
    more = {"rope_freqs.weight": np.ones(16, np.float32)}
    refused(
        CheckpointError, "no place in a qwen3_moe model, .*: rope_freqs.weight", **more
    )


def test_types_that_are_not_read(source, tmp_path):
    path = converted(source, tmp_path)
    content, name = path.read_bytes(), b"blk.0.attn_q.weight"
    # After the name: the number of dimensions, two of them, and the type's number.
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[at] == 0
    # I32 takes as much space as F32.
    path.write_bytes(content[:at] + b"\x1a" + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"attn_q.weight: type I32 is not read"):
        from_pretrained(path)
