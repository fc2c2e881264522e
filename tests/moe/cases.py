"""Layers and inputs that several tests share."""

import torch
from torch import Tensor

from moe import MoE, SwitchRouter, TopKRouter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def top_k_layer(dim=8, hidden=12, experts=4, k=2, *, dtype=torch.float64, renormalize=True, **options) -> MoE:
    router = TopKRouter(dim, experts, k=k, renormalize=renormalize)
    return MoE(dim, hidden, experts, router, **options).to(dtype)


def switch_layer(dim=8, hidden=12, experts=4, *, dtype=torch.float64, **options) -> MoE:
    return MoE(dim, hidden, experts, SwitchRouter(dim, experts, **options)).to(dtype)


def parameters(layer: MoE) -> list[Tensor]:
    """Router, up, down, and the biases of experts that have them: the order of the oracle's arguments."""
    experts = layer.experts
    biases = [] if experts.up_bias is None else [experts.up_bias, experts.down_bias]
    return [layer.router.weight, experts.up, experts.down, *biases]
