"""L0 regularisation: gates that are exactly 0 or 1 with positive probability, and yet have gradients."""

import math
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.learned.base import LearnedSparsity
from pruning.learned.movement import mean_of
from pruning.sharding import own_part, sharded_as

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def hard_concrete(log_alpha: Float[Tensor, "..."], uniform: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """z = clip(s · (ζ − γ) + γ, 0, 1), s = σ((log u − log(1 − u) + log α) / β), u uniform on (0, 1).

    Louizos et al. 2018 (arXiv:1712.01312), eq. 10–11; β = 2/3, γ = −0.1, ζ = 1.1."""
    logistic = uniform.log() - torch.log1p(-uniform)
    return _stretched(torch.sigmoid((logistic + log_alpha) / BETA))


def expected_gate(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """ẑ = clip(σ(log α) · (ζ − γ) + γ, 0, 1), the gate of evaluation: eq. 13, 0 from log α ≈ −2.4 down."""
    return _stretched(torch.sigmoid(log_alpha))


def open_probability(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """P(z ≠ 0) = σ(log α − β log(−γ/ζ)), eq. 12: what the L0 penalty sums."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(share: Tensor) -> Tensor:
    return (share * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@final
class L0(LearnedSparsity):
    """w = θ ⊙ z, z hard-concrete, one gate a weight; side loss strength · mean P(z ≠ 0).

    Louizos et al. 2018 (arXiv:1712.01312): :func:`hard_concrete` gates in training, one draw a step, the deterministic
    :func:`expected_gate` in evaluation and at the end. strength: nats that keeping all weights costs; the paper's
    λ / N a weight is strength / number of weights. The sparsity is found, not asked for. keep: ẑ-probability that a
    gate starts with, σ(log α). Raises: as :class:`LearnedSparsity`; ValueError for keep outside (0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        keep: float = 0.9,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, strength=strength, gate_lr=gate_lr, weights=weights, generator=generator)
        start = log_odds(keep)
        self._own_gates({name: torch.full_like(weight, start) for name, weight in self.views().items()})

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ ⊙ z."""
        gate, log_alpha = self._gates[name], self.gate_part(name)
        if not training:
            return theta * expected_gate(log_alpha)
        drawn = own_part(sharded_as(self.noise(name, gate.shape, "uniform"), gate.detach()))
        return theta * hard_concrete(log_alpha, drawn.to(log_alpha.dtype))

    def loss(self) -> Tensor:
        """strength · mean P(z ≠ 0)."""
        parts = {name: open_probability(self.gate_part(name)) for name in self._gates}
        return self.strength * mean_of(parts, total=self.number_of_gates())


def log_odds(keep: float) -> float:
    """log(keep / (1 − keep)). Raises: ValueError for keep outside (0, 1)."""
    if not 0 < keep < 1:
        raise ValueError(f"keep must be in (0, 1), got {keep}")
    return math.log(keep) - math.log1p(-keep)
