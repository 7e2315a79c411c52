"""The configuration of a model in a GGUF file, as Hugging Face's config.json has it.

The metadata are those that llama.cpp's converter writes. What it leaves out, because
llama.cpp knows it of an architecture or sees it in the tensors, is added here in the
same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ktjax.io.gguf import GGUFCheckpoint
from ktjax.models.fields import ConfigError, Fields

Raw = dict[str, Any]

# llama.cpp's numbers of what router logits become; 0 stands for "not said".
_GATING = {0: None, 1: "softmax", 2: "sigmoid"}

# What would change the output and is not built, unless it has this value.
_NEUTRAL = {
    "attention.scale": 0.0,
    "logit_scale": 0.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def gguf_config(checkpoint: GGUFCheckpoint) -> Raw:
    """The metadata of `checkpoint` as the content of a config.json.

    Raises:
      ConfigError: an architecture that is not built, or a key that is missing or has a
        bad value; the message names the key as the file does.
      KeyError: there is no token_embd.weight, or no last layer.
    """
    architecture = checkpoint.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"general.architecture = {architecture!r} is not supported; supported: "
            f"{', '.join(_ARCHITECTURES)}"
        )
    at = f"{architecture}."
    own = {
        key.removeprefix(at): value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in checkpoint.metadata.items()
        if key.startswith(at)
    }
    fields = Fields(own, at)
    if not fields.count("expert_count", 0):
        raise ConfigError(
            f"{at}expert_count is missing or 0: models without experts are not "
            "supported"
        )
    for key, value in _NEUTRAL.items():
        fields.only(key, value)
    raw = _common(checkpoint, fields) | _ARCHITECTURES[architecture](checkpoint, fields)
    # Before as many layers are built as a damaged file may ask for.
    checkpoint.file_of(f"blk.{raw['num_hidden_layers'] - 1}.attn_norm.weight")
    longest = raw["max_position_embeddings"]
    window = fields.count("attention.sliding_window", longest)
    if 0 < window < longest:
        raise ConfigError(
            f"{at}attention.sliding_window = {window} is not supported: it is shorter "
            f"than {at}context_length = {longest}"
        )
    return raw


def _common(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    tokens = Fields(checkpoint.metadata)
    # The end of a turn may be another token than the end of a text.
    ends = {
        token
        for key in ("eos", "eot")
        for token in tokens.integers(f"tokenizer.ggml.{key}_token_id")
    }
    heads = fields.size("attention.head_count")
    return {
        "vocab_size": checkpoint.descriptor("token_embd.weight").shape[0],
        "hidden_size": fields.size("embedding_length"),
        # The last layers may be there to predict further tokens only.
        "num_hidden_layers": fields.size("block_count")
        - fields.count("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", default=heads),
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": fields.size("expert_used_count"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.size("context_length"),
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": "output.weight" not in checkpoint,
        "eos_token_id": sorted(ends),
        "pad_token_id": tokens.count("tokenizer.ggml.padding_token_id", None),
    }


def _qwen3moe(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    return {
        "model_type": "qwen3_moe",
        "attention_bias": "blk.0.attn_q.bias" in checkpoint,
        **_whole_head(fields),
        **_softmax_routing(fields, normalize=True),
        **_expert_widths(fields),
    }


def _qwen2moe(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    return {
        "model_type": "qwen2_moe",
        "qkv_bias": "blk.0.attn_q.bias" in checkpoint,
        "shared_expert_intermediate_size": fields.size(
            "expert_shared_feed_forward_length",
            default=fields.size("feed_forward_length"),
        ),
        **_whole_head(fields),
        **_softmax_routing(fields, normalize=False),
        **_expert_widths(fields),
    }


def _llama(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    fields.only("expert_weights_norm", True)
    return {
        "model_type": "mixtral",
        "intermediate_size": fields.size("feed_forward_length"),
        **_whole_head(fields),
        **_softmax_routing(fields, normalize=True),
    }


def _olmoe(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    return {
        "model_type": "olmoe",
        "attention_bias": "blk.0.attn_q.bias" in checkpoint,
        "clip_qkv": fields.number("attention.clamp_kqv", None),
        "intermediate_size": fields.size("feed_forward_length"),
        **_whole_head(fields),
        **_softmax_routing(fields, normalize=False),
    }


def _deepseek2(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    """DeepSeek-V2 and -V3 have one architecture; their routers' scores differ."""
    turned = fields.size("rope.dimension_count")
    # Older files have the heads' widths here, newer ones those of the latents.
    key = fields.size("attention.key_length_mla", "attention.key_length")
    routing = _grouped_routing(fields)
    if (gating := _gating(fields, "softmax", "sigmoid")) == "sigmoid":
        family = "deepseek_v3"
    else:
        family = "deepseek_v2"
        grouped = routing["n_group"] > 1
        routing["topk_method"] = "group_limited_greedy" if grouped else "greedy"
    return {
        "model_type": family,
        "scoring_func": gating,
        "q_lora_rank": fields.size("attention.q_lora_rank", default=None),
        "kv_lora_rank": fields.size("attention.kv_lora_rank"),
        "qk_nope_head_dim": key - turned,
        "qk_rope_head_dim": turned,
        "v_head_dim": fields.size(
            "attention.value_length_mla", "attention.value_length"
        ),
        **routing,
        **_leading_dense(fields),
    }


def _glm4moe(checkpoint: GGUFCheckpoint, fields: Fields) -> Raw:
    width = _head_dim(fields)
    turned = fields.size("rope.dimension_count", default=width // 2)
    if turned > width:
        fields.only("rope.dimension_count", width)
    _gating(fields, "sigmoid")
    return {
        "model_type": "glm4_moe",
        "head_dim": width,
        "partial_rotary_factor": turned / width,
        "attention_bias": "blk.0.attn_q.bias" in checkpoint,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in checkpoint,
        **_grouped_routing(fields),
        **_leading_dense(fields),
    }


_ARCHITECTURES: dict[str, Callable[[GGUFCheckpoint, Fields], Raw]] = {
    "qwen3moe": _qwen3moe,
    "qwen2moe": _qwen2moe,
    "llama": _llama,
    "olmoe": _olmoe,
    "deepseek2": _deepseek2,
    "glm4moe": _glm4moe,
}


def _rope(fields: Fields) -> Raw:
    """`rope_parameters`, with the base that llama.cpp takes where none is said."""
    theta = {"rope_theta": fields.number("rope.freq_base", 10_000.0)}
    default = "linear" if fields.has("rope.scaling.factor") else "none"
    kind = fields.raw.get("rope.scaling.type", default)
    if kind == "none":
        return theta
    scaled = {
        **theta,
        "rope_type": kind,
        "factor": fields.number("rope.scaling.factor"),
    }
    if kind != "yarn":
        return scaled
    scaled |= {
        "original_max_position_embeddings": fields.size(
            "rope.scaling.original_context_length"
        ),
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if fields.has("rope.scaling.yarn_log_multiplier"):
        # A tenth of mscale_all_dim; mscale, which is not kept, is the same in all of
        # DeepSeek's models.
        mscale = 10 * fields.number("rope.scaling.yarn_log_multiplier")
        scaled |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaled


def _head_dim(fields: Fields) -> int:
    """Width of a head."""
    heads = fields.size("attention.head_count")
    width = fields.size(
        "attention.key_length", default=fields.size("embedding_length") // heads
    )
    fields.only("attention.value_length", width)
    return width


def _whole_head(fields: Fields) -> Raw:
    """Heads of which everything turns."""
    width = _head_dim(fields)
    fields.only("rope.dimension_count", width)
    return {"head_dim": width}


def _gating(fields: Fields, *supported: str) -> str:
    """What router logits become: one of `supported`, the first if it is not said."""
    number = fields.count("expert_gating_func", 0)
    kind = _GATING.get(number, str(number)) or supported[0]
    if kind not in supported:
        fields.only("expert_gating_func")  # raises: it is no value at all
    return kind


def _softmax_routing(fields: Fields, normalize: bool) -> Raw:
    _gating(fields, "softmax")
    fields.only("expert_weights_scale", 0.0, 1.0)
    fields.only("expert_group_count", 0, 1)
    return {"norm_topk_prob": fields.flag("expert_weights_norm", normalize)}


def _grouped_routing(fields: Fields) -> Raw:
    return {
        "n_group": fields.size("expert_group_count", default=1),
        "topk_group": fields.size("expert_group_used_count", default=1),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
    }


def _leading_dense(fields: Fields) -> Raw:
    return {
        "first_k_dense_replace": fields.count("leading_dense_block_count", 0),
        "n_shared_experts": fields.size("expert_shared_count"),
        **_expert_widths(fields),
    }


def _expert_widths(fields: Fields) -> Raw:
    width = fields.size("expert_feed_forward_length")
    return {
        "moe_intermediate_size": width,
        "intermediate_size": fields.size("feed_forward_length", default=width),
    }
