"""The geometry of a decoder language model, read from Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktjax.quant.formats import BLOCK

SUPPORTED_MODEL_TYPES = ("qwen3_moe",)
QUANTIZATION_METHODS = ("fp8", "compressed-tensors")

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


class ConfigError(ValueError):
    """A config.json that is broken, or asks for something that is not built."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `ktjax.models.Decoder` is built from; validated when built.

    Attributes:
      model_type: the architecture, one of `SUPPORTED_MODEL_TYPES`.
      vocab_size: tokens of the vocabulary.
      hidden_size: width of a token.
      num_hidden_layers: decoder layers.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides the query heads.
      head_dim: width of a head, even.
      intermediate_size: width of a dense layer's MLP.
      moe_intermediate_size: width of an expert.
      num_experts: experts of a layer.
      num_experts_per_tok: k, the experts that each token uses.
      norm_topk_prob: whether the k routing weights of a token are made to sum to one.
      decoder_sparse_step: every so many layers one has experts.
      mlp_only_layers: layers that are dense in any case.
      rms_norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary embedding's wavelengths.
      attention_bias: whether the attention's projections have biases.
      tie_word_embeddings: whether the head is the embedding, transposed.
      max_position_embeddings: longest sequence that the model was made for.
      eos_token_ids: tokens that end a generation.
      pad_token_id: the padding token, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(
                f"model_type {self.model_type!r} is not supported; supported: "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and not (_is_int(value) and value > 0):
                raise ConfigError(f"{field.name} must be positive, got {value!r}")
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be true or false, got {value!r}")
            if field.type == "float" and not _is_positive(value):
                raise ConfigError(
                    f"{field.name} must be a positive number, got {value!r}"
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than "
                f"num_experts = {self.num_experts}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads = {self.num_attention_heads} must be a multiple "
                f"of num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}")

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts rather than a dense MLP."""
        sparse = (layer_idx + 1) % self.decoder_sparse_step == 0
        return sparse and layer_idx not in self.mlp_only_layers

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's content.

        Raises:
          ConfigError: a key is missing or has a bad value, or the model has a feature
            that is not built; the message names it.
        """
        model_type = raw.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; supported: "
                f"{', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        for name in _REQUIRED:
            if raw.get(name) is None:
                raise ConfigError(f"{name} is missing")
        _refuse_unsupported(raw)
        # transformers 5 may write the experts' count under its alias.
        experts = raw.get("num_experts", raw.get("num_local_experts"))
        if experts is None:
            raise ConfigError("num_experts is missing")
        heads = raw["num_attention_heads"]
        head_dim = raw.get("head_dim")
        eos = raw.get("eos_token_id")
        optional = {
            name: raw[name]
            for name in (
                "norm_topk_prob",
                "decoder_sparse_step",
                "rms_norm_eps",
                "attention_bias",
                "tie_word_embeddings",
                "max_position_embeddings",
                "pad_token_id",
            )
            if raw.get(name) is not None
        }
        return cls(
            **{name: raw[name] for name in _REQUIRED},
            model_type=model_type,
            num_experts=experts,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw["hidden_size"] // heads if head_dim is None else head_dim,
            # Only dense layers have it, and a config without them may leave it out.
            intermediate_size=raw.get("intermediate_size")
            or raw["moe_intermediate_size"],
            mlp_only_layers=tuple(raw.get("mlp_only_layers") or ()),
            rope_theta=_rope_theta(raw),
            eos_token_ids=_token_ids(eos),
            **optional,
        )

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read `path/config.json`, and the end tokens of generation_config.json.

        Raises:
          FileNotFoundError: there is no config.json.
          ConfigError: see `from_dict`; the message names the file.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; expected a Hugging Face model directory"
            )
        try:
            config = cls.from_dict(_read_json(file))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None
        generation = Path(path) / "generation_config.json"
        if generation.is_file():
            eos = _token_ids(_read_json(generation).get("eos_token_id"))
            config = dataclasses.replace(
                config, eos_token_ids=eos or config.eos_token_ids
            )
        return config


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """What would change the model's output and is not built is an error, by name."""
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": (None, "silu"),
        "use_sliding_window": (None, False),
        "attention_dropout": (None, 0, 0.0),
    }
    for name, values in allowed.items():
        if raw.get(name) not in values:
            raise ConfigError(f"{name} = {raw[name]!r} is not supported")
    # The tensors themselves say how they are stored; this says whether to look.
    quantization = raw.get("quantization_config")
    if quantization is None:
        return
    known = isinstance(quantization, Mapping)
    if not known or quantization.get("quant_method") not in QUANTIZATION_METHODS:
        raise ConfigError(
            f"quantization_config = {quantization!r} is not supported; supported "
            f"values of quant_method: {', '.join(QUANTIZATION_METHODS)}"
        )
    if quantization.get("weight_block_size") not in (None, [BLOCK, BLOCK]):
        raise ConfigError(
            f"quantization_config: weight_block_size must be [{BLOCK}, {BLOCK}], got "
            f"{quantization['weight_block_size']!r}"
        )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """`rope_theta`: at the top, or in transformers 5's `rope_parameters`."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name) or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{name} must be an object, got {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{name} of type {kind!r} is not supported")
    theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        return 10_000.0
    if not _is_positive(theta):
        raise ConfigError(f"rope_theta must be a positive number, got {theta!r}")
    return float(theta)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(_is_int(token) and token >= 0 for token in ids):
        raise ConfigError(f"eos_token_id must be token ids, got {value!r}")
    return tuple(ids)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    return content


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    )
