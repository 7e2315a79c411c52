"""The top-k router, its load-balancing loss and its telemetry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ktjax.nn.dense import linear

Array = Any


class CorrectionBias(nnx.Variable):
    """The bias of a router's choice: float32 `[experts]`, never an nnx.Param.

    Who trains the whole router moves it by the load, not by a gradient.
    """


@dataclasses.dataclass(frozen=True)
class RoutingRule:
    """How the logits of a token become experts and weights.

    Attributes:
      scores: "softmax" over all experts, or "sigmoid" of each.
      correction_bias: whether a bias per expert is added to the scores for the choice,
        not for the weights (arXiv:2408.15664).
      groups: the experts are so many groups of neighbours, of one size.
      groups_per_tok: a token chooses within its best groups only, so many.
      group_top: a group is worth the sum of so many of its best scores.
      normalize: whether the k weights of a token are made to sum to one.
      scaling: what the weights are multiplied with in the end.
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    groups: int = 1
    groups_per_tok: int = 1
    group_top: int = 1
    normalize: bool = True
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(
                f"RoutingRule: scores must be softmax or sigmoid, got {self.scores!r}"
            )
        if not 1 <= self.groups_per_tok <= self.groups:
            raise ValueError(
                f"RoutingRule: groups_per_tok must be 1 to groups = {self.groups}, got "
                f"{self.groups_per_tok}"
            )

    def validate(self, num_experts: int, num_experts_per_tok: int) -> None:
        """Check the rule against a layer's sizes.

        Raises:
          ValueError: k experts cannot be chosen so.
        """
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"router: num_experts_per_tok = {num_experts_per_tok} must be 1 to "
                f"num_experts = {num_experts}"
            )
        if num_experts % self.groups:
            raise ValueError(
                f"router: num_experts = {num_experts} must be a multiple of groups = "
                f"{self.groups}"
            )
        size = num_experts // self.groups
        if self.group_top > size:
            raise ValueError(
                f"router: group_top = {self.group_top} is more than the {size} experts "
                "of a group"
            )
        if num_experts_per_tok > self.groups_per_tok * size:
            raise ValueError(
                f"router: num_experts_per_tok = {num_experts_per_tok} is more than the "
                f"{self.groups_per_tok} * {size} experts of the chosen groups"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router did with a batch; averages over the tokens that the mask keeps.

    Attributes:
      load: `[experts]` float32, how many of a token's k slots go to each expert on
        average; sums to k (0 when no token is kept). Not differentiable.
      probability: `[experts]` float32, the mean of the scores of all experts, divided
        by their sum for each token; sums to 1. Without bias, groups and scaling.
    """

    load: Array
    probability: Array


def load_balancing_loss(routings: Sequence[Routing]) -> Array:
    """E · Σₑ load[e] · probability[e], averaged over the layers (arXiv:2101.03961).

    It is k when the load is even. With softmax scores it is the value of transformers'
    `load_balancing_loss_func` on the layers' router logits; with sigmoid scores the
    probabilities are those of DeepSeek-V3's balance loss (arXiv:2412.19437), averaged
    over the batch instead of each sequence.

    Args:
      routings: one per layer, each from the same tokens.

    Returns:
      A float32 scalar, differentiable through the probabilities.

    Raises:
      ValueError: there are none.
    """
    if not routings:
        raise ValueError("load_balancing_loss: no layer has a router")
    load = jnp.mean(jnp.stack([routing.load for routing in routings]), axis=0)
    probability = jnp.mean(jnp.stack([r.probability for r in routings]), axis=0)
    return load.shape[-1] * jnp.sum(load * probability)


def routing_statistics(routings: Sequence[Routing]) -> dict[str, Array]:
    """How even the load of the experts is: float32 scalars for a log.

    No token is ever dropped: experts have no capacity here.

    Args:
      routings: one per layer, each from the same tokens; none give no statistics.

    Returns:
      `router_load_max`: the largest load of an expert, as a multiple of the even load;
      1 to experts / k. `router_entropy`: the entropy of the load, as a share of that of
      the even load, averaged over the layers; 0 to 1. Both 0 when no token is kept.
    """
    if not routings:
        return {}
    share = load_shares(routings)
    experts = share.shape[-1]
    logs = jnp.log(jnp.where(share > 0, share, 1.0))
    entropy = -jnp.sum(share * logs, axis=-1) / jnp.log(float(max(experts, 2)))
    return {
        "router_load_max": jnp.max(share) * experts,
        "router_entropy": jnp.mean(entropy),
    }


def load_shares(routings: Sequence[Routing]) -> Array:
    """`[layers, experts]` float32: each expert's share of its layer's load."""
    load = jnp.stack([routing.load for routing in routings])
    return load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1e-20)


class TopKRouter(nnx.Module):
    """Scores all experts in float32 and takes the k best, by a `RoutingRule`.

    Attributes:
      gate: the linear layer that gives the logits.
      bias: the `CorrectionBias`, or None when the rule has none.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        rule: RoutingRule | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Build the router.

        Args:
          hidden_size: width of a token.
          num_experts: experts to choose from.
          num_experts_per_tok: k, at most `num_experts`.
          rule: how they are chosen; None = `RoutingRule()`: softmax, weights that sum
            to one.
          param_dtype: dtype of the kernel `[hidden, experts]`; the product is float32.
          rngs: source of the kernel's initial values.
        """
        self.rule = RoutingRule() if rule is None else rule
        self.rule.validate(num_experts, num_experts_per_tok)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.gate = linear(
            hidden_size,
            num_experts,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.bias = (
            CorrectionBias(jnp.zeros(num_experts, jnp.float32))
            if self.rule.correction_bias
            else nnx.data(None)
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
        logits = self.gate(x.astype(jnp.float32))
        if self.rule.scores == "softmax":
            scores = probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            scores = jax.nn.sigmoid(logits)
            probabilities = _sum_to_one(scores)
        ids = self._choose(scores)
        w = jnp.take_along_axis(scores, ids, axis=-1)
        if self.rule.normalize:
            w = _sum_to_one(w)
        w = w * self.rule.scaling
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

    def _choose(self, scores: Array) -> Array:
        """Scores `[..., experts]` -> the k experts `[..., k]` int32."""
        rule = self.rule
        if self.bias is not None:
            scores = scores + self.bias[...]
        if rule.groups > 1:
            grouped = scores.reshape(*scores.shape[:-1], rule.groups, -1)
            worth = jnp.sum(jax.lax.top_k(grouped, rule.group_top)[0], axis=-1)
            _, best = jax.lax.top_k(worth, rule.groups_per_tok)
            chosen = jnp.any(best[..., None] == jnp.arange(rule.groups), axis=-2)
            grouped = jnp.where(chosen[..., None], grouped, -jnp.inf)
            scores = grouped.reshape(scores.shape)
        return jax.lax.top_k(scores, self.num_experts_per_tok)[1]


def _sum_to_one(scores: Array) -> Array:
    # Sigmoids may all underflow; a softmax's sum does not feel 1e-20.
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
