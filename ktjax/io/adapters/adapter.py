"""An adapter of a model, in memory, whatever file it came from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ktjax.config import LoRAConfig
from ktjax.io.adapters.names import kind_of
from ktjax.io.header import CheckpointError
from ktjax.lora import LinearLoRA, LoRA

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


# What an adapter adapts: the experts of the layer with this index, or the projection
# with this name in the model's checkpoint, like model.layers.0.self_attn.q_proj.
Place = int | str


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA of the routed experts of some layers of a model, and of other projections.

    Attributes:
      rank: rank of every adapter, 1 to 256.
      alpha: its output is scaled by alpha / rank.
      layers: layer index -> the six NumPy arrays, all of one dtype, float32 or
        bfloat16.
      base_model: where the base model is, a directory or a name, or None.
      strengths: layer index or projection -> rank and alpha, for those that have
        others.
      projections: name in the model's checkpoint -> the two arrays, in the same dtype.

    Raises:
      AdapterError: nothing is adapted, an alpha that is not positive, a wrong shape or
        dtype, or a value that is not finite; names the place and the array.
    """

    rank: int
    alpha: float
    layers: Mapping[int, LoRA]
    base_model: str | None = None
    strengths: Mapping[Place, Strength] = dataclasses.field(default_factory=dict)
    projections: Mapping[str, LinearLoRA] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *(s.alpha for s in self.strengths.values())):
            if not 0 < alpha < math.inf:
                raise AdapterError(f"alpha must be positive, got {alpha}")
        if not self.layers and not self.projections:
            raise AdapterError("it adapts nothing")
        dtypes = set()
        for place, lora in self.items():
            try:
                if isinstance(lora, LoRA):
                    lora.validate(None, lora.gate_a.shape[-1], None)
                    rank = lora.gate_a.shape[1]
                else:
                    lora.validate(lora.b.shape[0], lora.a.shape[-1])
                    rank = lora.rank
            except (TypeError, ValueError) as error:
                raise AdapterError(f"{said(place)}: {error}") from None
            expected = self.strength(place).rank
            if rank != expected:
                raise AdapterError(
                    f"{said(place)} has rank {rank}, expected {expected}"
                )
            for name, array in zip(lora.NAMES, lora.arrays(), strict=True):
                dtypes.add(array.dtype)
                if not np.isfinite(array).all():
                    raise AdapterError(
                        f"{name} of {said(place)} has a NaN or an infinity"
                    )
        if len(dtypes) > 1:
            raise AdapterError(
                f"its arrays have dtypes {', '.join(sorted(map(str, dtypes)))}"
                ", expected one"
            )

    @classmethod
    def of(
        cls,
        strengths: Mapping[Any, Strength],
        layers: Mapping[int, LoRA],
        base_model: str | None = None,
        projections: Mapping[str, LinearLoRA] | None = None,
    ) -> Adapter:
        """An adapter from the strength of everything that it adapts.

        The most common one, of the experts if there are any, is its own.

        Raises:
          AdapterError: as the constructor.
        """
        counted = layers or projections or {}
        usual = Counter(strengths[place] for place in counted).most_common(1)
        if not usual:
            raise AdapterError("it adapts nothing")
        own, _ = usual[0]
        others = {place: s for place, s in strengths.items() if s != own}
        projections = projections or {}
        return cls(own.rank, own.alpha, layers, base_model, others, projections)

    def items(self) -> Iterator[tuple[Place, LoRA | LinearLoRA]]:
        """What is adapted, and its arrays; the experts first."""
        yield from self.layers.items()
        yield from self.projections.items()

    def strength(self, place: Place) -> Strength:
        """Rank and alpha of a layer's experts or of a projection."""
        return self.strengths.get(place, Strength(self.rank, self.alpha))

    def lora_config(self) -> LoRAConfig:
        """What a model is loaded with to take this adapter."""
        alike: dict[Strength, list[Place]] = {}
        for place, strength in self.strengths.items():
            alike.setdefault(strength, []).append(place)
        own = {_pattern(places): strength for strength, places in alike.items()}
        return LoRAConfig(
            self.rank,
            self.alpha,
            rank_pattern={key: s.rank for key, s in own.items()},
            alpha_pattern={key: s.alpha for key, s in own.items()},
            targets=(_pattern(place for place, _ in self.items()),),
        )

    def summary(self) -> str:
        """What is adapted, for people."""
        parts = [f"experts of layers {ranges(self.layers)}"] if self.layers else []
        kinds = Counter(map(kind_of, self.projections))
        parts += [f"{kind} ({count})" for kind, count in kinds.items()]
        return ", ".join(parts)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, but for what is in `strengths`."""
        return self.alpha / self.rank

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of every array."""
        _, lora = next(self.items())
        return lora.arrays()[0].dtype

    def differences(self, other: Adapter) -> Iterator[str]:
        """What differs from `other`, bit by bit; nothing when they are the same."""
        if self.layers.keys() != other.layers.keys():
            yield f"layers {sorted(self.layers)} and {sorted(other.layers)}"
            return
        if self.projections.keys() != other.projections.keys():
            yield (
                f"projections {sorted(self.projections)} and "
                f"{sorted(other.projections)}"
            )
            return
        theirs = dict(other.items())
        for place, lora in self.items():
            ours, its = self.strength(place), other.strength(place)
            for name in ("rank", "alpha"):
                if getattr(ours, name) != getattr(its, name):
                    yield (
                        f"{name} {getattr(ours, name)} and {getattr(its, name)} of "
                        f"{said(place)}"
                    )
            pairs = zip(lora.arrays(), theirs[place].arrays(), strict=True)
            for name, (mine, yours) in zip(lora.NAMES, pairs, strict=True):
                if not _same_bits(mine, yours):
                    yield f"{name} of {said(place)}"


def said(place: Place) -> str:
    """A place for people: "layer 3" for its experts, or a projection's name."""
    return f"layer {place}" if isinstance(place, int) else place


def _pattern(places: Iterable[Place]) -> str:
    """A regular expression for the names of just these modules."""
    places = list(places)
    parts = [re.escape(place) for place in places if isinstance(place, str)]
    layers = [str(place) for place in places if isinstance(place, int)]
    if layers:
        parts.append(rf"layers\.({'|'.join(layers)})\.mlp\.experts")
    return "|".join(parts)


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
