"""Movement pruning: scores that grow where a weight moves away from 0."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from pruning.allocation import Allocation, uniform
from pruning.learned.base import LearnedSparsity
from pruning.learned.chosen import ChosenMasks
from pruning.schedules import Schedule
from pruning.sharding import own_part


@final
class Movement(ChosenMasks):
    """w = θ ⊙ top_v(S), straight through: ∂L/∂θ = ∂L/∂w ⊙ mask and ∂L/∂S = ∂L/∂w ⊙ θ.

    Sanh et al. 2020 (arXiv:2005.07683), eq. 2–5: with SGD S ← S − lr · g · θ for every weight, those that are masked
    too, where g = ∂L/∂w is the gradient of the masked forward pass. S starts at 0. Every ``every`` steps the mask is
    the (1 − schedule(step)) highest scores, exactly, of each matrix or as ``allocation`` counts; of equal scores the
    earlier go first, so begin the schedule after some steps. A weight may come back.
    Raises: as :class:`pruning.learned.chosen.ChosenMasks`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        allocation: Allocation = uniform,
        every: int = 1,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, schedule=schedule, allocation=allocation, every=every, gate_lr=gate_lr, weights=weights)
        self._own_gates({name: torch.zeros_like(weight) for name, weight in self.views().items()})
        self.choose()

    def scores(self) -> dict[str, Tensor]:
        """S."""
        return {name: gate.detach() for name, gate in self.named_gates().items()}

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ ⊙ mask; the mask passes its gradient on to the scores."""
        return theta * _through(own_part(self.masks().kept[name]), self.gate_part(name))


@final
class SoftMovement(LearnedSparsity):
    """w = θ ⊙ [σ(S) > threshold], with the side loss strength · mean σ(S): the sparsity is found, not asked for.

    Sanh et al. 2020 (arXiv:2005.07683), section 4, straight through as :class:`Movement`. A higher strength lowers more
    scores below the threshold. S starts at 0, σ(S) at 1/2. Raises: as :class:`LearnedSparsity`; ValueError for a
    threshold outside (0, 1/2), which would start with every weight gone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        threshold: float = 0.1,
        gate_lr: float = 1.0,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, strength=strength, gate_lr=gate_lr, weights=weights)
        if not 0 < threshold < 0.5:
            raise ValueError(f"threshold must be in (0, 0.5), got {threshold}")
        self.threshold = threshold
        self._own_gates({name: torch.zeros_like(weight) for name, weight in self.views().items()})

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ ⊙ mask; the mask passes its gradient on to the scores."""
        scores = self.gate_part(name)
        return theta * _through(scores.detach().sigmoid() > self.threshold, scores)

    def loss(self) -> Tensor:
        """strength · mean σ(S) over all scores."""
        parts = {name: self.gate_part(name).sigmoid() for name in self._gates}
        return self.strength * mean_of(parts, total=self.number_of_gates())


def mean_of(parts: Mapping[str, Tensor], *, total: int | None = None) -> Tensor:
    """The mean over all entries of all tensors together. total: of entries, where these are one process's parts."""
    total = sum(part.numel() for part in parts.values()) if total is None else total
    return torch.stack([part.sum() / total for part in parts.values()]).sum()


def _through(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask's value, the identity's gradient to the scores; S − S is 0 exactly, so that zeros are exact."""
    return mask.to(scores.dtype) + (scores - scores.detach())
