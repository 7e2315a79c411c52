"""Low-rank adapters: six arrays of a layer of experts, two of a projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ktjax.config import MAX_LORA_RANK

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

    def validate(
        self, experts: int | None, hidden: int, intermediate: int | None
    ) -> None:
        """Checks shapes, dtypes and rank against a layer's sizes.

        Sizes that are None are taken from `gate_b`.

        Raises:
          ValueError: a wrong shape, or a rank outside 1..256.
          TypeError: a dtype other than float32 and bfloat16.
        """
        for name in ("gate_a", "gate_b"):
            if jnp.ndim(getattr(self, name)) != 3:
                raise ValueError(
                    f"lora.{name}: expected 3 dimensions, got shape "
                    f"{jnp.shape(getattr(self, name))}"
                )
        rank = self.gate_a.shape[1]
        check_rank(rank)
        experts = experts if experts is not None else self.gate_b.shape[0]
        intermediate = (
            intermediate if intermediate is not None else self.gate_b.shape[1]
        )
        for name, shape in LoRA.shapes(experts, hidden, intermediate, rank).items():
            array = getattr(self, name)
            _check_array(name, array, shape, ("gate_a", self.gate_a))

    @staticmethod
    def draw(
        name: str,
        shape: tuple[int, ...],
        next_key: Callable[[], Array],
        dtype: Any = jnp.float32,
    ) -> Array:
        """The start of a training, as torch and PEFT draw it.

        Args:
          name: which array, one that ends in "a" or "b".
          shape: its shape.
          next_key: gives a PRNG key (`nnx.Rngs.params`); called for A only.
          dtype: its dtype.

        Returns:
          A: uniform in ±1/√in, Kaiming's bound for a = √5; B: zero.
        """
        if name.endswith("b"):
            return jnp.zeros(shape, dtype)
        bound = shape[-1] ** -0.5
        return jax.random.uniform(next_key(), shape, dtype, minval=-bound, maxval=bound)

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearLoRA:
    """A low-rank adapter of one projection: `x Wᵀ + s (x Aᵀ) Bᵀ`.

    Both arrays share one dtype, float32 or bfloat16, and a rank, 1 to 256. A pytree.

    Attributes:
      a: `[rank, in]`.
      b: `[out, rank]`.
    """

    a: Array
    b: Array

    NAMES = ("a", "b")

    def arrays(self) -> tuple[Array, ...]:
        """The two arrays in the order of `NAMES`."""
        return self.a, self.b

    @property
    def rank(self) -> int:
        """The rank."""
        return self.a.shape[0]

    def validate(self, out_features: int, in_features: int) -> None:
        """Checks shapes, dtypes and rank against a projection's sizes.

        Raises:
          ValueError: a wrong shape, or a rank outside 1..256.
          TypeError: a dtype other than float32 and bfloat16.
        """
        if jnp.ndim(self.a) != 2:
            raise ValueError(
                f"lora.a: expected 2 dimensions, got shape {jnp.shape(self.a)}"
            )
        check_rank(self.rank)
        shapes = LinearLoRA.shapes(out_features, in_features, self.rank)
        for name, shape in shapes.items():
            _check_array(name, getattr(self, name), shape, ("a", self.a))

    @staticmethod
    def shapes(
        out_features: int, in_features: int, rank: int
    ) -> dict[str, tuple[int, int]]:
        """The shape of each array, by name."""
        return {"a": (rank, in_features), "b": (out_features, rank)}


def check_rank(rank: int) -> None:
    """Raises ValueError for a rank outside 1..256."""
    if not 1 <= rank <= MAX_LORA_RANK:
        raise ValueError(f"lora: expected a rank of 1 to {MAX_LORA_RANK}, got {rank}")


def _check_array(
    name: str, array: Array, shape: tuple[int, ...], first: tuple[str, Array]
) -> None:
    """One array of an adapter; `first` is that whose dtype the others share."""
    if jnp.shape(array) != shape:
        raise ValueError(f"lora.{name}: expected {shape}, got {jnp.shape(array)}")
    if array.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"lora.{name}: expected float32 or bfloat16, got {array.dtype}")
    first_name, reference = first
    if array.dtype != reference.dtype:
        raise TypeError(
            f"lora.{name}: expected {reference.dtype} like {first_name}, got "
            f"{array.dtype}"
        )
