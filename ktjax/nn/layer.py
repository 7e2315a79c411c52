"""The Mixture-of-Experts layer: router, routed experts, shared experts."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.nn.dense import GatedMLP, linear
from ktjax.nn.router import Routing, RoutingRule, TopKRouter

Array = Any


class Experts(Protocol):
    """Anything that computes routed experts: `RoutedExperts` or a wrapper."""

    def __call__(self, x: Array, ids: Array, w: Array) -> Array:
        """x `[..., hidden]`, ids `[..., k]` int32, w `[..., k]` -> `[..., hidden]`."""


class MoELayer(nnx.Module):
    """`y = experts(x, route(x)) [+ shared(x)]`.

    Attributes:
      router: the `TopKRouter`.
      experts: the routed experts.
      shared_experts: a dense `GatedMLP` that sees every token, or None.
      shared_gate: scales the shared experts by sigmoid(x · g) (as Qwen2-MoE), or None.
    """

    def __init__(
        self,
        experts: Experts,
        *,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        rule: RoutingRule | None = None,
        shared_intermediate_size: int | None = None,
        gate_shared: bool = False,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the layer.

        Args:
          experts: a module called as `experts(x, ids, w)`.
          hidden_size: width of a token.
          num_experts: experts to choose from.
          num_experts_per_tok: k.
          rule: how the router chooses experts and weights; None = `RoutingRule()`.
          shared_intermediate_size: width of the shared experts, or None for none.
          gate_shared: whether a sigmoid gate scales the shared experts.
          dtype: dtype of the shared experts; the router is float32.
          rngs: source of the initial values.
        """
        if gate_shared and shared_intermediate_size is None:
            raise ValueError(
                "MoELayer: gate_shared needs shared experts, but "
                "shared_intermediate_size is None"
            )
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            num_experts_per_tok,
            rule=rule,
            rngs=rngs,
        )
        self.experts = experts
        self.shared_experts = (
            nnx.data(None)
            if shared_intermediate_size is None
            else GatedMLP(hidden_size, shared_intermediate_size, dtype=dtype, rngs=rngs)
        )
        self.shared_gate = (
            linear(hidden_size, 1, dtype=dtype, rngs=rngs)
            if gate_shared
            else nnx.data(None)
        )

    def __call__(self, x: Array, mask: Array | None = None) -> tuple[Array, Routing]:
        """Apply the layer.

        Args:
          x: `[..., hidden]`, float32 or bfloat16.
          mask: `[...]` bool; tokens that are False skip the routed experts.

        Returns:
          y `[..., hidden]` in the dtype of x, and what the router did.
        """
        ids, w, routing = self.router(x, mask)
        y = self.experts(x, ids, w)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_gate is not None:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            y = y + shared.astype(y.dtype)
        return y, routing
