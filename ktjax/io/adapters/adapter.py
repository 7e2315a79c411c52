"""An adapter of a model's routed experts, in memory, whatever file it came from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ktjax.io.header import CheckpointError
from ktjax.lora import LoRA

Array = np.ndarray[Any, Any]


class AdapterError(CheckpointError):
    """An adapter that cannot be read or written; names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA of the routed experts of some layers of a model.

    Attributes:
      rank: rank of every projection's adapter, 1 to 256.
      alpha: its output is scaled by alpha / rank.
      layers: layer index -> the six NumPy arrays, all of one dtype, float32 or
        bfloat16.
      base_model: where the base model is, a directory or a name, or None.

    Raises:
      AdapterError: no layers, an alpha that is not positive, a wrong shape or dtype, or
        a value that is not finite; names the layer and the array.
    """

    rank: int
    alpha: float
    layers: Mapping[int, LoRA]
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise AdapterError(f"alpha must be positive, got {self.alpha}")
        if not self.layers:
            raise AdapterError("it has no layers")
        dtypes = set()
        for index, lora in self.layers.items():
            try:
                lora.validate(None, lora.gate_a.shape[-1], None)
            except (TypeError, ValueError) as error:
                raise AdapterError(f"layer {index}: {error}") from None
            if lora.gate_a.shape[1] != self.rank:
                raise AdapterError(
                    f"layer {index} has rank {lora.gate_a.shape[1]}, "
                    f"expected {self.rank}"
                )
            for name, array in zip(lora.NAMES, lora.arrays(), strict=True):
                dtypes.add(array.dtype)
                if not np.isfinite(array).all():
                    raise AdapterError(
                        f"{name} of layer {index} has a NaN or an infinity"
                    )
        if len(dtypes) > 1:
            raise AdapterError(
                f"its arrays have dtypes {', '.join(sorted(map(str, dtypes)))}"
                ", expected one"
            )

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank of the adapter's output."""
        return self.alpha / self.rank

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of every array."""
        return next(iter(self.layers.values())).gate_a.dtype

    def differences(self, other: Adapter) -> Iterator[str]:
        """What differs from `other`, bit by bit; nothing when they are the same."""
        for name in ("rank", "alpha"):
            if getattr(self, name) != getattr(other, name):
                yield f"{name} {getattr(self, name)} and {getattr(other, name)}"
        if self.layers.keys() != other.layers.keys():
            yield f"layers {sorted(self.layers)} and {sorted(other.layers)}"
            return
        for index, lora in self.layers.items():
            pairs = zip(lora.arrays(), other.layers[index].arrays(), strict=True)
            for name, (mine, theirs) in zip(lora.NAMES, pairs, strict=True):
                if not _same_bits(mine, theirs):
                    yield f"{name} of layer {index}"


def _same_bits(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.array_equal(a.view(bits), b.view(bits)))


def ranges(layers: Iterable[int]) -> str:
    """Layer indices for people: 0, 1, 2, 5 are "0-2, 5"."""
    runs: list[tuple[int, int]] = []
    for index in sorted(layers):
        if runs and runs[-1][1] == index - 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
