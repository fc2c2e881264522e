"""A linear map whose backward pass keeps the k largest errors of each token, or of the batch, and skips the rest."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import at_least, within
from moe.memory_values import table_gradient, weighted_rows
from moe.once import differentiable_once


@torch.compiler.disable
def meprop_linear(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "O D"],
    bias: Float[Tensor, "O"] | None = None,
    *,
    k: int,
    unified: bool = False,
) -> Float[Tensor, "*batch O"]:
    """y = x Wᵀ + b, whose gradients come from the k largest of the O errors g = ∂L/∂y. Sun et al. 2017,
    arXiv:1706.06197.

    With ĝ equal to g at the kept entries and 0 elsewhere: ∂L/∂x = ĝ W, ∂L/∂W = ĝᵀ x, ∂L/∂b = Σ_t ĝ_t. Exactly k
    entries of each token are kept, by abs(g_to); with ``unified`` the same k outputs for all tokens, by Σ_t abs(g_to).
    Only kept entries are multiplied: 4·T·k·D operations in place of 4·T·O·D. Unified, they are two matrix products
    of T × k × D. Each token with its own k outputs, they are sums of scattered rows, which run at the speed of memory:
    slower than dense products unless k is a few percent of O (benchmarks/bench_meprop.py).

    The backward pass computes in the weight's type, under autocast too. Differentiable once; torch.compile breaks here.
    Raises: ValueError for k outside [1, O], or widths that do not fit.

    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> meprop_linear(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), k=1).backward(torch.tensor([[-5.0, 1.0]]))
    >>> x.grad
    tensor([[ -5., -10.]])
    """
    outputs, inputs = weight.shape
    within("k", k, 1, outputs, most_name="outputs")
    if x.shape[-1] != inputs:
        raise ValueError(f"x must have width inputs={inputs}, got {x.shape[-1]}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must have shape [{outputs}], got {list(bias.shape)}")
    return _MePropLinear.apply(x, weight, bias, k, unified)


class _MePropLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, unified: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.k, ctx.unified = k, unified
        return F.linear(x, weight, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows, errors = (t.to(weight.dtype).reshape(-1, t.shape[-1]) for t in (x, d_y))
        gradients = _unified if ctx.unified else _by_token
        with torch.autocast(x.device.type, enabled=False):
            d_x, d_weight, d_bias = gradients(rows, weight, errors, ctx.k, ctx.needs_input_grad)
        return None if d_x is None else d_x.view(x.shape).to(x.dtype), d_weight, d_bias, None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _unified(x: Tensor, weight: Tensor, errors: Tensor, k: int, needed: tuple[bool, ...]) -> Gradients:
    kept = errors.abs().sum(0).topk(k, sorted=False).indices
    some = errors.index_select(1, kept)
    d_x = some @ weight.index_select(0, kept) if needed[0] else None
    d_weight = torch.zeros_like(weight).index_copy_(0, kept, some.mT @ x) if needed[1] else None
    return d_x, d_weight, errors.new_zeros(len(weight)).index_copy_(0, kept, some.sum(0)) if needed[2] else None


def _by_token(x: Tensor, weight: Tensor, errors: Tensor, k: int, needed: tuple[bool, ...]) -> Gradients:
    kept = errors.abs().topk(k, dim=1, sorted=False).indices
    some = errors.gather(1, kept)
    d_x = weighted_rows(weight, kept, some) if needed[0] else None
    d_weight = table_gradient(weight, kept, some, x, False) if needed[1] else None
    d_bias = errors.new_zeros(len(weight)).index_add_(0, kept.flatten(), some.flatten()) if needed[2] else None
    return d_x, d_weight, d_bias


class MePropLinear(nn.Linear):
    """An nn.Linear [outputs, inputs] whose backward pass is :func:`meprop_linear`'s.

    Surgery that leaves fewer than k outputs leaves a layer that keeps all its errors.
    Raises: ValueError for sizes < 1, or k outside [1, outputs].

    >>> MePropLinear(8, 6, k=2)(torch.zeros(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(self, inputs: int, outputs: int, *, k: int, unified: bool = False, bias: bool = True) -> None:
        at_least("inputs", inputs, 1)
        at_least("outputs", outputs, 1)
        within("k", k, 1, outputs, most_name="outputs")
        super().__init__(inputs, outputs, bias=bias)
        self.k, self.unified = k, unified

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, k: int, unified: bool = False) -> Self:
        """The same map, over the parameters of ``linear``, which it shares."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, k=k, unified=unified, bias=linear.bias is not None)
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
        """x [..., inputs] to [..., outputs]."""
        return meprop_linear(x, self.weight, self.bias, k=min(self.k, len(self.weight)), unified=self.unified)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{super().extra_repr()}, k={self.k}, unified={self.unified}"
