"""Conditional computation: which parameters a token uses."""

from moe.layer import MoE
from moe.losses import load_balancing_loss, router_z_loss
from moe.routers import SwitchRouter, TopKRouter
from moe.routing import Routing

__all__ = ["MoE", "Routing", "SwitchRouter", "TopKRouter", "load_balancing_loss", "router_z_loss"]
