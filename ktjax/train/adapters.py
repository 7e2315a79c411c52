"""The adapter that a training made, from its best or newest checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktjax.config import LoRAConfig
from ktjax.io.adapters import Adapter, AdapterError, Strength, read_adapter
from ktjax.io.safetensors import SafetensorsFile
from ktjax.lora import LoRA
from ktjax.models.loading import experts_name
from ktjax.train import checkpoint
from ktjax.train.loop import chosen_checkpoint

# `nnx.LoRAParam`s of the experts, as checkpoints name the leaves of the tree.
_NAME = re.compile(
    rf"layers\.(\d{{1,9}})\.mlp\.experts\.({'|'.join(LoRA.NAMES)})\.value"
)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether the directory `path` is a training's, with a checkpoint."""
    return bool(checkpoint.list_checkpoints(Path(path) / "checkpoints"))


def run_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that stands for the training at `path`.

    It is the one with the best evaluation if the training looked for it (`patience`),
    else the newest.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    if not is_run(path):
        raise checkpoint.CheckpointError(
            f"{path} holds no checkpoint; give a training's output_dir"
        )
    return chosen_checkpoint(Path(path) / "checkpoints")


def read_run(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in `run_checkpoint(path)`.

    The base model is not needed. The arrays are views of the checkpoint's file.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      AdapterError: it holds something else than adapters of experts, or an adapter
        that is not finite.
    """
    chosen = run_checkpoint(path)
    meta = checkpoint.read_meta(chosen)
    file = SafetensorsFile(chosen / "lora.safetensors")
    layers: dict[int, dict[str, Any]] = {}
    for name in file.entries:
        match = _NAME.fullmatch(name)
        if match is None:
            raise AdapterError(f"{file.path}: {name} is no adapter of routed experts")
        layers.setdefault(int(match[1]), {})[match[2]] = file[name]
    for index, arrays in layers.items():
        for name in LoRA.NAMES:
            if name not in arrays:
                raise AdapterError(f"{file.path}: {name} of layer {index} is missing")
    try:
        lora, model = lora_of(meta["config"]), meta["model"]
        own = {index: lora.of_module(experts_name(index)) for index in layers}
        return Adapter.of(
            {index: Strength(c.rank, c.scaling * c.rank) for index, c in own.items()},
            {index: LoRA(**arrays) for index, arrays in sorted(layers.items())},
            model,
        )
    except KeyError as error:
        raise checkpoint.CheckpointError(
            f"{chosen}: its meta.json has no {error}"
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{file.path}: {error}") from None


def lora_of(config: Mapping[str, Any]) -> LoRAConfig:
    """The adapters' configuration, from the options in a checkpoint's meta.

    Raises:
      KeyError: an option is missing.
    """
    return LoRAConfig(
        config["lora_rank"],
        config["lora_alpha"],
        # Younger than the first checkpoints.
        config.get("rslora", False),
        config.get("rank_pattern", {}),
    )


def read_run_or_adapter(path: str | os.PathLike[str]) -> Adapter:
    """`read_run` of a training's directory, `ktjax.io.read_adapter` of any other."""
    return read_run(path) if is_run(path) else read_adapter(path)
