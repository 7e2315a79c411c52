"""Adapters and merged models against PEFT and transformers, float32."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from adapter_cases import make_lora
from models_checkpoint import make_model, save, torch, torch_logits
from peft_cases import load_peft, load_torch, train_a_little, writes_for_peft

from ktjax.io import (
    Adapter,
    AdapterError,
    merge_checkpoint,
    read_adapter,
    write_adapter,
)
from ktjax.io.adapters import Strength
from ktjax.io.adapters.names import FAMILIES
from ktjax.lora import LoRA
from ktjax.models import apply_adapter, from_pretrained

EXPERTS, HIDDEN, WIDTH, RANK = 6, 64, 32, 3
TOLERANCE = 1e-4

SMALL = {
    "vocab_size": 101,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS = {
    "qwen3_moe": {**SMALL, "head_dim": 32, "num_experts": EXPERTS},
    "qwen2_moe": {**SMALL, "num_experts": EXPERTS},
    "mixtral": {**SMALL, "intermediate_size": WIDTH, "num_local_experts": EXPERTS},
    "olmoe": {**SMALL, "intermediate_size": WIDTH, "num_experts": EXPERTS},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {
        **{**SMALL, "head_dim": 16, "n_routed_experts": EXPERTS},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1},
    },
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp("model"))


def make_adapter(base_model, layers=(0, 1), alpha=4.5):
    loras = {}
    for index in layers:
        sizes = {"experts": EXPERTS, "hidden": HIDDEN, "width": WIDTH, "rank": RANK}
        arrays = make_lora(index, **sizes).arrays()
        loras[index] = LoRA(*(np.float32(0.2) * array for array in arrays))
    return Adapter(RANK, alpha, loras, str(base_model))


def our_logits(path, adapter, ids):
    model = from_pretrained(path, dtype=jnp.float32, lora=adapter.lora_config())
    try:
        apply_adapter(model, adapter)
        return np.asarray(model(jnp.asarray(ids)))
    finally:
        model.close()


@writes_for_peft
@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_peft_computes_what_we_do(path, ids, tmp_path, layout):
    adapter = make_adapter(path)
    write_adapter(tmp_path / "adapter", adapter, "qwen3_moe", layout=layout)
    want = our_logits(path, adapter, ids)
    model = load_peft(path, tmp_path / "adapter")
    assert relative(torch_logits(model, ids), want) <= TOLERANCE
    # The adapter matters: without it the logits are others.
    with model.disable_adapter():
        assert relative(torch_logits(model, ids), want) > 0.1
    merged = torch_logits(model.merge_and_unload(), ids)
    assert relative(merged, want) <= TOLERANCE


@writes_for_peft
def test_peft_computes_layers_with_a_strength_of_their_own(path, ids, tmp_path):
    one = make_adapter(path)
    sizes = {"experts": EXPERTS, "hidden": HIDDEN, "width": WIDTH, "rank": RANK + 3}
    arrays = make_lora(7, **sizes).arrays()
    lora = LoRA(*(np.float32(0.2) * array for array in arrays))
    layers = {**one.layers, 1: lora}
    strengths = {1: Strength(RANK + 3, 9.5)}
    adapter = Adapter(one.rank, one.alpha, layers, one.base_model, strengths)
    layout = write_adapter(tmp_path / "adapter", adapter, "qwen3_moe")
    assert layout == "peft-fused"
    want = our_logits(path, adapter, ids)
    assert relative(our_logits(path, one, ids), want) > 0.1
    got = torch_logits(load_peft(path, tmp_path / "adapter"), ids)
    assert relative(got, want) <= TOLERANCE


MADE_BY_PEFT = {
    "one rank": {"r": 4, "lora_alpha": 6},
    "rank pattern": {
        **{"r": 4, "lora_alpha": 6, "rank_pattern": {"gate_up_proj": 8}},
        "alpha_pattern": {"gate_up_proj": 12},
    },
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
}


@pytest.mark.parametrize("name", MADE_BY_PEFT)
def test_adapters_on_parameters_made_by_peft(path, ids, tmp_path, name):
    """0.18 and 0.19 save their layouts, 0.18's transposed."""
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(
        target_parameters=targets, target_modules=[], **MADE_BY_PEFT[name]
    )
    model = train_a_little(peft.get_peft_model(load_torch(path), config))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    if name == "rslora":
        assert adapter.scaling == pytest.approx(3 / math.sqrt(4))
    assert relative(our_logits(path, adapter, ids), torch_logits(model, ids)) <= (
        TOLERANCE
    )


@writes_for_peft
def test_adapters_on_modules_made_by_peft(path, ids, tmp_path):
    """target_modules of transformers 4, which PEFT converts to parameters."""
    names = ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names)
    model = train_a_little(peft.get_peft_model(load_torch(path), config))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.rank == 8
    assert relative(our_logits(path, adapter, ids), torch_logits(model, ids)) <= (
        TOLERANCE
    )


@writes_for_peft
@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_what_peft_saves_again_has_the_same_bits(path, tmp_path, layout):
    adapter = make_adapter(path)
    write_adapter(tmp_path / "ours", adapter, "qwen3_moe", layout=layout)
    load_peft(path, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert list(read_adapter(tmp_path / "theirs").differences(adapter)) == []


def test_embeddings_adapters_made_by_peft_are_refused(path, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"])
    peft.get_peft_model(load_torch(path), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"embed_tokens.*is no LoRA of a routed"):
        read_adapter(tmp_path)


def test_merged_model_in_transformers(path, ids, tmp_path):
    adapter = make_adapter(path)
    merge_checkpoint(path, adapter, tmp_path / "merged")
    got = torch_logits(load_torch(tmp_path / "merged"), ids)
    assert relative(got, our_logits(path, adapter, ids)) <= TOLERANCE


@writes_for_peft
@pytest.mark.parametrize("layout", [None, "peft-fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_peft_is_its_merged_model(family, layout, ids, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    save(model, tmp_path / "base", max_shard_size="100KB")
    first = json.loads((tmp_path / "base" / "config.json").read_text()).get(
        "first_k_dense_replace", 0
    )
    adapter = make_adapter(tmp_path / "base", range(first, 2))
    write_adapter(tmp_path / "adapter", adapter, family, layout=layout)
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "merged")
    want = torch_logits(load_torch(tmp_path / "merged"), ids)
    got = torch_logits(load_peft(tmp_path / "base", tmp_path / "adapter"), ids)
    assert relative(got, want) <= TOLERANCE
    assert relative(torch_logits(model, ids), want) > 0.1
