"""The routed experts of one layer, from whichever layout a checkpoint has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from ktjax.io.adapters.names import stored_target_of
from ktjax.io.converted import has_converted, read_converted
from ktjax.io.safetensors import Checkpoint
from ktjax.io.stored import has_matrix, read_matrix, stored_encoding
from ktjax.quant import Encoding, Quantized, decode

Array = np.ndarray[Any, Any]

# Where per-expert tensors are, and what gate, up and down are called there.
_PER_EXPERT = (
    ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ("block_sparse_moe.experts", ("w1", "w3", "w2")),
)
_FUSED = "mlp.experts"


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts of a layer as a checkpoint stores them.

    Attributes:
      encoding: the storage format; "bf16" for weights that are not quantised.
      gate: `[slots, intermediate, hidden]` in the checkpoint's dtype, or quantised.
      up: likewise.
      down: `[slots, hidden, intermediate]`, likewise.
      up_encoding: that of up, where it is another: GGUF files mix formats.
      down_encoding: that of down, likewise.
    """

    encoding: Encoding
    gate: Array | Quantized
    up: Array | Quantized
    down: Array | Quantized
    _: dataclasses.KW_ONLY
    up_encoding: Encoding | None = None
    down_encoding: Encoding | None = None

    @property
    def encodings(self) -> tuple[Encoding, Encoding, Encoding]:
        """The formats of gate, up and down."""
        others = self.up_encoding, self.down_encoding
        up, down = (other or self.encoding for other in others)
        return self.encoding, up, down

    def arrays(self) -> tuple[Array | Quantized, ...]:
        """gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def shape(self) -> tuple[int, int, int]:
        """(slots, intermediate, hidden), by the outputs of gate and of down."""
        gate, _, down = (
            a.values if isinstance(a, Quantized) else a for a in self.arrays()
        )
        return (*gate.shape[:2], down.shape[1])

    def take(self, order: Sequence[int]) -> ExpertWeights:
        """Copies of the experts `order`, in that order."""
        slots = list(order)
        gate, up, down = (_take(matrix, slots) for matrix in self.arrays())
        return dataclasses.replace(self, gate=gate, up=up, down=down)

    def dequantize(self) -> tuple[Array, Array, Array]:
        """gate, up and down as arrays: as they are, or in bfloat16, which is exact."""
        _, intermediate, hidden = self.shape
        gate, up, down = self.encodings
        return (
            _dequantize(self.gate, gate, hidden),
            _dequantize(self.up, up, hidden),
            _dequantize(self.down, down, intermediate),
        )


def _take(matrix: Array | Quantized, slots: list[int]) -> Array | Quantized:
    if not isinstance(matrix, Quantized):
        return matrix[slots]
    return Quantized(*(None if a is None else a[slots] for a in matrix))


def _dequantize(matrix: Array | Quantized, encoding: Encoding, depth: int) -> Array:
    """One expert at a time, so that no whole matrix is ever in float32."""
    if not isinstance(matrix, Quantized):
        return matrix
    shape = (*matrix.values.shape[:2], depth)
    result = np.empty(shape, ml_dtypes.bfloat16)
    for expert in range(shape[0]):
        one = Quantized(*(None if a is None else a[expert] for a in matrix))
        result[expert] = decode(one, encoding.format, depth=depth)
    return result


def read_experts(
    checkpoint: Checkpoint,
    layer_idx: int,
    num_experts: int,
    *,
    physical_to_logical_map: Sequence[int] | Array | None = None,
    prefix: str = "model.layers",
) -> ExpertWeights:
    """Stack the experts of layer `layer_idx`, in the format that they are stored in.

    Accepts, under `{prefix}.{layer_idx}.`, per-expert
    `mlp.experts.E.{gate,up,down}_proj` (Qwen, OLMoE, DeepSeek, GLM, Kimi-K2) and
    `block_sparse_moe.experts.E.{w1,w3,w2}` (Mixtral), whose tensors may be quantised as
    `ktjax.io.stored` lists; the fused `mlp.experts.gate_up_proj [E, 2I, H]` and
    `mlp.experts.down_proj [E, H, I]` in float32, bfloat16 or float16; or converted
    experts (`ktjax.io.converted`). float16 becomes float32.

    Args:
      checkpoint: where to read.
      layer_idx: the layer.
      num_experts: how many experts the layer has.
      physical_to_logical_map: slot p of the result holds expert map[p]; `[slots]`
        integers; None = every expert in its own place.
      prefix: what comes before the layer's index.

    Returns:
      The weights. Per-expert layouts are copied into new arrays; fused and converted
      experts without a map stay views of the file.

    Raises:
      KeyError: the layer has no experts in a known layout, or one tensor is missing.
      ValueError: shapes or dtypes that do not fit together, or a bad map.
    """
    at = f"{prefix}.{layer_idx}"
    order = check_map(physical_to_logical_map, num_experts)
    if has_converted(checkpoint, layer_idx):
        encoding, matrices = read_converted(checkpoint, layer_idx, num_experts)
        converted = ExpertWeights(encoding, *matrices)
        return converted if physical_to_logical_map is None else converted.take(order)
    for folder, names in _PER_EXPERT:
        first = f"{at}.{folder}.0"
        if has_matrix(checkpoint, f"{first}.{names[0]}"):
            encoding = stored_encoding(checkpoint, [f"{first}.{n}" for n in names])
            gate, up, down = (
                _stack(checkpoint, f"{at}.{folder}", name, order, encoding)
                for name in names
            )
            break
    else:
        if f"{at}.{_FUSED}.gate_up_proj" not in checkpoint:
            raise KeyError(
                f"{checkpoint.path}: layer {layer_idx} has no routed experts: expected "
                f"{at}.mlp.experts.0.gate_proj.weight (or .weight_packed, "
                f".qweight), {at}.block_sparse_moe.experts.0.w1.weight "
                f"or {at}.{_FUSED}.gate_up_proj"
            )
        encoding = Encoding.of("bf16")
        gate, up, down = _fused(checkpoint, f"{at}.{_FUSED}", num_experts)
        if physical_to_logical_map is not None:
            gate, up, down = gate[order], up[order], down[order]
    weights = ExpertWeights(encoding, gate, up, down)
    if encoding.format == "bf16":
        _check_shapes(f"{checkpoint.path}: experts of {at}", *weights.dequantize())
    return weights


def experts_of(checkpoint: Checkpoint) -> dict[int, int]:
    """How many routed experts each layer has that has any, by the tensors' names."""
    counts: dict[int, int] = {}
    for name in checkpoint:
        target = stored_target_of(name)
        if target is None:
            continue
        if target.expert is None:
            count = (checkpoint.file_of(name).entries[name].shape or (0,))[0]
        else:
            count = target.expert + 1
        counts[target.layer] = max(count, counts.get(target.layer, 0))
    return dict(sorted(counts.items()))


def load_experts(
    checkpoint: Checkpoint,
    layer_idx: int,
    num_experts: int,
    *,
    physical_to_logical_map: Sequence[int] | Array | None = None,
    prefix: str = "model.layers",
) -> tuple[Array, Array, Array]:
    """What `read_experts` reads, as arrays: gate, up and down. It has its errors.

    In the checkpoint's dtype, float32 for float16; where it is quantised, the values
    in bfloat16, which holds them exactly.
    """
    return read_experts(
        checkpoint,
        layer_idx,
        num_experts,
        physical_to_logical_map=physical_to_logical_map,
        prefix=prefix,
    ).dequantize()


def check_map(mapping: Sequence[int] | Array | None, num_experts: int) -> list[int]:
    """`physical_to_logical_map` as a list; None = every expert in its own place.

    Raises:
      ValueError: no integers, or an index outside 0..num_experts - 1.
    """
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


def _stack(
    checkpoint: Checkpoint, at: str, name: str, order: list[int], encoding: Encoding
) -> Array | Quantized:
    """Copy expert by expert, so that no more than one stacked copy is ever alive."""
    first = list(read_matrix(checkpoint, f"{at}.{order[0]}.{name}", encoding).values())
    plain = encoding.format == "bf16"
    dtypes = [_computed(part.dtype) if plain else part.dtype for part in first]
    stacked = [
        np.empty((len(order), *part.shape), dtype)
        for part, dtype in zip(first, dtypes, strict=True)
    ]
    for slot, expert in enumerate(order):
        parts = read_matrix(checkpoint, f"{at}.{expert}.{name}", encoding)
        for (key, part), like, array in zip(parts.items(), first, stacked, strict=True):
            if part.shape != like.shape or part.dtype != like.dtype:
                raise ValueError(
                    f"{checkpoint.path}: {key} is {part.dtype}{list(part.shape)}, "
                    f"expert {order[0]} has {like.dtype}{list(like.shape)}"
                )
            array[slot] = part
    checkpoint.release_pages()
    return stacked[0] if plain else Quantized(*stacked)


def _computed(dtype: Any) -> Any:
    """The dtype that holds values of `dtype` exactly and is computed in."""
    return np.dtype(np.float32) if dtype == np.float16 else dtype


def _fused(
    checkpoint: Checkpoint, at: str, num_experts: int
) -> tuple[Array, Array, Array]:
    gate_up, down = (
        array.astype(_computed(array.dtype), copy=False)
        for array in (checkpoint[f"{at}.gate_up_proj"], checkpoint[f"{at}.down_proj"])
    )
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
