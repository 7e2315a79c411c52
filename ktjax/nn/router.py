"""The softmax top-k router, its load-balancing loss and its telemetry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.nn.dense import linear

Array = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router did with a batch; averages over the tokens that the mask keeps.

    Attributes:
      load: `[experts]` float32, how many of a token's k slots go to each expert on
        average; sums to k (0 when no token is kept). Not differentiable.
      probability: `[experts]` float32, the mean softmax probability; sums to 1.
    """

    load: Array
    probability: Array


def load_balancing_loss(routings: Sequence[Routing]) -> Array:
    """E · Σₑ load[e] · probability[e], averaged over the layers (arXiv:2101.03961).

    It is k when the load is even. The same value as transformers'
    `load_balancing_loss_func` on the layers' router logits.

    Args:
      routings: one per layer, each from the same tokens.

    Returns:
      A float32 scalar, differentiable through the probabilities.
    """
    if not routings:
        raise ValueError("load_balancing_loss: no layer has a router")
    load = jnp.mean(jnp.stack([routing.load for routing in routings]), axis=0)
    probability = jnp.mean(jnp.stack([r.probability for r in routings]), axis=0)
    return load.shape[-1] * jnp.sum(load * probability)


class TopKRouter(nnx.Module):
    """Softmax over all experts in float32, then the k most probable."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        normalize: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the router.

        Args:
          hidden_size: width of a token.
          num_experts: experts to choose from.
          num_experts_per_tok: k, at most `num_experts`.
          normalize: make the k weights of a token sum to one.
          param_dtype: dtype of the kernel `[hidden, experts]`; the product is float32.
          rngs: source of the kernel's initial values.
        """
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                "TopKRouter: num_experts_per_tok must be 1 to num_experts = "
                f"{num_experts}, got {num_experts_per_tok}"
            )
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.normalize = normalize
        self.gate = linear(
            hidden_size,
            num_experts,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Array, mask: Array | None = None
    ) -> tuple[Array, Array, Routing]:
        """Route the tokens x `[..., hidden]`.

        Args:
          x: the tokens.
          mask: `[...]` bool; a token that is False gets ids of -1 and weights of 0, so
            its experts are not computed, and it counts in no average.

        Returns:
          ids `[..., k]` int32, w `[..., k]` float32, and the `Routing`.
        """
        probabilities = jax.nn.softmax(self.gate(x.astype(jnp.float32)), axis=-1)
        w, ids = jax.lax.top_k(probabilities, self.num_experts_per_tok)
        if self.normalize:
            w = w / jnp.sum(w, axis=-1, keepdims=True)
        keep = jnp.ones(x.shape[:-1], bool) if mask is None else mask
        share = keep / jnp.maximum(jnp.sum(keep), 1)
        ids = jnp.where(keep[..., None], ids, -1)
        w = jnp.where(keep[..., None], w, 0.0)
        slots = jax.nn.one_hot(ids, self.num_experts, dtype=jnp.float32)
        routing = Routing(
            load=jnp.einsum("...,...ke->e", share, slots),
            probability=jnp.einsum("...,...e->e", share, probabilities),
        )
        return ids, w, routing
