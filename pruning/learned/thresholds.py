"""Soft threshold reparameterisation: each matrix learns the threshold below which its weights are 0."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from pruning.learned.base import LearnedSparsity
from pruning.sharding import met_by, own_part


def soft_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """sign(w) · max(|w| − threshold, 0)."""
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


@final
class STR(LearnedSparsity):
    """w = sign(θ) · max(|θ| − σ(s), 0), one s a matrix, each of a stack its own.

    Kusupati et al. 2020 (arXiv:2002.03231), eq. 3–5. s starts at ``start``, far below 0 where σ(s) ≈ 0, and weight
    decay draws it to 0, which raises the threshold; the loss draws it back. strength is that decay, as AdamW and SGD
    apply it to the group of the thresholds (in the paper it is the decay of the weights): the sparsity is found, not
    asked for, and grows with it. ∂L/∂θ is ∂L/∂w where |θ| > σ(s), else 0. Raises: as :class:`LearnedSparsity`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 0.1,
        start: float = -8.0,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, strength=strength, gate_lr=gate_lr, weights=weights)
        self._own_gates({name: own_part(weight).new_full((*weight.shape[:-2], 1, 1), start)
                       for name, weight in self.views().items()})  # fmt: skip

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """The weight shrunk by its matrix' threshold."""
        return soft_threshold(theta, torch.sigmoid(met_by(self._gates[name], self.view(name))))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The thresholds, decayed by ``strength``."""
        return [group | {"weight_decay": self.strength} for group in super().parameter_groups()]

    def thresholds(self) -> dict[str, Tensor]:
        """σ(s) of each parameter: [1, 1], [E, 1, 1] for a stack of experts, [heads, 2, 1, 1] for sub-keys."""
        return {name: torch.sigmoid(gate.detach()) for name, gate in self._gates.items()}
