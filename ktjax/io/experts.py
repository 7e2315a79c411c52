"""The routed experts of one layer, from whichever layout a checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ktjax.io.safetensors import Checkpoint

Array = np.ndarray[Any, Any]

# Where per-expert tensors are, and what gate, up and down are called there.
_PER_EXPERT = (
    ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ("block_sparse_moe.experts", ("w1", "w3", "w2")),
)
_FUSED = "mlp.experts"


def load_experts(
    checkpoint: Checkpoint,
    layer_idx: int,
    num_experts: int,
    *,
    physical_to_logical_map: Sequence[int] | Array | None = None,
    prefix: str = "model.layers",
) -> tuple[Array, Array, Array]:
    """Stack the experts of layer `layer_idx`.

    Accepts, under `{prefix}.{layer_idx}.`, per-expert
    `mlp.experts.E.{gate,up,down}_proj.weight` (Qwen, OLMoE, DeepSeek, GLM),
    `block_sparse_moe.experts.E.{w1,w3,w2}.weight` (Mixtral), or the fused
    `mlp.experts.gate_up_proj [E, 2I, H]` and `mlp.experts.down_proj [E, H, I]`.

    Args:
      checkpoint: where to read.
      layer_idx: the layer.
      num_experts: how many experts the layer has.
      physical_to_logical_map: slot p of the result holds expert map[p]; `[slots]`
        integers; None = every expert in its own place.
      prefix: what comes before the layer's index.

    Returns:
      gate `[slots, intermediate, hidden]`, up likewise, down
      `[slots, hidden, intermediate]`, in the checkpoint's dtype. Per-expert layouts are
      copied into new arrays; a fused layout without a map stays a view of the file.

    Raises:
      KeyError: the layer has no experts in a known layout, or one tensor is missing.
      ValueError: shapes or dtypes that do not fit together, or a bad map.
    """
    at = f"{prefix}.{layer_idx}"
    order = _check_map(physical_to_logical_map, num_experts)
    for folder, names in _PER_EXPERT:
        if f"{at}.{folder}.0.{names[0]}.weight" in checkpoint:
            gate, up, down = (
                _stack(checkpoint, f"{at}.{folder}", name, order) for name in names
            )
            break
    else:
        if f"{at}.{_FUSED}.gate_up_proj" not in checkpoint:
            raise KeyError(
                f"{checkpoint.path}: layer {layer_idx} has no routed experts: expected "
                f"{at}.mlp.experts.0.gate_proj.weight, "
                f"{at}.block_sparse_moe.experts.0.w1.weight "
                f"or {at}.{_FUSED}.gate_up_proj"
            )
        gate, up, down = _fused(checkpoint, f"{at}.{_FUSED}", num_experts)
        if physical_to_logical_map is not None:
            gate, up, down = gate[order], up[order], down[order]
    _check_shapes(f"{checkpoint.path}: experts of {at}", gate, up, down)
    return gate, up, down


def _check_map(mapping: Sequence[int] | Array | None, num_experts: int) -> list[int]:
    if num_experts <= 0:
        raise ValueError(
            f"load_experts: num_experts must be positive, got {num_experts}"
        )
    if mapping is None:
        return list(range(num_experts))
    order = np.asarray(mapping)
    if order.ndim != 1 or order.dtype.kind not in "iu" or order.size == 0:
        raise ValueError(
            "load_experts: physical_to_logical_map must be a list of integers, got "
            f"dtype {order.dtype} and shape {order.shape}"
        )
    if order.min() < 0 or order.max() >= num_experts:
        raise ValueError(
            "load_experts: physical_to_logical_map must be within "
            f"0..{num_experts - 1}, got {order.min()}..{order.max()}"
        )
    return [int(expert) for expert in order]


def _stack(checkpoint: Checkpoint, at: str, name: str, order: list[int]) -> Array:
    """Copy expert by expert, so that no more than one stacked copy is ever alive."""
    first = checkpoint[f"{at}.{order[0]}.{name}.weight"]
    stacked = np.empty((len(order), *first.shape), first.dtype)
    for slot, expert in enumerate(order):
        key = f"{at}.{expert}.{name}.weight"
        tensor = checkpoint[key]
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"{checkpoint.path}: {key} is {tensor.dtype}{list(tensor.shape)}, "
                f"expert {order[0]} has {first.dtype}{list(first.shape)}"
            )
        stacked[slot] = tensor
    return stacked


def _fused(
    checkpoint: Checkpoint, at: str, num_experts: int
) -> tuple[Array, Array, Array]:
    gate_up, down = checkpoint[f"{at}.gate_up_proj"], checkpoint[f"{at}.down_proj"]
    if gate_up.ndim != 3 or gate_up.shape[0] != num_experts or gate_up.shape[1] % 2:
        raise ValueError(
            f"{checkpoint.path}: {at}.gate_up_proj must be "
            f"[{num_experts}, 2 * intermediate, hidden], got {list(gate_up.shape)}"
        )
    intermediate = gate_up.shape[1] // 2
    return gate_up[:, :intermediate], gate_up[:, intermediate:], down


def _check_shapes(where: str, gate: Array, up: Array, down: Array) -> None:
    if gate.ndim != 3 or min(gate.shape) == 0:
        raise ValueError(
            f"{where}: gate must be [intermediate, hidden] per expert, got "
            f"{list(gate.shape[1:])}"
        )
    experts, intermediate, hidden = gate.shape
    for name, array, expected in (
        ("up", up, (experts, intermediate, hidden)),
        ("down", down, (experts, hidden, intermediate)),
    ):
        if array.shape != expected or array.dtype != gate.dtype:
            raise ValueError(
                f"{where}: {name} must be {gate.dtype}{list(expected)} to fit gate, "
                f"got {array.dtype}{list(array.shape)}"
            )
