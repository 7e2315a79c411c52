"""Adapters from and to directories."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ktjax.io.adapters import fused, ktransformers, per_expert
from ktjax.io.adapters.adapter import Adapter, AdapterError, Strength
from ktjax.io.adapters.names import (
    FUSED_FOLDER,
    FUSED_PARAMETERS,
    Layout,
    family_of,
)
from ktjax.io.adapters.peft_config import CONFIG_NAME, PeftConfig
from ktjax.io.atomic import new_directory, new_file
from ktjax.io.safetensors import SafetensorsFile
from ktjax.io.stream import save_stream

WEIGHTS_NAME = "adapter_model.safetensors"

_LAYOUTS: dict[str, Any] = {
    "peft": per_expert,
    "peft-fused": fused,
    "ktransformers": ktransformers,
}


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """What an adapter's directory says without its data being read.

    Attributes:
      layout: "peft", "peft-fused" or "ktransformers".
      rank, alpha: `r` and `lora_alpha` of its configuration; with rsLoRA, alpha is what
        makes alpha / rank the scaling.
      targets: what its configuration says that it adapts.
      layers: the layers that it adapts.
      dtypes: of its tensors.
      parameters: how many numbers it holds.
      size: their bytes.
      base_model: the model that it was made for, or None.
    """

    layout: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    dtypes: tuple[str, ...]
    parameters: int
    size: int
    base_model: str | None


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether the directory `path` looks like an adapter's."""
    names = (CONFIG_NAME, WEIGHTS_NAME, ktransformers.FILE_NAME)
    return any((Path(path) / name).is_file() for name in names)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read the adapter in the directory `path`, in any of three layouts.

    PEFT's with two matrices per expert and projection; PEFT's `target_parameters`, as
    0.18 and as 0.19.1 and later write it; and KTransformers'
    `fused_expert_lora.safetensors`. Float16 becomes float32.

    Raises:
      AdapterError: it adapts anything but gate, up and down of all experts of a layer,
        something is missing, has a wrong shape or is not finite, or rank or scaling
        differ among the experts of a layer.
      CheckpointError: a safetensors file is damaged.
    """
    directory = Path(path)
    layout, file, config = _open(directory)
    strengths, layers = _LAYOUTS[layout].decode(file, config)
    try:
        return Adapter.of(strengths, layers, config.base_model)
    except AdapterError as error:
        raise AdapterError(f"{file.path}: {error}") from None


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterInfo:
    """What the directory `path` holds, from headers alone.

    Raises:
      AdapterError, CheckpointError: as `read_adapter`, but the data are not looked at.
    """
    layout, file, config = _open(Path(path))
    entries = file.entries.values()
    strength = config.strength("")
    return AdapterInfo(
        layout=layout,
        rank=strength.rank,
        alpha=strength.alpha,
        targets=config.targets,
        layers=tuple(sorted(_LAYOUTS[layout].layers_of(file.entries))),
        dtypes=tuple(sorted({str(entry.dtype) for entry in entries})),
        parameters=sum((e.stop - e.start) // e.dtype.itemsize for e in entries),
        size=sum(entry.stop - entry.start for entry in entries),
        base_model=config.base_model,
    )


def write_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    model_type: str,
    *,
    layout: Layout | None = None,
    replace: bool = False,
) -> Layout:
    """Write `adapter` as the directory `path`, in a form that PEFT loads.

    It is read again and compared bit for bit before the directory gets its name.

    Args:
      path: the directory to make.
      adapter: what to write.
      model_type: the base model's, from its config.json.
      layout: "peft": two matrices per expert and projection. "peft-fused": PEFT's
        `target_parameters`, as 0.19.1 and later read it. None: the first, except for
        families that need the second (see `names.FAMILIES`) and for adapters with
        layers of different strengths.
      replace: whether an existing `path` is replaced.

    Returns:
      The layout.

    Raises:
      FileExistsError: `path` exists and is not to be replaced.
      ValueError: an unknown model type, or a layout that PEFT would not load into it.
      AdapterError: what was written is not what is read.
    """
    family = family_of(model_type)
    if layout is None:
        layout = "peft-fused" if adapter.strengths else family.layout
    elif layout not in ("peft", "peft-fused"):
        raise ValueError(
            f"write_adapter: layout must be peft or peft-fused, got {layout!r}"
        )
    elif layout == "peft" and family.layout != "peft":
        raise ValueError(
            f"write_adapter: PEFT ignores the per-expert tensors of {model_type} "
            f"without a word; use the layout {family.layout}"
        )
    elif layout == "peft" and adapter.strengths:
        # PEFT 0.21 puts a pattern of its own before those of the file.
        raise ValueError(
            "write_adapter: from per-expert tensors PEFT takes one rank and one alpha "
            "for all layers; use the layout peft-fused"
        )
    adapter = dataclasses.replace(
        adapter, layers={i: _numpy(lora) for i, lora in adapter.layers.items()}
    )
    if layout == "peft":
        specs, pieces = per_expert.encode(adapter, family)
    else:
        specs, pieces = fused.encode(adapter)
    with new_directory(Path(path), replace=replace) as directory:
        save_stream(directory / WEIGHTS_NAME, specs, pieces, {"format": "pt"})
        text = json.dumps(_config(adapter, layout, family.projections), indent=2)
        with new_file(directory / CONFIG_NAME) as file:
            file.write(text.encode())
        different = next(adapter.differences(read_adapter(directory)), None)
        if different:
            raise AdapterError(
                f"{path}: what was written is not what was read again: {different}; "
                "nothing is left there"
            )
    return layout


def _numpy(lora: Any) -> Any:
    return type(lora)(*(np.asarray(array) for array in lora.arrays()))


def _config(
    adapter: Adapter, layout: Layout, projections: tuple[str, ...]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Never rsLoRA: when PEFT joins gate and up it doubles rank and alpha, which leaves
    alpha / rank alone but not alpha / √rank. Never dropout, whatever the training had:
    PEFT makes one parameter of per-expert adapters too, and refuses dropout for it.
    """
    is_fused = layout == "peft-fused"
    ranks, alphas = _patterns(adapter, is_fused)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "r": adapter.rank,
        "lora_alpha": _plain(adapter.alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": [] if is_fused else list(projections),
        "target_parameters": [f"{FUSED_FOLDER}.{name}" for name in FUSED_PARAMETERS]
        if is_fused
        else None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _patterns(
    adapter: Adapter, is_fused: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern; PEFT takes the first key that fits."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    usual = Strength(adapter.rank, adapter.alpha)
    layers = {rf"layers\.{i}\.": s for i, s in adapter.strengths.items()}
    for layer, strength in (*layers.items(), ("", usual)):
        if is_fused:  # gate and up together have twice the rank
            key = f"{layer}{FUSED_FOLDER}.{FUSED_PARAMETERS[0]}"
            ranks[key] = 2 * strength.rank
            alphas[key] = _plain(2 * strength.alpha)
        if layer:
            ranks[f"{layer}.*"] = strength.rank
            alphas[f"{layer}.*"] = _plain(strength.alpha)
    return ranks, alphas


def _plain(alpha: float) -> float:
    """PEFT declares alpha as an integer; it computes with any number."""
    return int(alpha) if alpha == int(alpha) else alpha


def _open(directory: Path) -> tuple[str, SafetensorsFile, PeftConfig]:
    """The layout, the file with the experts' tensors, and the configuration."""
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such directory; expected an adapter's")
    config = PeftConfig(directory)
    weights, kt = directory / WEIGHTS_NAME, directory / ktransformers.FILE_NAME
    if not weights.is_file() and not kt.is_file():
        raise AdapterError(
            f"{directory}: neither {WEIGHTS_NAME} nor {ktransformers.FILE_NAME} is "
            "there; save the adapter with safetensors"
        )
    if kt.is_file():
        if weights.is_file():
            _refuse_others(weights, SafetensorsFile(weights).keys(), {})
        return "ktransformers", _checked(kt, "ktransformers"), config
    names = SafetensorsFile(weights).keys()
    layout = "peft-fused" if fused.layers_of(names) else "peft"
    return layout, _checked(weights, layout), config


def _checked(path: Path, layout: str) -> SafetensorsFile:
    file = SafetensorsFile(path)
    layers = _LAYOUTS[layout].layers_of(file.keys())
    _refuse_others(path, file.keys(), layers)
    if not layers:
        raise AdapterError(f"{path}: it holds no LoRA of a routed expert")
    return file


def _refuse_others(
    path: Path, names: Iterable[str], layers: dict[int, dict[Any, str]]
) -> None:
    """An adapter that is only partly understood would be another adapter."""
    known = {name for layer in layers.values() for name in layer.values()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AdapterError(
            f"{path}: {unknown[0]} is no LoRA of a routed expert"
            + (f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else "")
            + "; only adapters of the routed experts' gate, up and down projections "
            "are supported"
        )
