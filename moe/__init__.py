"""Conditional computation: which parameters a token uses."""

from moe.layer import MoE
from moe.losses import load_balancing_loss, router_z_loss
from moe.routers import SwitchRouter, TopKRouter
from moe.routing import Routing
from moe.stats import RoutingStats, routing_stats

__all__ = [
    "MoE",
    "Routing",
    "RoutingStats",
    "SwitchRouter",
    "TopKRouter",
    "load_balancing_loss",
    "router_z_loss",
    "routing_stats",
]
