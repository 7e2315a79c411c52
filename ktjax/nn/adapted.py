"""LoRA of one projection, as parameters; and a projection of XLA's that has it."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ktjax.lora import LinearLoRA, LoRA, check_rank
from ktjax.nn.dropout import AdapterDropout
from ktjax.ops.dropout import keep

Array = Any


class LinearAdapters(nnx.Module):
    """The adapters of a projection, or none.

    Attributes:
      lora_a: `[rank, in]`, an `nnx.LoRAParam`; there with a rank only.
      lora_b: `[out, rank]`, likewise.
      lora_rank: their rank, or None.
      scaling: lora_alpha / lora_rank.
      dropout: the `AdapterDropout` of their input; draws a seed a call. None without a
        rank.
    """

    lora_rank: int | None = None
    scaling: float = 1.0
    dropout: AdapterDropout | None = None

    def init_lora(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        alpha: float | None = None,
        *,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        """Give the projection adapters: A Kaiming-uniform (a=√5), B zero.

        Args:
          out_features: the projection's.
          in_features: the projection's.
          rank: 1 to 256.
          alpha: adapters are scaled by alpha / rank; None = rank.
          dropout: rate of dropout on the adapters' input, in training.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's values, and, as its stream `dropout`, of seeds.

        Raises:
          ValueError: no rngs, or a rank or a rate out of its range.
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
        self.dropout = AdapterDropout(dropout, rngs=rngs, where=type(self).__name__)
        self.lora_rank = rank
        self.scaling = (rank if alpha is None else alpha) / rank

    def draw_seed(self) -> Array | None:
        """A new seed for `added`, `uint32[2]`; None when nothing is to be dropped."""
        return None if self.dropout is None else self.dropout.seed()

    def added(self, x: Array, seed: Array | None, rows: Array | None = None) -> Array:
        """What the adapters add, `s (D(x) Aᵀ) Bᵀ`, by XLA in float32.

        Args:
          x: `[..., in]`, float32 or bfloat16.
          seed: decides which values D drops, by token and column, with the masks of
            `ktjax.moe`; None: none.
          rows: which token each is, `[...]` int32, where x has a part of those that the
            seed is for; None: 0, 1, ...

        Returns:
          `[..., out]` float32.
        """
        lora, scaling = self.lora, self.scaling
        assert lora is not None
        seen = x.astype(jnp.float32)
        if seed is not None:
            assert self.dropout is not None
            rate = self.dropout.rate
            slots = math.prod(x.shape[:-1]) if rows is None else rows.reshape(-1)
            kept = keep(seed, slots, x.shape[-1], "x", rate).reshape(x.shape)
            seen, scaling = jnp.where(kept, seen, 0), scaling / (1 - rate)
        return scaling * (seen @ lora.a.T @ lora.b.T)

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
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Wrap `base`.

        Args:
          base: the projection.
          lora_rank: 1 to 256.
          lora_alpha: adapters are scaled by lora_alpha / lora_rank; None = lora_rank.
          dropout: rate of dropout on the adapters' input. As of any `nnx.Dropout`,
            `model.eval()` ends it and `model.train()` brings it back.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's initial values, and, as its stream `dropout`, of seeds.

        Raises:
          ValueError: a rank or a rate out of its range.
        """
        self.base = base
        self.init_lora(
            base.out_features,
            base.in_features,
            lora_rank,
            lora_alpha,
            dropout=dropout,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def kernel(self) -> nnx.Param:
        """The base weights `[in, out]`."""
        return self.base.kernel

    def __call__(self, x: Array) -> Array:
        """x `[..., in]`, float32 or bfloat16 -> `[..., out]` in the dtype of x."""
        return self.project(x, self.draw_seed())

    def project(self, x: Array, seed: Array | None, rows: Array | None = None) -> Array:
        """As a call, with a seed of `draw_seed` and rows as `added` takes them."""
        y = self.base(x)
        return (y + self.added(x, seed, rows)).astype(y.dtype)
