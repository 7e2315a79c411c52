"""Flax modules: routed experts, the router, and the layer made of both."""

from ktjax.nn.dense import GatedMLP, linear
from ktjax.nn.experts import ReferenceExperts, RoutedExperts, StoreHandle
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

__all__ = [
    "CorrectionBias",
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
]
