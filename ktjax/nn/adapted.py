"""LoRA of one projection, as parameters; and a projection of XLA's that has it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ktjax.lora import LinearLoRA, LoRA, check_rank

Array = Any


class LinearAdapters(nnx.Module):
    """The adapters of a projection, or none.

    Attributes:
      lora_a: `[rank, in]`, an `nnx.LoRAParam`; there with a rank only.
      lora_b: `[out, rank]`, likewise.
      lora_rank: their rank, or None.
      scaling: lora_alpha / lora_rank.
    """

    lora_rank: int | None = None
    scaling: float = 1.0

    def init_lora(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        alpha: float | None = None,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        """Give the projection adapters: A Kaiming-uniform (a=√5), B zero.

        Args:
          out_features: the projection's.
          in_features: the projection's.
          rank: 1 to 256.
          alpha: adapters are scaled by alpha / rank; None = rank.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's values.

        Raises:
          ValueError: no rngs, or a rank out of its range.
        """
        check_rank(rank)
        if rngs is None:
            raise ValueError(
                f"{type(self).__name__}: lora_rank needs rngs to draw A from"
            )
        shapes = LinearLoRA.shapes(out_features, in_features, rank)
        for name, shape in shapes.items():
            value = LoRA.draw(name, shape, rngs.params, param_dtype)
            setattr(self, f"lora_{name}", nnx.LoRAParam(value))
        self.lora_rank = rank
        self.scaling = (rank if alpha is None else alpha) / rank

    @property
    def lora(self) -> LinearLoRA | None:
        """The adapters, or None."""
        if self.lora_rank is None:
            return None
        return LinearLoRA(
            *(getattr(self, f"lora_{name}")[...] for name in LinearLoRA.NAMES)
        )


class AdaptedLinear(LinearAdapters):
    """`base(x) + s (x Aᵀ) Bᵀ` for a projection that is XLA's; base is frozen.

    The adapters' part is computed and added in float32 and the sum rounded once, in any
    dtype of x.

    Attributes:
      base: the projection, an `nnx.Linear`.
    """

    def __init__(
        self,
        base: nnx.Linear,
        *,
        lora_rank: int,
        lora_alpha: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Wrap `base`.

        Args:
          base: the projection.
          lora_rank: 1 to 256.
          lora_alpha: adapters are scaled by lora_alpha / lora_rank; None = lora_rank.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's initial values.

        Raises:
          ValueError: a rank out of its range.
        """
        self.base = base
        self.init_lora(
            base.out_features,
            base.in_features,
            lora_rank,
            lora_alpha,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def kernel(self) -> nnx.Param:
        """The base weights `[in, out]`."""
        return self.base.kernel

    def __call__(self, x: Array) -> Array:
        """x `[..., in]`, float32 or bfloat16 -> `[..., out]` in the dtype of x."""
        y, lora = self.base(x), self.lora
        assert lora is not None
        inner = x.astype(jnp.float32) @ lora.a.T
        return (y + self.scaling * (inner @ lora.b.T)).astype(y.dtype)
