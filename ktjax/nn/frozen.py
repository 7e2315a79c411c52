"""A projection as a Flax module: frozen weights in a store, LoRA as parameters."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from ktjax.nn.adapted import LinearAdapters
from ktjax.nn.stored import Stored
from ktjax.ops.linear import linear
from ktjax.store_linear import LinearStore

Array = Any


class FrozenLinear(LinearAdapters, Stored):
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
        if lora_rank is not None:
            self.init_lora(
                store.out_features,
                store.in_features,
                lora_rank,
                lora_alpha,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(self, x: Array) -> Array:
        """x `[..., in]`, float32 or bfloat16 -> `[..., out]` in the dtype of x."""
        y = linear(x, self.store, self.lora, scaling=self.scaling)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
