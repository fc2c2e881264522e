"""Dense feed-forward layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.dropout import drop_connect
from moe.meprop import MePropLinear
from moe.noise import Source


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "relu2": relu_squared,
}  # fmt: skip


class FeedForward(nn.Module):
    """``down(silu(gate x) · up x)`` for swiglu (Shazeer 2020, arXiv:2002.05202), else ``down(act(up x))``; no biases.

    dim: width in and out; hidden: neurons; activation: "swiglu", "gelu" (exact), "relu", "silu" or "relu2".
    drop_connect: rate at which single weights are dropped in training (:func:`moe.dropout.drop_connect`). error_k: how
    many errors of each output vector the backward pass keeps, None for all; error_unified: the same ones for all tokens
    (:class:`MePropLinear`).
    Raises ValueError for another activation.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        drop_connect: float = 0.0,
        error_k: int | None = None,
        error_unified: bool = False,
    ) -> None:
        super().__init__()
        if activation != "swiglu" and activation not in _UNGATED:
            raise ValueError(f"activation must be one of swiglu, {', '.join(_UNGATED)}, got {activation!r}")
        self.activation, self.drop_connect = activation, drop_connect
        self.gate = _linear(dim, hidden, error_k, error_unified) if activation == "swiglu" else None
        self.up = _linear(dim, hidden, error_k, error_unified)
        self.down = _linear(hidden, dim, error_k, error_unified)

    def forward(self, x: Float[Tensor, "... D"], *, generator: Source | None = None) -> Float[Tensor, "... D"]:
        """x [..., dim] to the same shape. generator: draws the weights that are dropped."""
        p = self.drop_connect if self.training else 0.0
        up = drop_connect(self.up, x, p, generator=generator, site="up")
        if self.gate is None:
            return drop_connect(self.down, _UNGATED[self.activation](up), p, generator=generator, site="down")
        gate = drop_connect(self.gate, x, p, generator=generator, site="gate")
        return drop_connect(self.down, F.silu(gate) * up, p, generator=generator, site="down")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"activation={self.activation}"


def _linear(inputs: int, outputs: int, error_k: int | None, unified: bool) -> nn.Linear:
    if error_k is None:
        return nn.Linear(inputs, outputs, bias=False)
    return MePropLinear(inputs, outputs, k=min(error_k, outputs), unified=unified, bias=False)


def autocast_once(x: Tensor) -> Tensor:
    """x in the autocast type, where autocast is on: several matrix products then share one conversion."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
