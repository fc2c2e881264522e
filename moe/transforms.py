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
    experts: tuple[Tensor, ...],
    activation: Activation,
) -> Float[Tensor, "T D"]:
    """:func:`moe.grouped.expert_mixture`, expert by expert, differentiable any number of times in either mode.

    experts: up, down and, where there are biases, both. It keeps every product for the backward pass, several times the
    memory.
    """
    y = torch.zeros_like(x)
    for e in expert.unique().tolist():
        up, down, *biases = (tensor[e].to(x.dtype) for tensor in experts)
        mine = (expert == e).nonzero()[:, 0]
        hidden = x[token[mine]] @ up
        hidden = activate(hidden + biases[0] if biases else hidden, activation)
        out = hidden @ down.mT
        out = out + biases[1] if biases else out
        y = y.index_add(0, token[mine], weight[mine, None].to(x.dtype) * out)
    return y
