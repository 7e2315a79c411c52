"""Decoder language models: loading, running, generating, tokenising."""

from ktjax.models.adapters import apply_adapter, extract_adapter
from ktjax.models.attention import KVCache
from ktjax.models.config import ConfigError, ModelConfig
from ktjax.models.decoder import Decoder, DecoderOutput
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
    "apply_adapter",
    "extract_adapter",
    "from_pretrained",
    "generate",
    "generate_batch",
]
