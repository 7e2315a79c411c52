"""PEFT's layout for experts that are one parameter (`target_parameters`).

After `base_model.model.model.layers.L.mlp.experts.`, `base_layer.lora_A.weight` and
`base_layer.lora_B.weight` are for gate_up_proj, `lora_A.weight` and `lora_B.weight` for
down_proj. A has the experts' ranks as rows, expert by expert; in B's columns the
expert's index is the fastest. With R = rank · experts:

    PEFT     gate_up A   gate_up B   down A    down B    W of an expert gains
    0.19.1   [R, H]      [2I, R]     [R, I]    [H, R]    s B A
    0.18     [R, 2I]     [H, R]      [R, H]    [I, R]    s (B A)ᵀ

Gate and up share A here. Adapters with an A each become one of twice the rank:
A = [A_gate; A_up], B = [[B_gate, 0], [0, B_up]].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ktjax.io.adapters.adapter import Adapter, AdapterError, Array, Strength
from ktjax.io.adapters.names import FUSED_FOLDER, FUSED_PARAMETERS, PREFIX
from ktjax.io.adapters.peft_config import PeftConfig
from ktjax.io.safetensors import SafetensorsFile
from ktjax.io.stream import Spec
from ktjax.lora import LoRA

_GATE_UP, _DOWN = ("base_layer.", "")
_KEYS = tuple(
    f"{where}lora_{side}.weight" for where in (_GATE_UP, _DOWN) for side in "AB"
)
_NAME = re.compile(
    re.escape(PREFIX)
    + r"model\.layers\.(\d{1,9})\.mlp\.experts\.((?:base_layer\.)?lora_[AB]\.weight)"
)


def layers_of(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """The tensors of this layout by layer and then by the end of their name."""
    layers: dict[int, dict[str, str]] = {}
    for name in names:
        if match := _NAME.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = name
    return layers


class _Layer(NamedTuple):
    """A layer, A as `[experts, rank, in]` and B as `[experts, out, rank]`."""

    gate_up_a: Array
    gate_up_b: Array
    down_a: Array
    down_b: Array


def decode(
    file: SafetensorsFile, config: PeftConfig
) -> tuple[dict[int, Strength], dict[int, LoRA]]:
    """Undo the fusion; the strength and the arrays of each layer.

    When every gate_up_proj has the form of two adapters of half its rank, it becomes
    those two. Else gate and up get the shared A; a smaller rank is filled up with
    zeros, which changes no product.

    Raises:
      AdapterError: a tensor is missing or has a wrong shape, or the scalings of a
        layer's projections differ.
    """
    found = dict(sorted(layers_of(file.keys()).items()))
    strengths = {index: _strengths(index, config) for index in found}
    layers = {
        index: _layer(file, index, names, *(s.rank for s in strengths[index]))
        for index, names in found.items()
    }
    halves = all(gate_up.rank == 2 * down.rank for gate_up, down in strengths.values())
    if halves and all(map(_is_block_diagonal, layers.values())):
        own = {index: down for index, (_, down) in strengths.items()}
        return own, {index: _separate(layer) for index, layer in layers.items()}
    own = {i: max(both, key=lambda s: s.rank) for i, both in strengths.items()}
    return own, {i: _shared(layer, own[i].rank) for i, layer in layers.items()}


def encode(adapter: Adapter) -> tuple[dict[str, Spec], Any]:
    """The tensors' specs, and the function from name to pieces, for `save_stream`."""
    specs: dict[str, Spec] = {}
    source: dict[str, tuple[LoRA, str]] = {}
    for index, lora in adapter.layers.items():
        experts, rank, hidden = lora.gate_a.shape
        inner, columns = lora.gate_b.shape[1], experts * rank
        shapes = (
            *((2 * columns, hidden), (2 * inner, 2 * columns)),
            *((columns, inner), (hidden, columns)),
        )
        for key, shape in zip(_KEYS, shapes, strict=True):
            name = f"{PREFIX}model.layers.{index}.{FUSED_FOLDER}.{key}"
            specs[name] = Spec(lora.gate_a.dtype, shape)
            source[name] = lora, key

    def pieces(name: str) -> list[Array]:
        lora, key = source[name]
        if key == _KEYS[0]:
            return [np.concatenate([lora.gate_a, lora.up_a], axis=1)]
        if key == _KEYS[1]:
            experts, inner, rank = lora.gate_b.shape
            fused = np.zeros((2 * inner, 2 * rank, experts), lora.gate_b.dtype)
            fused[:inner, :rank] = lora.gate_b.transpose(1, 2, 0)
            fused[inner:, rank:] = lora.up_b.transpose(1, 2, 0)
            return [fused]
        if key == _KEYS[2]:
            return [lora.down_a]
        return [lora.down_b.transpose(1, 2, 0)]

    return specs, pieces


def _strengths(layer: int, config: PeftConfig) -> tuple[Strength, Strength]:
    """Of a layer's gate_up_proj and down_proj, with one scaling."""
    gate_up, down = (
        config.strength(f"model.layers.{layer}.{FUSED_FOLDER}.{parameter}")
        for parameter in FUSED_PARAMETERS
    )
    if not math.isclose(gate_up.scaling, down.scaling, rel_tol=1e-9):
        raise AdapterError(
            f"{config.path}: projections of a layer with different scalings are not "
            f"supported; layer {layer} has {gate_up.scaling:g} and {down.scaling:g}"
        )
    return gate_up, down


def _layer(
    file: SafetensorsFile,
    index: int,
    names: dict[str, str],
    gate_up_rank: int,
    down_rank: int,
) -> _Layer:
    where = f"{file.path}: layer {index}"
    for key in _KEYS:
        if key not in names:
            raise AdapterError(
                f"{where}: {PREFIX}model.layers.{index}.{FUSED_FOLDER}.{key} is "
                "missing; both gate_up_proj and down_proj need LoRA"
            )
    a1, b1, a2, b2 = (_tensor(file, names[key]) for key in _KEYS)
    experts = a1.shape[0] // gate_up_rank
    rows = (experts * gate_up_rank,) * 2 + (experts * down_rank,) * 2
    if (a1.shape[0], b1.shape[1], a2.shape[0], b2.shape[1]) != rows or not experts:
        raise AdapterError(
            f"{where}: the ranks {gate_up_rank} of gate_up_proj and {down_rank} of "
            "down_proj, times one number of experts, must be the rows of A and the "
            f"columns of B, got A {list(a1.shape)} and {list(a2.shape)}, "
            f"B {list(b1.shape)} and {list(b2.shape)}"
        )
    # A's columns and B's rows tell the two layouts apart: I = 2I or H = 2I and H = I
    # would have to hold for both to fit.
    (x1, y1), (x2, y2) = (a1.shape[1], b1.shape[0]), (a2.shape[1], b2.shape[0])
    ranks = (gate_up_rank, down_rank)
    first = [
        array.reshape(experts, rank, array.shape[1])
        for rank, array in zip(ranks, (a1, a2), strict=True)
    ]
    second = [
        array.reshape(array.shape[0], rank, experts)
        for rank, array in zip(ranks, (b1, b2), strict=True)
    ]
    if y1 == 2 * x2 and x1 == y2:
        a, b = first, [array.transpose(2, 0, 1) for array in second]
    elif x1 == 2 * y2 and y1 == x2:
        a = [array.transpose(2, 1, 0) for array in second]
        b = [array.transpose(0, 2, 1) for array in first]
    else:
        raise AdapterError(
            f"{where}: A and B fit no layout of PEFT's: gate_up_proj has "
            f"A {list(a1.shape)} and B {list(b1.shape)}, down_proj "
            f"A {list(a2.shape)} and B {list(b2.shape)}"
        )
    return _Layer(a[0], b[0], a[1], b[1])


def _tensor(file: SafetensorsFile, name: str) -> Array:
    tensor = file[name]
    if tensor.ndim != 2:
        raise AdapterError(
            f"{file.path}: {name} must be a matrix, got {list(tensor.shape)}"
        )
    return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor


def _is_block_diagonal(layer: _Layer) -> bool:
    inner, rank = layer.gate_up_b.shape[1] // 2, layer.gate_up_b.shape[2] // 2
    b = layer.gate_up_b
    return not (b[:, :inner, rank:].any() or b[:, inner:, :rank].any())


def _separate(layer: _Layer) -> LoRA:
    inner, rank = layer.gate_up_b.shape[1] // 2, layer.gate_up_b.shape[2] // 2
    arrays = (
        layer.gate_up_a[:, :rank],
        layer.gate_up_b[:, :inner, :rank],
        layer.gate_up_a[:, rank:],
        layer.gate_up_b[:, inner:, rank:],
        layer.down_a,
        layer.down_b,
    )
    return LoRA(*map(np.ascontiguousarray, arrays))


def _shared(layer: _Layer, rank: int) -> LoRA:
    inner = layer.gate_up_b.shape[1] // 2
    a, b = _pad(layer.gate_up_a, 1, rank), _pad(layer.gate_up_b, 2, rank)
    arrays = (
        *(a, b[:, :inner], a, b[:, inner:]),
        _pad(layer.down_a, 1, rank),
        _pad(layer.down_b, 2, rank),
    )
    return LoRA(*map(np.ascontiguousarray, arrays))


def _pad(array: Array, axis: int, size: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths)
