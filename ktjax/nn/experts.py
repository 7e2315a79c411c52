"""Routed experts as Flax modules: base weights in a store, LoRA as parameters."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from ktjax.config import MAX_LORA_RANK
from ktjax.lora import LoRA
from ktjax.nn.dropout import AdapterDropout
from ktjax.nn.stored import Stored
from ktjax.ops import reference
from ktjax.ops.api import moe
from ktjax.quant.formats import check_compute
from ktjax.store import ExpertStore

Array = Any


class FrozenExperts(nnx.Variable):
    """Base weights of experts held as arrays: never trained, never an nnx.Param."""


def _init_lora(
    module: nnx.Module,
    geometry: tuple[int, int, int],
    rank: int,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> None:
    """Put the six `nnx.LoRAParam`s on `module`: A Kaiming-uniform (a=√5), B zero."""
    experts, intermediate, hidden = geometry
    if not 1 <= rank <= MAX_LORA_RANK:
        raise ValueError(
            f"routed experts: lora_rank must be 1 to {MAX_LORA_RANK}, got {rank}"
        )
    for name, shape in LoRA.shapes(experts, hidden, intermediate, rank).items():
        value = LoRA.draw(name, shape, rngs.params, param_dtype)
        setattr(module, name, nnx.LoRAParam(value))


class _Adapted(nnx.Module):
    """What both kinds of routed experts share: the adapters and their scaling."""

    def _setup(
        self,
        geometry: tuple[int, int, int],
        lora_rank: int | None,
        lora_alpha: float | None,
        dropout: float,
        param_dtype: Any,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.num_experts, self.intermediate_size, self.hidden_size = geometry
        self.lora_rank = lora_rank
        self.scaling = 1.0
        if lora_rank is None and dropout:
            raise ValueError(
                "routed experts: dropout is of the adapters' inputs and needs a "
                f"lora_rank, got a rate of {dropout} without one"
            )
        if lora_rank is not None:
            if rngs is None:
                raise ValueError("routed experts: lora_rank needs rngs to draw A from")
            _init_lora(self, geometry, lora_rank, param_dtype, rngs)
            self.scaling = (lora_rank if lora_alpha is None else lora_alpha) / lora_rank
        # Last: where the two share a stream, this module's adapters draw first.
        self.dropout = AdapterDropout(dropout, rngs=rngs, where="routed experts")

    @property
    def lora(self) -> LoRA | None:
        """The adapters as `ktjax.LoRA`, or None."""
        if self.lora_rank is None:
            return None
        return LoRA(*(getattr(self, name)[...] for name in LoRA.NAMES))

    def _dropped(self) -> dict[str, Any]:
        """The arguments of an operation that are about dropout; draws a new seed."""
        seed = self.dropout.seed()
        if seed is None:
            return {}
        return {"dropout": self.dropout.rate, "dropout_seed": seed}


class RoutedExperts(_Adapted, Stored):
    """The experts of one layer: an expert store and, with a rank, trainable LoRA.

    The module keeps its store alive and `close` frees it; of copies see `Stored`. The
    six adapters are `nnx.LoRAParam`s named as in `ktjax.LoRA`, so
    `nnx.DiffState(0, nnx.LoRAParam)` selects exactly them.

    Attributes:
      handle: the store's handle, a `StoreHandle`.
      num_experts, hidden_size, intermediate_size: the store's geometry.
      lora_rank: rank of the adapters, or None.
      scaling: lora_alpha / lora_rank.
      dropout: the `AdapterDropout` of the adapters' inputs; draws a seed a call.
      compute: "bf16", "int8" or None, as in `ktjax.moe`.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        activation_policy: Literal["save", "recompute"] = "save",
        compute: Literal["bf16", "int8"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Wrap `store`.

        Args:
          store: the base weights.
          lora_rank: 1 to 256, or None for no adapters.
          lora_alpha: adapters are scaled by lora_alpha / lora_rank; None = lora_rank.
          dropout: rate of dropout on the adapters' inputs, as in `ktjax.moe`. As of any
            `nnx.Dropout`, `model.eval()` ends it and `model.train()` brings it back.
          param_dtype: dtype of the adapters, float32 or bfloat16.
          activation_policy: "save" or "recompute", as in `ktjax.moe`.
          compute: "bf16", "int8" or None, as in `ktjax.moe`.
          rngs: source of A's initial values, and, as its stream `dropout`, of seeds;
            needed with a rank.

        Raises:
          ValueError: a rank without rngs or out of its range, a policy that the store's
            format does not have, or dropout out of its range or without a rank.
        """
        check_compute(compute, store.formats, where="routed experts")
        self._hold(store)
        self.activation_policy = activation_policy
        self.compute = compute
        geometry = (store.num_experts, store.intermediate_size, store.hidden_size)
        self._setup(geometry, lora_rank, lora_alpha, dropout, param_dtype, rngs)

    def __call__(self, x: Array, ids: Array, w: Array) -> Array:
        """Sum of the chosen experts' outputs; pure and differentiable.

        Args:
          x: `[..., hidden]`, float32 or bfloat16.
          ids: `[..., k]` int32, -1 skips a slot.
          w: `[..., k]` float32.

        Returns:
          `[..., hidden]` in the dtype of x.
        """
        return moe(
            x,
            ids,
            w,
            self.store,
            self.lora,
            scaling=self.scaling,
            activation_policy=self.activation_policy,
            compute=self.compute,
            **self._dropped(),
        )


class ReferenceExperts(_Adapted):
    """The same layer on the pure-JAX reference: float32 throughout, slow, the oracle.

    Attributes:
      gate, up, down: `FrozenExperts` with float32 weights, shaped as in `ktjax.moe`.
    """

    def __init__(
        self,
        gate: Array,
        up: Array,
        down: Array,
        *,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        """Copy the weights to float32; see `RoutedExperts` for the other arguments."""
        self.gate = FrozenExperts(jnp.asarray(gate, jnp.float32))
        self.up = FrozenExperts(jnp.asarray(up, jnp.float32))
        self.down = FrozenExperts(jnp.asarray(down, jnp.float32))
        experts, intermediate, hidden = gate.shape
        geometry = (experts, intermediate, hidden)
        self._setup(geometry, lora_rank, lora_alpha, dropout, param_dtype, rngs)

    def __call__(self, x: Array, ids: Array, w: Array) -> Array:
        """As `RoutedExperts.__call__`."""
        base = (self.gate[...], self.up[...], self.down[...])
        return reference.moe(
            x, ids, w, *base, self.lora, scaling=self.scaling, **self._dropped()
        )
