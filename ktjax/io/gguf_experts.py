"""The routed experts of one layer of a GGUF file, in the blocks that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ktjax.io.experts import ExpertWeights, check_map
from ktjax.io.gguf import DTYPES, GGUFCheckpoint
from ktjax.io.header import CheckpointError
from ktjax.quant.formats import BLOCK_FORMATS, Encoding, Quantized

Array = np.ndarray[Any, Any]

# Types that are read as numbers, in bfloat16, and those that stay in blocks.
_NUMBERS = ("F32", "F16", "BF16")
FORMATS: dict[str, str] = {
    **dict.fromkeys(_NUMBERS, "bf16"),
    **{name.upper(): name for name in BLOCK_FORMATS},
}


class _Matrix(NamedTuple):
    """One matrix of every expert: views of the file, an expert each."""

    name: str  # of its first tensor, for errors
    type: str
    shape: tuple[int, int]
    experts: Sequence[Array] | Array


def read_gguf_experts(
    checkpoint: GGUFCheckpoint,
    layer_idx: int,
    num_experts: int,
    *,
    physical_to_logical_map: Sequence[int] | Array | None = None,
) -> ExpertWeights:
    """The experts of layer `layer_idx`, in the formats that they are stored in.

    Accepts, under `blk.{layer_idx}.`, `ffn_{gate,up,down}_exps.weight` and
    `ffn_gate_up_exps.weight` (all experts in a tensor), and
    `ffn_{gate,up,down}.E.weight` (a tensor for each). Types may differ between tensors,
    but gate and up must both be in blocks, or neither.

    Args:
      checkpoint: where to read.
      layer_idx: the layer.
      num_experts: how many experts the layer has.
      physical_to_logical_map: slot p of the result holds expert map[p]; `[slots]`
        integers; None = every expert in its own place.

    Returns:
      The weights: blocks as `Quantized`, F32, F16 and BF16 in bfloat16. Blocks and BF16
      of tensors with all experts, without a map, stay views of the file.

    Raises:
      KeyError: the layer has no experts, or a tensor is missing.
      CheckpointError: shapes that do not fit together, types that differ between
        experts, gate in blocks and up not or the other way round, or a type that is not
        read.
      ValueError: a bad map.
    """
    order = check_map(physical_to_logical_map, num_experts)
    gate, up, down = _matrices(checkpoint, f"blk.{layer_idx}", layer_idx, num_experts)
    intermediate, hidden = gate.shape
    for matrix, expected in ((up, gate.shape), (down, (hidden, intermediate))):
        if matrix.shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {matrix.name}: expected experts of "
                f"{list(expected)} to fit {gate.name}, got {list(matrix.shape)}"
            )
    for matrix in (gate, up, down):
        if matrix.type not in FORMATS:
            raise CheckpointError(
                f"{checkpoint.path}: {matrix.name}: experts of type {matrix.type} are "
                f"not read; types that are: {', '.join(FORMATS)}"
            )
    if (gate.type in _NUMBERS) != (up.type in _NUMBERS):
        raise CheckpointError(
            f"{checkpoint.path}: {up.name} is {up.type} and {gate.name} {gate.type}: "
            "gate and up of a layer must both be in blocks, or both numbers, since "
            "they are computed together; quantise the model so"
        )
    whole = physical_to_logical_map is None
    matrices = (gate, up, down)
    arrays = (_stack(matrix, order, whole) for matrix in matrices)
    encoding, up_encoding, down_encoding = (
        Encoding.of(FORMATS[matrix.type]) for matrix in matrices
    )
    return ExpertWeights(
        encoding, *arrays, up_encoding=up_encoding, down_encoding=down_encoding
    )


def _matrices(
    checkpoint: GGUFCheckpoint, at: str, layer_idx: int, num_experts: int
) -> tuple[_Matrix, _Matrix, _Matrix]:
    """gate, up and down, from whichever layout the file has."""
    if f"{at}.ffn_gate_up_exps.weight" in checkpoint:
        both = _merged(checkpoint, f"{at}.ffn_gate_up_exps.weight", num_experts)
        outputs, depth = both.shape
        if outputs % 2:
            raise CheckpointError(
                f"{checkpoint.path}: {both.name}: expected gate's and up's outputs, an "
                f"even number, got {outputs}"
            )
        half, stacked = outputs // 2, both.experts
        assert isinstance(stacked, np.ndarray)
        gate = both._replace(shape=(half, depth), experts=stacked[:, :half])
        up = both._replace(shape=(half, depth), experts=stacked[:, half:])
        return gate, up, _merged(checkpoint, f"{at}.ffn_down_exps.weight", num_experts)
    if f"{at}.ffn_gate_exps.weight" in checkpoint:
        names = (f"{at}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
        gate, up, down = (_merged(checkpoint, name, num_experts) for name in names)
        return gate, up, down
    if f"{at}.ffn_gate.0.weight" in checkpoint:
        names = (f"{at}.ffn_{name}" for name in ("gate", "up", "down"))
        gate, up, down = (_split(checkpoint, name, num_experts) for name in names)
        return gate, up, down
    raise KeyError(
        f"{checkpoint.path}: layer {layer_idx} has no routed experts: expected "
        f"{at}.ffn_gate_exps.weight, {at}.ffn_gate_up_exps.weight or "
        f"{at}.ffn_gate.0.weight"
    )


def _merged(checkpoint: GGUFCheckpoint, name: str, num_experts: int) -> _Matrix:
    tensor = checkpoint.descriptor(name)
    if len(tensor.shape) != 3 or tensor.shape[0] != num_experts:
        raise CheckpointError(
            f"{checkpoint.path}: {name}: expected [{num_experts}, outputs, depth], got "
            f"{list(tensor.shape)}"
        )
    _, outputs, depth = tensor.shape
    return _Matrix(name, tensor.type.name, (outputs, depth), checkpoint[name])


def _split(checkpoint: GGUFCheckpoint, at: str, num_experts: int) -> _Matrix:
    names = [f"{at}.{expert}.weight" for expert in range(num_experts)]
    first = checkpoint.descriptor(names[0])
    for name in names:
        tensor = checkpoint.descriptor(name)
        same = tensor.type == first.type and tensor.shape == first.shape
        if len(tensor.shape) != 2 or not same:
            raise CheckpointError(
                f"{checkpoint.path}: {name}: expected {first.type.name} [outputs, "
                f"depth] like {names[0]}, {list(first.shape)}, got {tensor.type.name} "
                f"{list(tensor.shape)}"
            )
    if f"{at}.{num_experts}.weight" in checkpoint:
        raise CheckpointError(
            f"{checkpoint.path}: {at}.{num_experts}.weight: expected {num_experts} "
            "experts, there are more"
        )
    outputs, depth = first.shape
    experts = [checkpoint[name] for name in names]
    return _Matrix(names[0], first.type.name, (outputs, depth), experts)


def _stack(matrix: _Matrix, order: list[int], whole: bool) -> Array | Quantized:
    experts, dtype = matrix.experts, DTYPES.get(matrix.type, np.dtype(np.uint8))
    narrow = dtype if matrix.type not in _NUMBERS else np.dtype(ml_dtypes.bfloat16)
    if whole and isinstance(experts, np.ndarray) and narrow == dtype:
        stacked = experts
    else:
        # Expert by expert: nothing is ever in memory twice, or in a wider dtype.
        stacked = np.empty((len(order), *experts[0].shape), narrow)
        with np.errstate(over="ignore"):
            for slot, expert in enumerate(order):
                stacked[slot] = experts[expert]
    return stacked if matrix.type in _NUMBERS else Quantized(stacked)
