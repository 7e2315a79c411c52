"""Answers of a base or a trained model, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ktjax import assets
from ktjax.commands.config import AnswerConfig, GenerateConfig
from ktjax.io.adapters import Adapter, AdapterError, read_adapter
from ktjax.models import (
    Decoder,
    Tokenizer,
    apply_adapter,
    end_ids,
    from_pretrained,
    generate,
)
from ktjax.train import checkpoint
from ktjax.train.adapters import read_run, run_checkpoint


def run_generation(config: GenerateConfig, console: Console) -> None:
    """Answer one prompt on `console`, token by token.

    Raises:
      AdapterError, CheckpointError, ConfigError, TokenizerError, ValueError,
      FileNotFoundError: each says what is wrong and where.
    """
    messages = [*system_messages(config), {"role": "user", "content": config.prompt}]
    with open_model(config) as (model, tokenizer):
        key = jax.random.key(config.seed)
        for piece in answer(model, tokenizer, messages, config, key):
            console.out(piece, end="", highlight=False)
    console.out("")


@contextmanager
def open_model(config: AnswerConfig) -> Iterator[tuple[Decoder, Tokenizer]]:
    """The model with its adapter, and its tokenizer; the stores are freed at the end.

    Raises:
      AdapterError, CheckpointError, ConfigError, TokenizerError, ValueError,
      FileNotFoundError: each says what is wrong and where.
    """
    adapter = _adapter(config)
    path = config.model or assets.demo_model()
    # Adapters belong to the very weights that they were trained on.
    base: dict[str, Any] = {"experts": None, "group_size": None, "zero_point": False}
    dense = config.dense
    if config.run is not None:
        trained = checkpoint.read_meta(run_checkpoint(config.run))["config"]
        base |= {name: trained.get(name, value) for name, value in base.items()}
        dense = dense or trained.get("dense")
    if adapter is not None:
        path = config.model or _base_model(adapter)
    if config.experts is not None:
        base = {name: getattr(config, name) for name in base}
    tokenizer = Tokenizer(path)
    model = from_pretrained(
        path,
        **base,
        compute=config.compute,
        dense=dense,
        dtype=config.dtype,
        lora=None if adapter is None else adapter.lora_config(),
    )
    try:
        if adapter is not None:
            apply_adapter(model, adapter)
        yield model, tokenizer
    finally:
        model.close()


def system_messages(config: AnswerConfig) -> list[dict[str, str]]:
    """What a conversation begins with."""
    return (
        [] if config.system is None else [{"role": "system", "content": config.system}]
    )


def answer(
    model: Decoder,
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, str]],
    config: AnswerConfig,
    key: jax.Array,
) -> Iterator[str]:
    """The assistant's next message in pieces of text, as the tokens come.

    Raises:
      ValueError: the conversation is too long for the model.
      ChatTemplateError, TokenizerError: the template refuses the messages.
    """
    tokens = generate(
        model,
        tokenizer.apply_chat_template(messages, add_generation_prompt=True),
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        key=key,
        eos_ids=end_ids(model, tokenizer),
    )
    return tokenizer.decode_stream(tokens)


def _adapter(config: AnswerConfig) -> Adapter | None:
    if config.run is not None:
        return read_run(config.run)
    return None if config.adapter is None else read_adapter(config.adapter)


def _base_model(adapter: Adapter) -> Path:
    path = Path(adapter.base_model or "")
    if not adapter.base_model or not path.exists():
        raise AdapterError(
            f"the adapter's base model {adapter.base_model!r} is not here; name the "
            "model with --model"
        )
    return path
