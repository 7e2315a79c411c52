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
      dropout: the `AdapterDropout` of the adapters' input; None without a rank.
    """

    def __init__(
        self,
        store: LinearStore,
        bias: nnx.Param | None = None,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Wrap `store`.

        Args:
          store: the weights.
          bias: `[out]`, added in the dtype of x; None for none.
          lora_rank: 1 to 256, or None for no adapters.
          lora_alpha: adapters are scaled by lora_alpha / lora_rank; None = lora_rank.
          dropout: rate of dropout on the adapters' input. As of any `nnx.Dropout`,
            `model.eval()` ends it and `model.train()` brings it back.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          rngs: source of A's initial values, and, as its stream `dropout`, of seeds;
            needed with a rank.

        Raises:
          ValueError: a rank without rngs or out of its range, or a rate out of its
            range or without a rank.
        """
        self._hold(store)
        self.bias = nnx.data(bias)
        if lora_rank is None and dropout:
            raise ValueError(
                "FrozenLinear: dropout is of the adapters' input and needs a "
                f"lora_rank, got a rate of {dropout} without one"
            )
        if lora_rank is not None:
            self.init_lora(
                store.out_features,
                store.in_features,
                lora_rank,
                lora_alpha,
                dropout=dropout,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def __call__(self, x: Array) -> Array:
        """x `[..., in]`, float32 or bfloat16 -> `[..., out]` in the dtype of x."""
        return self.project(x, self.draw_seed())

    def project(self, x: Array, seed: Array | None, rows: Array | None = None) -> Array:
        """As a call, with a seed of `draw_seed` and rows as `added` takes them."""
        if seed is None:
            y = linear(x, self.store, self.lora, scaling=self.scaling)
        else:
            # The kernels read one input, and here the adapters see another.
            y = linear(x, self.store)
            y = (y + self.added(x, seed, rows)).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
