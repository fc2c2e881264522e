"""The experts of one layer, their weights stacked."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import at_least
from moe.decode import few_without_graph, mix_few_tokens
from moe.grouped import expert_mixture
from moe.nonlinearity import Activation, activate, projections
from moe.routing import Routing


class Experts(nn.Module):
    """E feed-forward networks: f_e(x) = act(x · up_e) · down_eᵀ, or act(x · up_e + up_bias_e) · down_eᵀ + down_bias_e.

    up [E, D, G·F]: G = 2 for swiglu, silu(gate) ⊙ value with the gate in the first F columns; G = 1 for the others.
    down [E, D, F]. bias: whether there are up_bias [E, G·F] and down_bias [E, D]; None without.
    """

    def __init__(
        self, dim: int, hidden: int, num_experts: int, *, activation: Activation = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            at_least(name, size, 1)
        self.dim, self.hidden, self.num_experts, self.activation = dim, hidden, num_experts, activation
        self.up = nn.Parameter(torch.empty(num_experts, dim, projections(activation) * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.up_bias = nn.Parameter(torch.empty(num_experts, self.up.shape[2])) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.compiled_decoding = False  # set by moe.prepare_for_decoding
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(±fan_in^-1/2) for each expert, biases too, as nn.Linear draws."""
        for inputs, parameters in ((self.dim, (self.up, self.up_bias)), (self.hidden, (self.down, self.down_bias))):
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """y_t = Σ over the assignments of t of weight · f_expert(x_t); 0 for a token without assignment."""
        return expert_mixture(
            x, routing.token, routing.expert, routing.weight, self.up, self.down, self.activation, self.up_bias,
            self.down_bias, compiled=self.compiled_decoding,
        )  # fmt: skip

    def forward_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """f_expert on rows, unweighted. Raises: IndexError for an expert outside [0, num_experts)."""
        self._require(expert)
        held = [t for t in (self.up, self.down, self.up_bias, self.down_bias) if t is not None]
        few = few_without_graph(rows, *held) and all(tensor.dtype == rows.dtype for tensor in held)
        if not few or torch.is_autocast_enabled(rows.device.type):
            return output_of(self, expert, rows)
        token, ones = torch.arange(len(rows), device=rows.device), rows.new_ones(len(rows))
        which = torch.full_like(token, expert)
        return mix_few_tokens(
            rows, token, which, ones, self.up, self.down, self.activation, self.up_bias, self.down_bias,
            compiled=self.compiled_decoding,
        )  # fmt: skip

    def hidden_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n F"]:
        """act(rows · up_expert + up_bias_expert), what down_expert gets. Raises: IndexError for an expert outside
        [0, num_experts)."""
        self._require(expert)
        return hidden_of(self, expert, rows)

    def _require(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert must be in [0, num_experts={self.num_experts}), got {expert}")

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, hidden={self.hidden}, num_experts={self.num_experts}"
        return f"{sizes}, activation={self.activation!r}" + (", bias=True" if self.up_bias is not None else "")


@runtime_checkable
class Stack(Protocol):
    """Experts that lie here: all, or those of a rank."""

    activation: Activation
    up: nn.Parameter
    down: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None


def hidden_of(stack: Stack, index: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n F"]:
    """act(rows · up_index + up_bias_index) as plain operations."""
    return activate(_affine(rows, stack.up[index], stack.up_bias, index), stack.activation)


def output_of(stack: Stack, index: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """f_index on rows, unweighted, as plain operations."""
    return _affine(hidden_of(stack, index, rows), stack.down[index].mT, stack.down_bias, index)


def _affine(rows: Tensor, matrix: Tensor, bias: Tensor | None, index: int) -> Tensor:
    # addmm rather than a sum, which would leave autocast's dtype
    return rows @ matrix if bias is None else torch.addmm(bias[index], rows, matrix)
