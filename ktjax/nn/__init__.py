"""Flax modules: routed experts, the router, the layer made of both, projections."""

from ktjax.experts_state import StoreHandle
from ktjax.nn.dense import GatedMLP, linear
from ktjax.nn.dropout import AdapterDropout
from ktjax.nn.experts import ReferenceExperts, RoutedExperts
from ktjax.nn.frozen import FrozenLinear
from ktjax.nn.layer import MoELayer
from ktjax.nn.router import (
    CorrectionBias,
    Routing,
    RoutingRule,
    TopKRouter,
    load_balancing_loss,
    load_shares,
    routing_statistics,
)
from ktjax.nn.vocabulary import token_losses

__all__ = [
    "AdapterDropout",
    "CorrectionBias",
    "FrozenLinear",
    "GatedMLP",
    "MoELayer",
    "ReferenceExperts",
    "RoutedExperts",
    "Routing",
    "RoutingRule",
    "StoreHandle",
    "TopKRouter",
    "linear",
    "load_balancing_loss",
    "load_shares",
    "routing_statistics",
    "token_losses",
]
