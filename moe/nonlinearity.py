"""The experts' nonlinearities: as one differentiable expression, and as the in-place steps of the lean function."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moe.checks import one_of

Activation = Literal["swiglu", "gelu", "relu", "silu", "relu2"]
aten = torch.ops.aten


def projections(activation: Activation) -> int:
    """Input projections that the activation takes: 2 for swiglu, 1 for the others. Raises: ValueError for no activation
    of these."""
    one_of("activation", activation, get_args(Activation))
    return 2 if activation == "swiglu" else 1


def activate(a: Float[Tensor, "n A"], activation: Activation) -> Float[Tensor, "n F"]:
    """silu(gate) ⊙ value of the halves of a; exact gelu(a), relu(a) or silu(a); or relu(a)²."""
    if activation == "swiglu":
        gate, value = a.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "relu2":
        return F.relu(a).square()
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](a)


def activate_into(a: Float[Tensor, "n A"], activation: Activation, h: Float[Tensor, "n F"]) -> None:
    """h ← activate(a), nothing allocated."""
    if activation == "swiglu":
        gate, value = a.chunk(2, dim=-1)
        aten.silu.out(gate, out=h)
        h.mul_(value)
    elif activation in ("gelu", "silu"):
        getattr(aten, activation).out(a, out=h)
    else:
        torch.clamp_min(a, 0.0, out=h)
        if activation == "relu2":
            h.mul_(h)


def differentiate_into(
    a: Float[Tensor, "n A"],
    d_h: Float[Tensor, "n F"],
    activation: Activation,
    *,
    h: Float[Tensor, "n F"],
    d_a: Float[Tensor, "n A"],
    dot: Float[Tensor, "n"],
) -> None:
    """h ← activate(a), d_a ← ∂⟨d_h, h⟩/∂a, dot ← ⟨d_h, h⟩ row by row. d_h is overwritten."""
    if activation == "swiglu":
        gate, value = a.chunk(2, dim=-1)
        d_gate, d_value = d_a.chunk(2, dim=-1)
        # d_gate lends its memory first to silu(gate), then to the products of the dot
        torch.mul(aten.silu.out(gate, out=d_gate), value, out=h)
        torch.mul(d_h, d_gate, out=d_value)
        sum_rows(torch.mul(d_h, h, out=d_gate), dot)
        aten.silu_backward.grad_input(d_h.mul_(value), gate, grad_input=d_gate)
        return
    activate_into(a, activation, h)
    sum_rows(torch.mul(d_h, h, out=d_a), dot)
    if activation == "gelu":
        aten.gelu_backward.grad_input(d_h, a, grad_input=d_a)
    elif activation == "silu":
        aten.silu_backward.grad_input(d_h, a, grad_input=d_a)
    elif activation == "relu":
        aten.threshold_backward.grad_input(d_h, a, 0.0, grad_input=d_a)
    else:
        torch.mul(torch.clamp_min(a, 0.0, out=d_a), d_h, out=d_a).mul_(2.0)


def sum_rows(products: Float[Tensor, "n F"], out: Float[Tensor, "n"]) -> None:
    """out ← the sum of each row."""
    # bf16 sums, accumulated in float32 and rounded once, take a quarter of the time of sums that convert on reading;
    # float16 sums could overflow
    if products.dtype == torch.bfloat16:
        out.copy_(products.sum(-1))
    else:
        torch.sum(products, -1, dtype=out.dtype, out=out)
