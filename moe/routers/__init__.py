"""Routers: hidden states → Routing."""

from moe.routers.top_k import SwitchRouter, TopKRouter

__all__ = ["SwitchRouter", "TopKRouter"]
