"""Adapters of projections outside the routed experts, in PEFT's names.

`base_model.model.` and the module's name in the model's checkpoint, then
`.lora_A.weight` `[rank, in]` and `.lora_B.weight` `[out, rank]`: in files of every
layout of the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ktjax.io.adapters.adapter import AdapterError, Array, Strength
from ktjax.io.adapters.names import PREFIX, is_projection
from ktjax.io.adapters.peft_config import PeftConfig
from ktjax.io.safetensors import SafetensorsFile
from ktjax.io.stream import Spec
from ktjax.lora import LinearLoRA

_SIDES = {"a": "lora_A", "b": "lora_B"}

# PEFT takes these endings for those of routed experts, whatever stands before them, in
# the modules that a configuration names. It adapts them as parameters all the same.
_EXPERTS_ENDINGS = ("gate_proj", "up_proj", "down_proj")


def tensors_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The tensors of projections by the projection's name and then by array."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for side, lora_side in _SIDES.items():
            suffix = f".{lora_side}.weight"
            if name.startswith(PREFIX) and name.endswith(suffix):
                module = name.removeprefix(PREFIX).removesuffix(suffix)
                if is_projection(module):
                    found.setdefault(module, {})[side] = name
    return found


def decode(
    file: SafetensorsFile, config: PeftConfig
) -> tuple[dict[str, Strength], dict[str, LinearLoRA]]:
    """The strength and the arrays of each projection.

    Raises:
      AdapterError: one of a pair is missing, or is no matrix.
    """
    strengths, projections = {}, {}
    for module, tensors in tensors_of(file.keys()).items():
        strengths[module] = config.strength(config.target_name(module))
        arrays = (_matrix(file, module, tensors, side) for side in _SIDES)
        projections[module] = LinearLoRA(*arrays)
    return strengths, projections


def encode(
    projections: Mapping[str, LinearLoRA],
) -> tuple[dict[str, Spec], dict[str, Array]]:
    """The tensors' specs, and the arrays, for `save_stream`."""
    arrays = {
        f"{PREFIX}{module}.{lora_side}.weight": getattr(lora, side)
        for module, lora in projections.items()
        for side, lora_side in _SIDES.items()
    }
    return {name: Spec(a.dtype, a.shape) for name, a in arrays.items()}, arrays


def targets(projections: Iterable[str]) -> tuple[list[str], list[str]]:
    """What PEFT's target_modules and target_parameters must name."""
    modules, parameters = [], []
    for name in projections:
        if name.endswith(_EXPERTS_ENDINGS):
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def _matrix(
    file: SafetensorsFile, module: str, tensors: Mapping[str, str], side: str
) -> Any:
    if side not in tensors:
        raise AdapterError(f"{file.path}: {_SIDES[side]} of {module} is missing")
    tensor = file[tensors[side]]
    if tensor.ndim != 2:
        raise AdapterError(
            f"{file.path}: {tensors[side]} must be a matrix, got {list(tensor.shape)}"
        )
    return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor
