"""Decoder language models: loading, running, generating, tokenising."""

from ktjax.models.attention import KVCache
from ktjax.models.config import ModelConfig
from ktjax.models.decoder import Decoder, DecoderOutput
from ktjax.models.fields import ConfigError
from ktjax.models.generate import generate, generate_batch
from ktjax.models.loading import from_pretrained
from ktjax.models.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "ConfigError",
    "Decoder",
    "DecoderOutput",
    "KVCache",
    "ModelConfig",
    "Tokenizer",
    "TokenizerError",
    "from_pretrained",
    "generate",
    "generate_batch",
]
