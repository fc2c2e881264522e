"""What torch.func and forward mode see in place of functions that know their backward pass alone: plain operations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.nonlinearity import Activation, activate


def transformed() -> bool:
    """Whether torch.func or forward mode is at work, which look into operations."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def plain_mixture(
    x: Float[Tensor, "T D"],
    token: Int[Tensor, "N"],
    expert: Int[Tensor, "N"],
    weight: Float[Tensor, "N"],
    up: Float[Tensor, "E D A"],
    down: Float[Tensor, "E D F"],
    activation: Activation,
    up_bias: Float[Tensor, "E A"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
) -> Float[Tensor, "T D"]:
    """:func:`moe.grouped.expert_mixture`, expert by expert, differentiable any number of times in either mode.

    It keeps every product for the backward pass, several times the memory.
    """
    y = torch.zeros_like(x)
    for e in expert.unique().tolist():
        mine = (expert == e).nonzero()[:, 0]
        hidden = x[token[mine]] @ up[e].to(x.dtype)
        hidden = activate(hidden if up_bias is None else hidden + up_bias[e].to(x.dtype), activation)
        out = hidden @ down[e].to(x.dtype).mT
        out = out if down_bias is None else out + down_bias[e].to(x.dtype)
        y = y.index_add(0, token[mine], weight[mine, None].to(x.dtype) * out)
    return y
