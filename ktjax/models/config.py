"""The geometry of a decoder language model, read from config.json or from GGUF."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktjax.io.gguf import GGUFCheckpoint, is_gguf
from ktjax.models.attention import GQAConfig
from ktjax.models.families import FAMILIES, read_config
from ktjax.models.fields import ConfigError, Fields
from ktjax.models.gguf_config import gguf_config
from ktjax.models.latent_attention import MLAConfig
from ktjax.models.rope import RopeConfig
from ktjax.nn import RoutingRule

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `ktjax.models.Decoder` is built from, the same for all families.

    Attributes:
      model_type: the family, one of `SUPPORTED_MODEL_TYPES`.
      vocab_size: tokens of the vocabulary.
      hidden_size: width of a token.
      num_hidden_layers: decoder layers.
      attention: its kind and geometry.
      rope: how positions turn queries and keys.
      intermediate_size: width of a dense layer's MLP.
      moe_intermediate_size: width of an expert.
      num_experts: experts of a layer.
      num_experts_per_tok: k, the experts that each token uses.
      routing: how they are chosen and weighted.
      dense_layers: layers that have a dense MLP instead of experts.
      shared_intermediate_size: width of the shared experts together, or None for none.
      gate_shared: whether a sigmoid gate scales the shared experts.
      rms_norm_eps: added to the mean square in the layers' RMSNorms.
      tie_word_embeddings: whether the head is the embedding, transposed.
      max_position_embeddings: longest sequence that the model was made for.
      eos_token_ids: tokens that end a generation.
      pad_token_id: the padding token, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    attention: GQAConfig | MLAConfig
    rope: RopeConfig
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    routing: RoutingRule
    dense_layers: tuple[int, ...] = ()
    shared_intermediate_size: int | None = None
    gate_shared: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self.routing.validate(self.num_experts, self.num_experts_per_tok)

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts rather than a dense MLP."""
        return layer_idx not in self.dense_layers

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json's content.

        Raises:
          ConfigError: a key is missing or has a bad value, or the model has a feature
            that is not built; the message names it.
        """
        try:
            return cls(**read_config(raw))
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read `path/config.json`, and the end tokens of generation_config.json.

        Of GGUF, a file or a directory of one model's, the metadata are read.

        Raises:
          FileNotFoundError: there is no config.json.
          ConfigError: see `from_dict`; the message names the file.
          CheckpointError: a GGUF file is damaged.
        """
        if is_gguf(path):
            return cls._from_gguf(path)
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
            eos = Fields(_read_json(generation)).integers("eos_token_id")
            config = dataclasses.replace(
                config, eos_token_ids=eos or config.eos_token_ids
            )
        return config

    @classmethod
    def _from_gguf(cls, path: str | os.PathLike[str]) -> ModelConfig:
        checkpoint = GGUFCheckpoint(path)
        try:
            return cls.from_dict(gguf_config(checkpoint))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    return content
