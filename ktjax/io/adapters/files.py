"""Adapters from and to directories."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ktjax.io.adapters import fused, ktransformers, per_expert, projections
from ktjax.io.adapters.adapter import Adapter, AdapterError, Strength
from ktjax.io.adapters.names import (
    FUSED_FOLDER,
    FUSED_PARAMETERS,
    Layout,
    family_of,
    kind_of,
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
      targets: the kinds of modules that it adapts: experts, q_proj, and so on.
      layers: the layers whose experts it adapts.
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
    `fused_expert_lora.safetensors`. Each may hold adapters of projections outside the
    experts too, or of these alone. Float16 becomes float32.

    Raises:
      AdapterError: it adapts anything but gate, up and down of all experts of a layer
        and the projections of attention, dense layers, shared experts and the head;
        something is missing, has a wrong shape or is not finite; or rank or scaling
        differ among the experts of a layer.
      CheckpointError: a safetensors file is damaged.
    """
    directory = Path(path)
    layout, file, others, config = _open(directory)
    strengths, layers = _LAYOUTS[layout].decode(file, config)
    theirs, found = projections.decode(others, config)
    try:
        every = {**strengths, **theirs}
        return Adapter.of(every, layers, config.base_model, found)
    except AdapterError as error:
        raise AdapterError(f"{file.path}: {error}") from None


def inspect_adapter(path: str | os.PathLike[str]) -> AdapterInfo:
    """What the directory `path` holds, from headers alone.

    Raises:
      AdapterError, CheckpointError: as `read_adapter`, but the data are not looked at.
    """
    layout, file, others, config = _open(Path(path))
    entries = {**file.entries, **others.entries}.values()
    layers = tuple(sorted(_LAYOUTS[layout].layers_of(file.entries)))
    kinds = map(kind_of, projections.tensors_of(others.entries))
    strength = config.strength("")
    return AdapterInfo(
        layout=layout,
        rank=strength.rank,
        alpha=strength.alpha,
        targets=tuple(dict.fromkeys((*(["experts"] if layers else []), *kinds))),
        layers=layers,
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
      layout: of the experts. "peft": two matrices per expert and projection.
        "peft-fused": PEFT's `target_parameters`, as 0.19.1 and later read it. None: the
        first, except for
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
    by_layer = any(layer in adapter.strengths for layer in adapter.layers)
    if layout is None:
        layout = "peft-fused" if by_layer else family.layout
        layout = layout if adapter.layers else "peft"
    elif layout not in ("peft", "peft-fused"):
        raise ValueError(
            f"write_adapter: layout must be peft or peft-fused, got {layout!r}"
        )
    elif layout == "peft" and family.layout != "peft" and adapter.layers:
        raise ValueError(
            f"write_adapter: PEFT ignores the per-expert tensors of {model_type} "
            f"without a word; use the layout {family.layout}"
        )
    elif layout == "peft" and by_layer:
        # PEFT 0.21 puts a pattern of its own before those of the file.
        raise ValueError(
            "write_adapter: from per-expert tensors PEFT takes one rank and one alpha "
            "for all layers; use the layout peft-fused"
        )
    adapter = dataclasses.replace(
        adapter,
        layers={i: _numpy(lora) for i, lora in adapter.layers.items()},
        projections={n: _numpy(lora) for n, lora in adapter.projections.items()},
    )
    if layout == "peft":
        specs, pieces = per_expert.encode(adapter, family)
    else:
        specs, pieces = fused.encode(adapter)
    more, arrays = projections.encode(adapter.projections)

    def every_piece(name: str) -> Any:
        return [arrays[name]] if name in arrays else pieces(name)

    with new_directory(Path(path), replace=replace) as directory:
        save_stream(
            directory / WEIGHTS_NAME, {**specs, **more}, every_piece, {"format": "pt"}
        )
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
    adapter: Adapter, layout: Layout, expert_projections: tuple[str, ...]
) -> dict[str, Any]:
    """The content of adapter_config.json.

    Never rsLoRA: when PEFT joins gate and up it doubles rank and alpha, which leaves
    alpha / rank alone but not alpha / √rank.
    """
    is_fused = layout == "peft-fused" and bool(adapter.layers)
    ranks, alphas = _patterns(adapter, is_fused)
    modules, parameters = projections.targets(adapter.projections)
    if is_fused:
        parameters += [f"{FUSED_FOLDER}.{name}" for name in FUSED_PARAMETERS]
    elif adapter.layers:
        modules += expert_projections
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
        "target_modules": modules,
        "target_parameters": parameters or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _patterns(
    adapter: Adapter, is_fused: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern; PEFT takes the first key that fits."""
    strengths: dict[str, Strength] = {}
    for place in (*adapter.strengths, None):
        strength = adapter.strength("" if place is None else place)
        if isinstance(place, str):
            strengths[rf"{re.escape(place)}(\.weight)?"] = strength
            continue
        layer = "" if place is None else rf"layers\.{place}\."
        if is_fused:  # gate and up together have twice the rank
            double = Strength(2 * strength.rank, 2 * strength.alpha)
            strengths[f"{layer}{FUSED_FOLDER}.{FUSED_PARAMETERS[0]}"] = double
        if layer:
            strengths[f"{layer}{FUSED_FOLDER}.*"] = strength
    return (
        {key: strength.rank for key, strength in strengths.items()},
        {key: _plain(strength.alpha) for key, strength in strengths.items()},
    )


def _plain(alpha: float) -> float:
    """PEFT declares alpha as an integer; it computes with any number."""
    return int(alpha) if alpha == int(alpha) else alpha


def _open(
    directory: Path,
) -> tuple[str, SafetensorsFile, SafetensorsFile, PeftConfig]:
    """The layout; the files with the experts' tensors and all others; the options."""
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
        file = SafetensorsFile(kt)
        others = SafetensorsFile(weights) if weights.is_file() else file
        layout = "ktransformers"
    else:
        file = others = SafetensorsFile(weights)
        layout = "peft-fused" if fused.layers_of(file.keys()) else "peft"
    layers = _LAYOUTS[layout].layers_of(file.keys())
    found = projections.tensors_of(others.keys())
    known = {name for tensors in layers.values() for name in tensors.values()}
    _refuse_unknown(file, known if file is not others else known | _names(found))
    if others is not file:
        _refuse_unknown(others, _names(found))
    if not layers and not found:
        raise AdapterError(
            f"{file.path}: it holds no LoRA of a routed expert or a projection"
        )
    return layout, file, others, config


def _names(found: dict[str, dict[str, str]]) -> set[str]:
    return {name for tensors in found.values() for name in tensors.values()}


def _refuse_unknown(file: SafetensorsFile, known: set[str]) -> None:
    """An adapter that is only partly understood would be another adapter."""
    unknown = [name for name in file.entries if name not in known]
    copies = [name for name in unknown if name.endswith(".base_layer.weight")]
    unknown = [name for name in unknown if name not in copies]
    if unknown:
        raise AdapterError(
            f"{file.path}: {unknown[0]} is no LoRA of a routed expert or a projection"
            + (f", nor are {len(unknown) - 1} others" if len(unknown) > 1 else "")
            + "; only adapters of the routed experts' gate, up and down projections "
            "and of the projections of attention, dense layers, shared experts and "
            "the output head are supported"
        )
    if copies:
        raise AdapterError(
            f"{file.path}: {copies[0]} is a copy of the base model's weight; save the "
            "adapter without it (PEFT: save_embedding_layers=False)"
        )
