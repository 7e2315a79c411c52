"""A projection as a Flax module: frozen weights in a store, LoRA as parameters."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ktjax.lora import LinearLoRA, LoRA, check_rank
from ktjax.nn.stored import Stored
from ktjax.ops.linear import linear
from ktjax.store_linear import LinearStore

Array = Any


class FrozenLinear(Stored):
    """`x Wᵀ + s (x Aᵀ) Bᵀ + bias` on the CPU's kernels; W is frozen, in a store.

    The adapters, if there are any, are the `nnx.LoRAParam`s `lora_a` and `lora_b`.

    Attributes:
      handle: the store's handle, a `StoreHandle`.
      bias: `[out]`, or None.
      lora_rank: rank of the adapters, or None.
      scaling: lora_alpha / lora_rank.
    """

    def __init__(
        self,
        store: LinearStore,
        bias: nnx.Param | None = None,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Wrap `store`.

        Args:
          store: the weights.
          bias: `[out]`, added in the dtype of x; None for none.
          lora_rank: 1 to 256, or None for no adapters.
          lora_alpha: adapters are scaled by lora_alpha / lora_rank; None = lora_rank.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's initial values; needed with a rank.

        Raises:
          ValueError: a rank without rngs or out of its range.
        """
        self._hold(store)
        self.bias = nnx.data(bias)
        self.lora_rank = lora_rank
        self.scaling = 1.0
        if lora_rank is None:
            return
        check_rank(lora_rank)
        if rngs is None:
            raise ValueError("FrozenLinear: lora_rank needs rngs to draw A from")
        shapes = LinearLoRA.shapes(store.out_features, store.in_features, lora_rank)
        for name, shape in shapes.items():
            value = LoRA.draw(name, shape, rngs.params, param_dtype)
            setattr(self, f"lora_{name}", nnx.LoRAParam(value))
        self.scaling = (lora_rank if lora_alpha is None else lora_alpha) / lora_rank

    @property
    def lora(self) -> LinearLoRA | None:
        """The adapters, or None."""
        if self.lora_rank is None:
            return None
        return LinearLoRA(
            *(getattr(self, f"lora_{name}")[...] for name in LinearLoRA.NAMES)
        )

    def __call__(self, x: Array) -> Array:
        """x `[..., in]`, float32 or bfloat16 -> `[..., out]` in the dtype of x."""
        y = linear(x, self.store, self.lora, scaling=self.scaling)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
