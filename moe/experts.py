"""The experts of one layer, their weights stacked."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import at_least
from moe.decode import few_without_graph, mix_few_tokens
from moe.grouped import expert_mixture
from moe.nonlinearity import Activation, activate, projections
from moe.routing import Routing


class Experts(nn.Module):
    """E feed-forward networks: f_e(x) = act(x · up_e) · down_eᵀ.

    up [E, D, G·F]: G = 2 for swiglu, silu(gate) ⊙ value with the gate in the first F columns; G = 1 for gelu and relu2.
    down [E, D, F]. No biases.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, *, activation: Activation = "swiglu") -> None:
        super().__init__()
        for name, size in (("dim", dim), ("hidden", hidden), ("num_experts", num_experts)):
            at_least(name, size, 1)
        self.dim, self.hidden, self.num_experts, self.activation = dim, hidden, num_experts, activation
        self.up = nn.Parameter(torch.empty(num_experts, dim, projections(activation) * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.compiled_decoding = False  # set by moe.prepare_for_decoding
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(±fan_in^-1/2) for each expert, as nn.Linear draws."""
        nn.init.uniform_(self.up, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.uniform_(self.down, -(self.hidden**-0.5), self.hidden**-0.5)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """y_t = Σ over the assignments of t of weight · f_expert(x_t); 0 for a token without assignment."""
        return expert_mixture(
            x, routing.token, routing.expert, routing.weight, self.up, self.down, self.activation,
            compiled=self.compiled_decoding,
        )  # fmt: skip

    def forward_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """f_expert on rows, unweighted. Raises: IndexError for an expert outside [0, num_experts)."""
        up, down = self.up, self.down
        few = few_without_graph(rows, up, down) and rows.dtype == up.dtype == down.dtype
        if not few or torch.is_autocast_enabled(rows.device.type):
            return self.hidden_one(expert, rows) @ down[expert].mT
        self._require(expert)
        token, ones = torch.arange(len(rows), device=rows.device), rows.new_ones(len(rows))
        which = torch.full_like(token, expert)
        return mix_few_tokens(rows, token, which, ones, up, down, self.activation, compiled=self.compiled_decoding)

    def hidden_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n F"]:
        """act(rows · up_expert), what down_expert gets. Raises: IndexError for an expert outside [0, num_experts)."""
        self._require(expert)
        return activate(rows @ self.up[expert], self.activation)

    def _require(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert must be in [0, num_experts={self.num_experts}), got {expert}")

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, hidden={self.hidden}, num_experts={self.num_experts}"
        return f"{sizes}, activation={self.activation!r}"
