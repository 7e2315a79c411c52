"""PEFT's layout with two matrices for every projection of every expert.

`base_model.model.model.layers.L.mlp.experts.E.{gate,up,down}_proj.lora_{A,B}.weight`,
A `[rank, in]`, B `[out, rank]`; Mixtral says `block_sparse_moe.experts.E.{w1,w3,w2}`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ktjax.io.adapters.adapter import Adapter, AdapterError, Array, Strength
from ktjax.io.adapters.names import PARTS, PREFIX, Family, target_of
from ktjax.io.adapters.peft_config import PeftConfig
from ktjax.io.safetensors import SafetensorsFile
from ktjax.io.stream import Spec
from ktjax.lora import LoRA

SIDES = {"a": "lora_A", "b": "lora_B"}


def layers_of(names: Iterable[str]) -> dict[int, dict[tuple[str, int], str]]:
    """The tensors of this layout by layer and then by (array of `LoRA`, expert)."""
    layers: dict[int, dict[tuple[str, int], str]] = {}
    for name in names:
        for side, lora_side in SIDES.items():
            suffix = f".{lora_side}.weight"
            if not (name.startswith(PREFIX) and name.endswith(suffix)):
                continue
            module = name.removeprefix(PREFIX).removesuffix(suffix)
            target = target_of(f"{module}.weight")
            if target is not None and target.expert is not None:
                key = (f"{target.parts[0]}_{side}", target.expert)
                layers.setdefault(target.layer, {})[key] = name
    return layers


def decode(
    file: SafetensorsFile, config: PeftConfig
) -> tuple[dict[int, Strength], dict[int, LoRA]]:
    """Stack the experts' matrices; the strength and the arrays of each layer.

    Raises:
      AdapterError: a matrix is missing, two do not fit together, or ranks or scalings
        differ within a layer.
    """
    layers = dict(sorted(layers_of(file.keys()).items()))
    strengths = {i: _one_strength(found, config) for i, found in layers.items()}
    return strengths, {
        index: LoRA(*(_stack(file, index, name, found) for name in LoRA.NAMES))
        for index, found in layers.items()
    }


def encode(adapter: Adapter, family: Family) -> tuple[dict[str, Spec], Any]:
    """The tensors' specs, and the function from name to pieces, for `save_stream`."""
    specs: dict[str, Spec] = {}
    source: dict[str, tuple[Array, int]] = {}
    for layer, lora in adapter.layers.items():
        for expert in range(lora.gate_a.shape[0]):
            for part, projection in zip(PARTS, family.projections, strict=True):
                for side, lora_side in SIDES.items():
                    array = getattr(lora, f"{part}_{side}")
                    name = (
                        f"{PREFIX}model.layers.{layer}.{family.folder}.{expert}."
                        f"{projection}.{lora_side}.weight"
                    )
                    specs[name] = Spec(array.dtype, array.shape[1:])
                    source[name] = array, expert

    def pieces(name: str) -> list[Array]:
        array, expert = source[name]
        return [array[expert]]

    return specs, pieces


def _one_strength(found: Mapping[tuple[str, int], str], config: PeftConfig) -> Strength:
    """The rank and alpha that all modules of a layer share."""
    modules = (
        name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in found.values()
    )
    first = next(modules)
    expected = config.strength(first)
    if not config.has_patterns:
        return expected
    for module in modules:
        strength = config.strength(module)
        if strength != expected:
            raise AdapterError(
                f"{config.path}: {module} has rank {strength.rank} and scaling "
                f"{strength.scaling:g}, {first} has {expected.rank} and "
                f"{expected.scaling:g}; experts of a layer with different ranks or "
                "scalings are not supported"
            )
    return expected


def _stack(
    file: SafetensorsFile, layer: int, name: str, found: Mapping[tuple[str, int], str]
) -> Array:
    experts = {expert for _, expert in found}
    for expert in range(max(experts) + 1):
        # Stops at the first gap, however large the numbers in the names are.
        if (name, expert) not in found:
            part, side = name.split("_")
            raise AdapterError(
                f"{file.path}: {SIDES[side]} of the {part} projection of expert "
                f"{expert} of layer {layer} is missing; every expert needs LoRA on "
                "gate, up and down"
            )
    first = file[found[name, 0]]
    stacked = np.empty((len(experts), *first.shape), first.dtype)
    for expert in sorted(experts):
        key = found[name, expert]
        tensor = file[key]
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise AdapterError(
                f"{file.path}: {key} is {tensor.dtype}{list(tensor.shape)}, expert 0 "
                f"has {first.dtype}{list(first.shape)}"
            )
        stacked[expert] = tensor
    return stacked.astype(np.float32) if stacked.dtype == np.float16 else stacked
