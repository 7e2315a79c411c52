"""KTransformers' `fused_expert_lora.safetensors`.

`layers.L.experts.{gate,up,down}_lora_{a,b}`: the arrays of `ktjax.LoRA`, A
`[experts, rank, in]`, B `[experts, out, rank]`. Rank and alpha are in the
adapter_config.json beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ktjax.io.adapters.adapter import AdapterError, Array, Strength
from ktjax.io.adapters.peft_config import PeftConfig
from ktjax.io.safetensors import SafetensorsFile
from ktjax.lora import LoRA

FILE_NAME = "fused_expert_lora.safetensors"

_NAME = re.compile(r"layers\.(\d{1,9})\.experts\.(gate|up|down)_lora_(a|b)")


def layers_of(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """The tensors of this layout by layer and then by array of `LoRA`."""
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            layers.setdefault(int(match[1]), {})[f"{match[2]}_{match[3]}"] = name
    return layers


def decode(
    file: SafetensorsFile, config: PeftConfig
) -> tuple[dict[int, Strength], dict[int, LoRA]]:
    """Read the arrays, which stay views of the file; and the strength of each layer.

    Raises:
      AdapterError: an array is missing, or the file's ranks are not the
        configuration's.
    """
    if config.rslora or config.has_patterns:
        raise AdapterError(
            f"{config.path}: use_rslora, rank_pattern and alpha_pattern have no "
            f"meaning for {FILE_NAME}, whose adapters are scaled by alpha / rank"
        )
    layers = {}
    for index, found in sorted(layers_of(file.keys()).items()):
        for name in LoRA.NAMES:
            if name not in found:
                part, side = name.split("_")
                raise AdapterError(
                    f"{file.path}: layers.{index}.experts.{part}_lora_{side} is missing"
                )
        layers[index] = LoRA(*(_array(file, found[name]) for name in LoRA.NAMES))
    # They do not depend on the name, as there are no patterns.
    return dict.fromkeys(layers, config.strength("")), layers


def _array(file: SafetensorsFile, name: str) -> Array:
    array = file[name]
    if array.ndim != 3:
        raise AdapterError(
            f"{file.path}: {name} must have 3 dimensions, got {list(array.shape)}"
        )
    return array.astype(np.float32) if array.dtype == np.float16 else array
