"""The six LoRA arrays of one layer of experts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters of the three projections of every expert (arXiv:2106.09685).

    A projection with base weight `W [out, in]` computes `x Wᵀ + s (x Aᵀ) Bᵀ`. All six
    arrays share one dtype, float32 or bfloat16, and one rank, 1 to 256. The class is a
    pytree, so gradients and optimizer states come in the same form.

    Attributes:
      gate_a: `[experts, rank, hidden]`.
      gate_b: `[experts, intermediate, rank]`.
      up_a: `[experts, rank, hidden]`.
      up_b: `[experts, intermediate, rank]`.
      down_a: `[experts, rank, intermediate]`.
      down_b: `[experts, hidden, rank]`.
    """

    gate_a: Array
    gate_b: Array
    up_a: Array
    up_b: Array
    down_a: Array
    down_b: Array

    NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")

    def arrays(self) -> tuple[Array, ...]:
        """The six arrays in the order of `NAMES`."""
        return tuple(getattr(self, name) for name in self.NAMES)

    @staticmethod
    def shapes(
        experts: int, hidden: int, intermediate: int, rank: int
    ) -> dict[str, tuple[int, int, int]]:
        """The shape of each array of a layer, by name."""
        return {
            "gate_a": (experts, rank, hidden),
            "gate_b": (experts, intermediate, rank),
            "up_a": (experts, rank, hidden),
            "up_b": (experts, intermediate, rank),
            "down_a": (experts, rank, intermediate),
            "down_b": (experts, hidden, rank),
        }
