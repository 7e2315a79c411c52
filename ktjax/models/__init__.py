"""Decoder language models: loading, running, generating, tokenising."""

from ktjax.models.adapters import apply_adapter, extract_adapter
from ktjax.models.attention import GQAConfig, KVCache
from ktjax.models.config import ModelConfig
from ktjax.models.decoder import Decoder, DecoderOutput
from ktjax.models.fields import ConfigError
from ktjax.models.generate import end_ids, generate, generate_batch
from ktjax.models.latent_attention import MLAConfig
from ktjax.models.loading import from_pretrained, random_streams
from ktjax.models.rope import RopeConfig, YarnRamp
from ktjax.models.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "ConfigError",
    "Decoder",
    "DecoderOutput",
    "GQAConfig",
    "KVCache",
    "MLAConfig",
    "ModelConfig",
    "RopeConfig",
    "Tokenizer",
    "TokenizerError",
    "YarnRamp",
    "apply_adapter",
    "end_ids",
    "extract_adapter",
    "from_pretrained",
    "generate",
    "generate_batch",
    "random_streams",
]
