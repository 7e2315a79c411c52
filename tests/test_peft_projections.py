"""Adapters beyond the routed experts against PEFT and transformers, float32."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from models_checkpoint import make_model, save, torch_logits
from peft_cases import load_peft, load_torch, train_a_little, writes_for_peft

from ktjax.config import LoRAConfig
from ktjax.io import merge_checkpoint, read_adapter, write_adapter
from ktjax.io.adapters import inspect_adapter
from ktjax.models import apply_adapter, extract_adapter, from_pretrained

pytestmark = writes_for_peft

TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(2, 101, (2, 24))

# What is trained, by family: every kind of projection that it has.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "qwen3_moe": ("experts", *ATTENTION, "lm_head"),
    "qwen2_moe": ("experts", *ATTENTION, *(f"shared_expert.{n}" for n in MLP)),
    "deepseek_v2": (
        *("experts", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("o_proj", *(rf"layers\.0\.mlp\.{name}" for name in MLP)),
        *(f"shared_experts.{name}" for name in MLP),
    ),
}


@pytest.fixture(scope="module", params=TARGETS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family, tmp_path_factory):
    return save(make_model(family=family), tmp_path_factory.mktemp(family))


def fill(model):
    """Give every adapter values as if it had been trained."""
    rng = np.random.default_rng(1)
    state = nnx.state(model, nnx.LoRAParam)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(rng.normal(0, 0.15, leaf.shape), jnp.float32))
    nnx.update(model, state)


@nnx.jit
def apply(model, ids):
    return model(ids)


def logits(model):
    return np.asarray(apply(model, jnp.asarray(IDS)))


def trained(path, lora, **kwargs):
    """The adapter of a model whose every adapter is random, and its logits."""
    model = from_pretrained(path, dtype=jnp.float32, lora=lora, **kwargs)
    try:
        fill(model)
        return extract_adapter(model, str(path)), logits(model)
    finally:
        model.close()


def our_logits(path, adapter, **kwargs):
    model = from_pretrained(
        path, dtype=jnp.float32, lora=adapter.lora_config(), **kwargs
    )
    try:
        apply_adapter(model, adapter)
        return logits(model)
    finally:
        model.close()


@pytest.mark.parametrize("layout", [None, "peft-fused"])
def test_peft_and_merged_models_compute_what_we_do(family, base, tmp_path, layout):
    """Ranks and alphas of their own for some projections."""
    lora = LoRAConfig(
        3,
        4.5,
        targets=TARGETS[family],
        rank_pattern={r"layers\.1\..*o_proj": 5},
        alpha_pattern={r"layers\.1\..*o_proj": 8.0},
    )
    if family == "qwen2_moe" and layout:
        pytest.skip("the same as None")
    adapter, want = trained(base, lora)
    write_adapter(tmp_path / "adapter", adapter, family, layout=layout)
    model = load_peft(base, tmp_path / "adapter")
    assert relative(torch_logits(model, IDS), want) <= TOLERANCE
    with model.disable_adapter():
        assert relative(torch_logits(model, IDS), want) > 0.1
    # What PEFT saves again has the same bits.
    # PEFT would add a copy of the head's own weight.
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert list(read_adapter(tmp_path / "theirs").differences(adapter)) == []
    if layout is None:
        # On the kernels, whose float32 is exact to 16 bits.
        assert relative(our_logits(base, adapter, dense="bf16"), want) <= TOLERANCE
        merge_checkpoint(base, adapter, tmp_path / "merged")
        merged = torch_logits(load_torch(tmp_path / "merged"), IDS)
        assert relative(merged, want) <= TOLERANCE


def test_adapters_made_by_peft(family, base, tmp_path):
    """Modules where PEFT takes them as such, parameters where it would not."""
    modules, parameters = [], []
    for name in TARGETS[family]:
        if name == "experts":
            parameters += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        elif name.endswith(MLP):
            parameters.append(name.replace("\\", "") + ".weight")
        else:
            modules.append(name)
    if family == "deepseek_v2":
        first = [f"model.{name}" for name in parameters if name.startswith("layers.0")]
        parameters = [n for n in parameters if not n.startswith("layers.0")] + first
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern={"o_proj": 2, r"shared_experts?\.up_proj.weight": 3},
    )
    model = train_a_little(peft.get_peft_model(load_torch(base), config), 0.15)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    assert adapter.projections
    kinds = inspect_adapter(tmp_path).targets
    assert len(kinds) == len(TARGETS[family])
    want = torch_logits(model, IDS)
    assert relative(our_logits(base, adapter), want) <= TOLERANCE


def test_only_attention(base, family, tmp_path):
    """Without experts: PEFT's ordinary target_modules."""
    adapter, want = trained(base, LoRAConfig(3, 4.5, targets=("o_proj",)))
    assert write_adapter(tmp_path / "ours", adapter, family) == "peft"
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert config["target_modules"] == names
    got = torch_logits(load_peft(base, tmp_path / "ours"), IDS)
    assert relative(got, want) <= TOLERANCE
