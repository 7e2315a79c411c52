"""The adapter that a training made, from its best or newest checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktjax.config import LoRAConfig, split_patterns
from ktjax.io.adapters import (
    Adapter,
    AdapterError,
    Place,
    Strength,
    read_adapter,
    said,
)
from ktjax.io.adapters.names import is_projection
from ktjax.io.safetensors import SafetensorsFile
from ktjax.lora import LinearLoRA, LoRA
from ktjax.models.targets import experts_name, family_name, projection_name
from ktjax.train import checkpoint
from ktjax.train.loop import chosen_checkpoint

# `nnx.LoRAParam`s, as checkpoints name the leaves of the tree: of the experts, and of
# projections.
_EXPERTS = re.compile(
    rf"layers\.(\d{{1,9}})\.mlp\.experts\.({'|'.join(LoRA.NAMES)})\.value"
)
_PROJECTION = re.compile(
    rf"((?:layers\.\d{{1,9}}\.[\w.]+)|head)\.lora_({'|'.join(LinearLoRA.NAMES)})\.value"
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
      AdapterError: it holds something else than adapters, or an adapter that is not
        finite.
    """
    chosen = run_checkpoint(path)
    meta = checkpoint.read_meta(chosen)
    file = SafetensorsFile(chosen / "lora.safetensors")
    try:
        layers, projections = _arrays(file, meta.get("model_type") or "")
        lora, model = lora_of(meta["config"]), meta["model"]
        places: list[Place] = [*layers, *projections]
        strengths = {place: _strength(lora, place) for place in places}
        return Adapter.of(strengths, layers, model, projections)
    except KeyError as error:
        raise checkpoint.CheckpointError(
            f"{chosen}: its meta.json has no {error}"
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{file.path}: {error}") from None


def _arrays(
    file: SafetensorsFile, model_type: str
) -> tuple[dict[int, LoRA], dict[str, LinearLoRA]]:
    """The adapters of experts by layer, and of projections by name."""
    layers: dict[int, dict[str, Any]] = {}
    projections: dict[str, dict[str, Any]] = {}
    for name in file.entries:
        if match := _EXPERTS.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = file[name]
            continue
        match = _PROJECTION.fullmatch(name)
        module = match and family_name(projection_name(match[1]), model_type)
        if not match or not module or not is_projection(module):
            raise AdapterError(f"{name} is no adapter of routed experts or projections")
        projections.setdefault(module, {})[match[2]] = file[name]
    return (
        {i: _complete(LoRA, arrays, i) for i, arrays in sorted(layers.items())},
        {n: _complete(LinearLoRA, arrays, n) for n, arrays in projections.items()},
    )


def _complete(kind: Any, arrays: Mapping[str, Any], place: Place) -> Any:
    for name in kind.NAMES:
        if name not in arrays:
            raise AdapterError(f"{name} of {said(place)} is missing")
    return kind(**arrays)


def _strength(lora: LoRAConfig, place: Place) -> Strength:
    name = experts_name(place) if isinstance(place, int) else place
    own = lora.of_module(name)
    return Strength(own.rank, own.scaling * own.rank)


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
        targets=split_patterns(config.get("targets", "experts")),
    )


def read_run_or_adapter(path: str | os.PathLike[str]) -> Adapter:
    """`read_run` of a training's directory, `ktjax.io.read_adapter` of any other."""
    return read_run(path) if is_run(path) else read_adapter(path)
