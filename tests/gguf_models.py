"""Whole GGUF files of small models, as llama.cpp's converter writes them.

Names come from the gguf package; what the converter does to tensors and which metadata
it writes is spelt out here, from its source.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ktjax.io import Checkpoint, save_file

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    "qwen3_moe": "QWEN3MOE",
    "qwen2_moe": "QWEN2MOE",
    "mixtral": "LLAMA",
    "olmoe": "OLMOE",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "glm4_moe": "GLM4_MOE",
}
_EXPERTS = {
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
}
_USUAL = ("mlp.experts", ("gate_proj", "up_proj", "down_proj"))


def write_gguf_model(
    source: Path,
    path: Path,
    *,
    experts: str = "F32",
    down: str | None = None,
    dense: str = "F32",
    change=None,
    parts: int = 0,
) -> None:
    """Convert the checkpoint `source` to the file `path`.

    Args:
      source: a Hugging Face directory.
      path: the file.
      experts: ggml's type of the routed experts.
      down: that of their down projections, where it is another.
      dense: that of every other matrix.
      change: called with the tensors by name, `(array, type)`, and the metadata by key,
        which it may change.
      parts: most tensors of a file, of a model to be split; 0: do not.
    """
    config = json.loads((source / "config.json").read_text())
    family = config["model_type"]
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[family])
    tensors = {
        name: (array, _type_of(name, array, experts, down or experts, dense))
        for name, array in _tensors(source, config, architecture)
    }
    metadata = _metadata(config, gguf.MODEL_ARCH_NAMES[architecture])
    if change is not None:
        change(tensors, metadata)
    writer = gguf.GGUFWriter(
        path, gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=parts
    )
    del writer.kv_data[0]["general.architecture"]  # one of the metadata here
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, type) in tensors.items():
        number = gguf.GGMLQuantizationType[type]
        writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_values(source: Path, path: Path, *, experts: str, dense: str) -> Path:
    """A checkpoint of the values that a GGUF file of these types stands for.

    Those of experts are rounded to bfloat16, as the kernels have them.
    """
    path.mkdir()
    (path / "config.json").write_text((source / "config.json").read_text())
    checkpoint = Checkpoint(source)
    values = {}
    for name in checkpoint:
        array = checkpoint[name].astype(np.float32)
        routed = "experts." in name and "shared_experts." not in name
        type = _type_of(name, array, experts, experts, dense, routed=routed)
        number = gguf.GGMLQuantizationType[type]
        array = gguf.quants.dequantize(gguf.quants.quantize(array, number), number)
        if routed:
            array = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        values[name] = array
    save_file(path / "model.safetensors", values, {"format": "pt"})
    return path


def _type_of(name, array, experts, down, dense, routed=None):
    """As llama.cpp: vectors and routers stay F32."""
    if routed if routed is not None else "_exps" in name:
        return down if "down" in name else experts
    router = "ffn_gate_inp" in name or name.endswith(
        ("mlp.gate.weight", "_expert_gate.weight")
    )
    return "F32" if array.ndim == 1 or router else dense


def _tensors(source, config, architecture):
    """What the converter writes, by GGUF name, in float32."""
    checkpoint, layers = Checkpoint(source), config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(architecture, layers)
    family = config["model_type"]
    folder, parts = _EXPERTS.get(family, _USUAL)

    def named(name, array):
        kind = ".bias" if name.endswith(("bias",)) else ".weight"
        stem = name.removesuffix(kind).removesuffix("_bias")
        found = names.get_name(stem)
        assert found is not None, name
        return found + kind, np.ascontiguousarray(array, np.float32)

    for name in checkpoint:
        array = checkpoint[name].astype(np.float32)
        if f".{folder}." in name:
            continue
        if family == "mixtral":
            if "q_proj" in name:
                array = permute(array, config["num_attention_heads"])
            elif "k_proj" in name:
                array = permute(array, config["num_key_value_heads"])
        if "kv_b_proj" in name:
            nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
            both = array.reshape(-1, nope + value, array.shape[-1])
            k, v = both[:, :nope].swapaxes(1, 2), both[:, nope:]
            yield named(name.replace("kv_b_proj", "k_b_proj"), k)
            yield named(name.replace("kv_b_proj", "v_b_proj"), v)
            continue
        if name.endswith("shared_expert_gate.weight"):
            array = array.reshape(-1)
        yield named(name, array)
    count = config.get("num_experts", config.get("num_local_experts"))
    count = count or config["n_routed_experts"]
    for layer in range(layers):
        at = f"model.layers.{layer}.{folder}"
        if f"{at}.0.{parts[0]}.weight" not in checkpoint:
            continue
        for part, usual in zip(parts, ("gate", "up", "down"), strict=True):
            each = [checkpoint[f"{at}.{e}.{part}.weight"] for e in range(count)]
            name = f"model.layers.{layer}.mlp.experts.{usual}_proj.weight"
            if family == "mixtral":
                name = f"layers.{layer}.feed_forward.experts.{part}.weight"
            yield named(name, np.stack(each))


def permute(weights, heads):
    """llama.cpp's, for heads whose neighbours turn together."""
    split = weights.reshape(
        heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
    )
    return split.swapaxes(1, 2).reshape(weights.shape)


def _metadata(config, architecture):
    """As the converter's base class and that of the family write them."""
    family = config["model_type"]
    rope = config.get("rope_parameters") or {"rope_type": "default", **config}
    head = config.get("head_dim")
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_count": config.get("num_experts")
        or config.get("num_local_experts")
        or config.get("n_routed_experts"),
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
        "attention.key_length": head,
        "attention.value_length": head,
    }
    if rope["rope_type"] == "yarn":
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope[
                "original_max_position_embeddings"
            ],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    if family in ("qwen3_moe", "qwen2_moe"):
        own["expert_feed_forward_length"] = config["moe_intermediate_size"]
        own["expert_shared_feed_forward_length"] = config.get(
            "shared_expert_intermediate_size"
        )
    if family == "mixtral":
        own["vocab_size"] = config["vocab_size"]
        own["rope.dimension_count"] = head or (
            config["hidden_size"] // config["num_attention_heads"]
        )
    if family.startswith("deepseek"):
        turned, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
        own |= {
            "attention.head_count_kv": 1,
            "leading_dense_block_count": config["first_k_dense_replace"],
            "vocab_size": config["vocab_size"],
            "attention.q_lora_rank": config["q_lora_rank"],
            "attention.kv_lora_rank": rank,
            "attention.key_length": rank + turned,
            "attention.value_length": rank,
            "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
            "attention.value_length_mla": config["v_head_dim"],
            "rope.dimension_count": turned,
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
        if family == "deepseek_v3":
            own["expert_gating_func"] = 2
    if family == "glm4_moe":
        own |= {
            "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 0.5)),
            "leading_dense_block_count": config["first_k_dense_replace"],
            "expert_gating_func": 2,
            "nextn_predict_layers": 0,
        }
    if family.startswith(("deepseek", "glm")):
        own |= {
            "expert_feed_forward_length": config["moe_intermediate_size"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_scale": float(config["routed_scaling_factor"]),
        }
        if config.get("norm_topk_prob"):
            own["expert_weights_norm"] = True
    metadata = {f"{architecture}.{key}": value for key, value in own.items()}
    assert metadata.keys() <= _known_keys(architecture)
    metadata |= {
        "general.architecture": architecture,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _known_keys(architecture):
    """Of metadata, by the gguf package."""
    return {
        key.replace("{arch}", architecture)
        for group in vars(gguf.Keys).values()
        if isinstance(group, type)
        for key in vars(group).values()
        if isinstance(key, str)
    }
