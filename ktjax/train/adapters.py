"""The adapter that a training made, from its newest checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ktjax.io.adapters import Adapter, AdapterError, read_adapter
from ktjax.io.safetensors import SafetensorsFile
from ktjax.lora import LoRA
from ktjax.train import checkpoint

# `nnx.LoRAParam`s of the experts, as checkpoints name the leaves of the tree.
_NAME = re.compile(
    rf"layers\.(\d{{1,9}})\.mlp\.experts\.({'|'.join(LoRA.NAMES)})\.value"
)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether the directory `path` is a training's, with a checkpoint."""
    return bool(checkpoint.list_checkpoints(Path(path) / "checkpoints"))


def newest_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The directory of the newest checkpoint of the training at `path`.

    Raises:
      CheckpointError: there is none.
    """
    saved = checkpoint.list_checkpoints(Path(path) / "checkpoints")
    if not saved:
        raise checkpoint.CheckpointError(
            f"{path} holds no checkpoint; give a training's output_dir"
        )
    return saved[-1][1]


def read_run(path: str | os.PathLike[str]) -> Adapter:
    """The adapter in the newest checkpoint of the training at `path`.

    The base model is not needed. The arrays are views of the checkpoint's file.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      AdapterError: it holds something else than adapters of experts, or an adapter
        that is not finite.
    """
    newest = newest_checkpoint(path)
    meta = checkpoint.read_meta(newest)
    file = SafetensorsFile(newest / "lora.safetensors")
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
        config = meta["config"]
        return Adapter(
            config["lora_rank"],
            config["lora_alpha"],
            {index: LoRA(**arrays) for index, arrays in sorted(layers.items())},
            meta["model"],
        )
    except KeyError as error:
        raise checkpoint.CheckpointError(
            f"{newest}: its meta.json has no {error}"
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{file.path}: {error}") from None


def read_run_or_adapter(path: str | os.PathLike[str]) -> Adapter:
    """`read_run` of a training's directory, `ktjax.io.read_adapter` of any other."""
    return read_run(path) if is_run(path) else read_adapter(path)
