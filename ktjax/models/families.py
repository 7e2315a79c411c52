"""The model families: a row and a small function each, from config.json to parts.

A function reads what is particular to its family and returns the arguments of
`ModelConfig` that depend on it. Defaults are those of the family in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ktjax.models.attention import GQAConfig
from ktjax.models.fields import ConfigError, Fields
from ktjax.models.latent_attention import MLAConfig
from ktjax.models.rope import read_mscale, read_rope
from ktjax.nn import RoutingRule
from ktjax.quant.formats import BLOCK

Parts = dict[str, Any]

QUANTIZATION_METHODS = ("fp8", "compressed-tensors", "gptq", "awq", "mxfp8")


def read_config(raw: Mapping[str, Any]) -> Parts:
    """The arguments of `ModelConfig` for a config.json's content.

    Raises:
      ConfigError: a key is missing or has a bad value, or the model has a feature that
        is not built; the message names it.
    """
    fields = Fields(raw)
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    _refuse_unsupported(fields)
    common = {
        "model_type": model_type,
        "vocab_size": fields.size("vocab_size"),
        "hidden_size": fields.size("hidden_size"),
        "num_hidden_layers": fields.size("num_hidden_layers"),
        "num_experts": fields.size(
            "num_experts", "num_local_experts", "n_routed_experts"
        ),
        "num_experts_per_tok": fields.size("num_experts_per_tok"),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", False),
        "max_position_embeddings": fields.size(
            "max_position_embeddings", default=32768
        ),
        "eos_token_ids": fields.integers("eos_token_id"),
        "pad_token_id": fields.count("pad_token_id", None),
    }
    return common | FAMILIES[model_type](fields)


def _qwen3_moe(fields: Fields) -> Parts:
    bias = fields.flag("attention_bias", False)
    attention = _grouped_query(fields, qkv_bias=bias, output_bias=bias, qk_norm="head")
    return {
        "attention": attention,
        "rope": read_rope(fields, attention.head_dim),
        "routing": RoutingRule(normalize=fields.flag("norm_topk_prob", False)),
        "dense_layers": _all_but_every(fields),
        **_widths(fields),
    }


def _qwen2_moe(fields: Fields) -> Parts:
    attention = _grouped_query(fields, qkv_bias=fields.flag("qkv_bias", True))
    return {
        "attention": attention,
        "rope": read_rope(fields, attention.head_dim),
        "routing": RoutingRule(normalize=fields.flag("norm_topk_prob", False)),
        "dense_layers": _all_but_every(fields),
        "shared_intermediate_size": fields.size("shared_expert_intermediate_size"),
        "gate_shared": True,
        **_widths(fields),
    }


def _mixtral(fields: Fields) -> Parts:
    # Noise on the router's input, while training.
    fields.only("router_jitter_noise", 0)
    window = fields.count("sliding_window", 0)
    longest = fields.size("max_position_embeddings", default=32768)
    if 0 < window < longest:
        raise ConfigError(
            f"sliding_window = {window} is not supported: it is shorter than "
            f"max_position_embeddings = {longest}"
        )
    attention = _grouped_query(fields)
    return {
        "attention": attention,
        "rope": read_rope(fields, attention.head_dim, default_theta=1e6),
        "routing": RoutingRule(),
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-5),
        **_one_width(fields),
    }


def _olmoe(fields: Fields) -> Parts:
    bias = fields.flag("attention_bias", False)
    eps = fields.number("rms_norm_eps", 1e-5)
    attention = _grouped_query(
        fields,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="projection",
        norm_eps=eps,
        clip=fields.number("clip_qkv", None),
    )
    return {
        "attention": attention,
        "rope": read_rope(fields, attention.head_dim),
        "routing": RoutingRule(normalize=fields.flag("norm_topk_prob", False)),
        "rms_norm_eps": eps,
        **_one_width(fields),
    }


def _deepseek_v2(fields: Fields) -> Parts:
    fields.only("scoring_func", "softmax")
    fields.only("topk_method", "greedy", "group_limited_greedy")
    # DeepSeek's code then drops the scaling factor, transformers normalises nothing.
    fields.only("norm_topk_prob", False)
    groups: Parts = {}
    if fields.raw.get("topk_method") == "group_limited_greedy":
        groups["groups"] = fields.size("n_group")
        groups["groups_per_tok"] = fields.size("topk_group")
    scaling = fields.number("routed_scaling_factor", 1.0)
    return {
        **_latent_attention(fields, interleaved=True),
        "routing": RoutingRule(normalize=False, scaling=scaling, **groups),
        **_leading_dense(fields),
        **_widths(fields),
    }


def _deepseek_v3(fields: Fields) -> Parts:
    interleaved = fields.flag("rope_interleave", True)
    return {
        **_latent_attention(fields, interleaved=interleaved),
        "routing": _sigmoid_routing(fields),
        **_leading_dense(fields),
        **_widths(fields),
    }


def _glm4_moe(fields: Fields) -> Parts:
    eps = fields.number("rms_norm_eps", 1e-5)
    attention = _grouped_query(
        fields,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head" if fields.flag("use_qk_norm", False) else None,
        norm_eps=eps,
    )
    return {
        "attention": attention,
        "rope": read_rope(fields, attention.head_dim, default_share=0.5),
        "routing": _sigmoid_routing(fields),
        "rms_norm_eps": eps,
        **_leading_dense(fields),
        **_widths(fields),
    }


FAMILIES: dict[str, Callable[[Fields], Parts]] = {
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
}


def _check_quantization(quantization: Any) -> None:
    """The tensors themselves say how they are stored; this says whether to look."""
    if quantization is None:
        return
    known = isinstance(quantization, Mapping)
    if not known or quantization.get("quant_method") not in QUANTIZATION_METHODS:
        raise ConfigError(
            f"quantization_config = {quantization!r} is not supported; supported "
            f"values of quant_method: {', '.join(QUANTIZATION_METHODS)}"
        )
    if quantization.get("weight_block_size") not in (None, [BLOCK, BLOCK], [1, 32]):
        raise ConfigError(
            f"quantization_config: weight_block_size must be [{BLOCK}, {BLOCK}], or "
            f"[1, 32] of MXFP8, got "
            f"{quantization['weight_block_size']!r}"
        )


def _refuse_unsupported(fields: Fields) -> None:
    """What would change the model's output and is not built, in any family."""
    fields.only("hidden_act", "silu")
    fields.only("attention_dropout", 0)
    _check_quantization(fields.raw.get("quantization_config"))
    fields.only("mlp_bias", False)
    fields.only("moe_layer_freq", 1)
    fields.only("use_sliding_window", False)
    for kind in fields.raw.get("layer_types") or ():
        if kind != "full_attention":
            raise ConfigError(f"layer_types with {kind!r} is not supported")


def _grouped_query(fields: Fields, **options: Any) -> GQAConfig:
    heads = fields.size("num_attention_heads")
    return GQAConfig(
        num_heads=heads,
        num_key_value_heads=fields.size("num_key_value_heads", default=heads),
        head_dim=fields.size("head_dim", default=fields.size("hidden_size") // heads),
        **{"norm_eps": fields.number("rms_norm_eps", 1e-6), **options},
    )


def _latent_attention(fields: Fields, interleaved: bool) -> Parts:
    nope, turned = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    if "q_lora_rank" not in fields.raw:
        raise ConfigError("q_lora_rank is missing; null stands for none")
    rope = read_rope(fields, turned, interleaved=interleaved)
    attention = MLAConfig(
        num_heads=fields.size("num_attention_heads"),
        q_rank=fields.size("q_lora_rank", default=None),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=turned,
        value_dim=fields.size("v_head_dim"),
        bias=fields.flag("attention_bias", False),
        scale=(nope + turned) ** -0.5 * read_mscale(fields, rope.factor) ** 2,
    )
    return {"attention": attention, "rope": rope}


def _sigmoid_routing(fields: Fields) -> RoutingRule:
    """DeepSeek-V3's: a group is worth the sum of its two best experts."""
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    groups = fields.size("n_group", default=1)
    return RoutingRule(
        "sigmoid",
        correction_bias=True,
        groups=groups,
        groups_per_tok=fields.size("topk_group", default=1),
        group_top=1 if groups == 1 else 2,
        normalize=fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 1.0),
    )


def _widths(fields: Fields) -> Parts:
    width = fields.size("moe_intermediate_size")
    return {
        "moe_intermediate_size": width,
        # Only dense layers have it, and a config without them may leave it out.
        "intermediate_size": fields.size("intermediate_size", default=width),
    }


def _one_width(fields: Fields) -> Parts:
    """Every layer has experts, and their width has the name of a dense layer's."""
    width = fields.size("intermediate_size")
    return {"moe_intermediate_size": width, "intermediate_size": width}


def _all_but_every(fields: Fields) -> tuple[int, ...]:
    """Qwen: every so many layers one has experts, but for some."""
    step = fields.size("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers")
    layers = range(fields.size("num_hidden_layers"))
    return tuple(i for i in layers if (i + 1) % step or i in dense)


def _leading_dense(fields: Fields) -> Parts:
    """DeepSeek, GLM: the first layers are dense, the others have shared experts."""
    dense = fields.count("first_k_dense_replace")
    shared = fields.size("n_shared_experts") * fields.size("moe_intermediate_size")
    layers = fields.size("num_hidden_layers")
    return {
        "dense_layers": tuple(range(min(dense, layers))),
        "shared_intermediate_size": shared,
    }
