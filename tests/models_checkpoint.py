"""Small random checkpoints of every family written by transformers, for the tests."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_COMMON = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    # Unlike the 1e-6 that DeepSeek's latents are normed with.
    "rms_norm_eps": 1e-3,
    "eos_token_id": 1,
    "router_aux_loss_coef": 0.01,
}
SIZES = _COMMON | {
    "moe_intermediate_size": 32,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 6,
    "norm_topk_prob": True,
    "rope_theta": 50_000.0,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
_DEEPSEEK = _COMMON | {
    # More than groups: otherwise the best experts always lie in the best groups.
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": _YARN,
}
FAMILIES = {
    "qwen3_moe": SIZES,
    "qwen2_moe": _COMMON
    | {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_key_value_heads": 2,
        "num_experts": 6,
    },
    "mixtral": _COMMON | {"num_key_value_heads": 2, "num_local_experts": 4},
    "olmoe": _COMMON | {"num_key_value_heads": 2, "num_experts": 6},
    "deepseek_v2": _DEEPSEEK | {"topk_method": "group_limited_greedy"},
    "deepseek_v2_lite": _DEEPSEEK
    | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _COMMON
    | {
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
}
# The other way of each of GLM's options.
GLM4_MOE_PLAIN = {
    "use_qk_norm": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
}
_CLASSES = {
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v2_lite": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
}


def make_model(dtype="float32", seed=0, family="qwen3_moe", **changes):
    """A model whose weights are exact in bfloat16, larger than the usual start.

    Norm weights and biases are random too, so that a swapped or forgotten one shows.
    """
    torch.manual_seed(seed)
    name = _CLASSES[family]
    config = getattr(transformers, f"{name}Config")(**{**FAMILIES[family], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_()
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.to(torch.bfloat16).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                # As wide as the scores, and not exact in bfloat16.
                buffer.normal_(std=0.3)
    return model.to(getattr(torch, dtype)).eval()


def save(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    return path


def token_ids(shape=(2, 24)):
    """Random tokens of a small vocabulary, none of them special."""
    return np.random.default_rng(0).integers(2, SIZES["vocab_size"], shape)


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()
