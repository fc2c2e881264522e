"""The lean autograd function: a weighted mixture of experts that saves x, the routing and the pre-activation only."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moe.dispatch import group_by_expert

Activation = Literal["swiglu", "gelu", "relu2"]


def projections(activation: Activation) -> int:
    """Input projections that the activation takes: 2 for swiglu, 1 for gelu and relu2. Raises: ValueError otherwise."""
    if activation not in ("swiglu", "gelu", "relu2"):
        raise ValueError(f"activation must be 'swiglu', 'gelu' or 'relu2', got {activation!r}")
    return 2 if activation == "swiglu" else 1


def activate(a: Float[Tensor, "n A"], activation: Activation) -> Float[Tensor, "n F"]:
    """silu(gate) ⊙ value of the halves of a; exact gelu(a); or relu(a)²."""
    if activation == "swiglu":
        gate, value = a.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(a) if activation == "gelu" else F.relu(a).square()


def expert_mixture(
    x: Float[Tensor, "T D"],
    token: Int[Tensor, "N"],
    expert: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E F D"],
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """y_t = Σ_{n: token_n = t} weight_n · act(x_t · up_{expert_n}) · down_{expert_n}."""
    groups = group_by_expert(token, expert, up.shape[0])
    weight = weight[groups.order].to(x.dtype)
    y = torch.zeros_like(x)
    start = 0
    for e, count in enumerate(groups.counts.tolist()):
        rows = slice(start, start + count)
        start += count
        out = activate(x[groups.token[rows]] @ up[e], activation) @ down[e]
        y = y.index_add(0, groups.token[rows], out.to(x.dtype) * weight[rows, None])
    return y
