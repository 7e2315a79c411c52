"""Adapters from trainings, or in other formats, to PEFT's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console

from ktjax.commands.config import ExportConfig
from ktjax.io.adapters import Adapter, AdapterError, write_adapter
from ktjax.io.gguf import is_gguf
from ktjax.models import ModelConfig
from ktjax.train.adapters import read_run_or_adapter


def run_export(config: ExportConfig, console: Console) -> None:
    """Write the adapter, read it again, compare, and say so on `console`.

    Raises:
      AdapterError, CheckpointError, ValueError, FileExistsError: each says what is
      wrong and where.
    """
    adapter = read_run_or_adapter(config.source)
    if config.model is not None:
        base = str(config.model.resolve())
        adapter = dataclasses.replace(adapter, base_model=base)
    layout = write_adapter(
        config.out,
        adapter,
        model_type_of(adapter),
        layout=None if config.layout == "auto" else config.layout,
    )
    console.print(
        f"wrote   {config.out} ({layout}), read again: the same bits\n"
        f"        rank {adapter.rank}, alpha {adapter.alpha:g}, "
        f"{adapter.summary()}, {adapter.dtype}",
        highlight=False,
        soft_wrap=True,
    )


def model_type_of(adapter: Adapter) -> str:
    """The model type that the adapter's base model has.

    Raises:
      AdapterError: the base model is not here; says how to name it.
    """
    base = Path(adapter.base_model or "")
    file = base / "config.json"
    try:
        if is_gguf(base):
            return ModelConfig.from_pretrained(base).model_type
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise AdapterError(
            f"the adapter's base model {adapter.base_model!r} has no readable "
            "config.json, which decides what the tensors are called; name the model's "
            "directory with --model"
        ) from None
