"""An adapter of a model's routed experts, in memory, whatever file it came from."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ktjax.config import LoRAConfig
from ktjax.io.header import CheckpointError
from ktjax.lora import LoRA

Array = np.ndarray[Any, Any]


class AdapterError(CheckpointError):
    """An adapter that cannot be read or written; names the file and the fault."""


@dataclasses.dataclass(frozen=True)
class Strength:
    """Rank and alpha of an adapter: its output is scaled by alpha / rank.

    rsLoRA's alpha / √rank is (alpha √rank) / rank.
    """

    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied with."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA of the routed experts of some layers of a model.

    Attributes:
      rank: rank of every projection's adapter, 1 to 256.
      alpha: its output is scaled by alpha / rank.
      layers: layer index -> the six NumPy arrays, all of one dtype, float32 or
        bfloat16.
      base_model: where the base model is, a directory or a name, or None.
      strengths: layer index -> rank and alpha, for layers that have others.

    Raises:
      AdapterError: no layers, an alpha that is not positive, a wrong shape or dtype, or
        a value that is not finite; names the layer and the array.
    """

    rank: int
    alpha: float
    layers: Mapping[int, LoRA]
    base_model: str | None = None
    strengths: Mapping[int, Strength] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *(s.alpha for s in self.strengths.values())):
            if not 0 < alpha < math.inf:
                raise AdapterError(f"alpha must be positive, got {alpha}")
        if not self.layers:
            raise AdapterError("it has no layers")
        dtypes = set()
        for index, lora in self.layers.items():
            try:
                lora.validate(None, lora.gate_a.shape[-1], None)
            except (TypeError, ValueError) as error:
                raise AdapterError(f"layer {index}: {error}") from None
            rank = self.strength(index).rank
            if lora.gate_a.shape[1] != rank:
                raise AdapterError(
                    f"layer {index} has rank {lora.gate_a.shape[1]}, expected {rank}"
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

    @classmethod
    def of(
        cls,
        strengths: Mapping[int, Strength],
        layers: Mapping[int, LoRA],
        base_model: str | None = None,
    ) -> Adapter:
        """An adapter from the strength of each layer; the most common one is its own.

        Raises:
          AdapterError: as the constructor.
        """
        usual = Counter(strengths.values()).most_common(1)
        if not usual:
            raise AdapterError("it has no layers")
        own, _ = usual[0]
        others = {index: s for index, s in strengths.items() if s != own}
        return cls(own.rank, own.alpha, layers, base_model, others)

    def strength(self, layer: int) -> Strength:
        """Rank and alpha of a layer."""
        return self.strengths.get(layer, Strength(self.rank, self.alpha))

    def lora_config(self) -> LoRAConfig:
        """What a model is loaded with to take this adapter; without dropout."""
        own = {rf"layers\.{index}\..*": s for index, s in self.strengths.items()}
        return LoRAConfig(
            self.rank,
            self.alpha,
            rank_pattern={key: s.rank for key, s in own.items()},
            alpha_pattern={key: s.alpha for key, s in own.items()},
        )

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, but for layers in `strengths`."""
        return self.alpha / self.rank

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of every array."""
        return next(iter(self.layers.values())).gate_a.dtype

    def differences(self, other: Adapter) -> Iterator[str]:
        """What differs from `other`, bit by bit; nothing when they are the same."""
        if self.layers.keys() != other.layers.keys():
            yield f"layers {sorted(self.layers)} and {sorted(other.layers)}"
            return
        for index, lora in self.layers.items():
            strength, theirs = self.strength(index), other.strength(index)
            for name in ("rank", "alpha"):
                if getattr(strength, name) != getattr(theirs, name):
                    yield (
                        f"{name} {getattr(strength, name)} and "
                        f"{getattr(theirs, name)} of layer {index}"
                    )
            pairs = zip(lora.arrays(), other.layers[index].arrays(), strict=True)
            for name, (mine, yours) in zip(lora.NAMES, pairs, strict=True):
                if not _same_bits(mine, yours):
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
