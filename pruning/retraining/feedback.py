"""Masked forward pass, dense update: weights that were pruned go on learning, and may come back."""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from pruning.allocation import Allocation, guarded_ranking, uniform
from pruning.learned.chosen import ChosenMasks
from pruning.schedules import Schedule, one_shot
from pruning.sharding import own_part


@final
class Feedback(ChosenMasks):
    """Dynamic pruning with feedback: the gradient at the pruned weights moves the dense ones.

    Lin et al. 2020 (arXiv:2006.07253), algorithm 1: θ ← θ − lr · ∂L/∂w at w = θ ⊙ mask, for every weight, pruned or
    not; the mask is the largest |θ|, chosen again every ``every`` steps (16 in the paper) at the sparsity of a gradual
    schedule. The error w − θ of the pruning feeds back into the next choice. ``finish()`` writes θ ⊙ mask.
    Raises: as :class:`pruning.learned.chosen.ChosenMasks`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        allocation: Allocation = uniform,
        every: int = 16,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, schedule=schedule, allocation=allocation, every=every, weights=weights)
        self.choose()

    def scores(self) -> dict[str, Tensor]:
        """|θ|."""
        return {name: weight.abs() for name, weight in self.views().items()}

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ ⊙ mask, whose gradient passes to all of θ."""
        return straight_through(theta, theta * own_part(self.masks().kept[name]))


@final
class NeuralWirings(ChosenMasks):
    """Discovering neural wirings: the k strongest edges of the whole network, found anew before every step.

    Wortsman et al. 2019 (arXiv:1906.00586), algorithm 1, on matrices: the forward pass uses the edges of largest |θ|,
    one ranking over all matrices, k fixed from the first step; the backward pass moves every edge, θ_uv ← θ_uv +
    ⟨Z_u, −lr ∂L/∂I_v⟩, which is ∂L/∂w of the sparse pass, while only real edges carry the gradient further back.
    An edge outside that grows past the weakest one inside takes its place: :class:`Feedback` with a constant sparsity,
    a choice in every step and one ranking, in which every matrix keeps at least its strongest edge (in the paper a
    layer may end empty). Raises: as :class:`Feedback`.
    """

    def __init__(self, model: nn.Module, *, sparsity: float, weights: Sequence[str] | None = None) -> None:
        super().__init__(model, schedule=one_shot(sparsity), allocation=guarded_ranking, weights=weights)
        self.choose()

    def scores(self) -> dict[str, Tensor]:
        """|θ|."""
        return {name: weight.abs() for name, weight in self.views().items()}

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ ⊙ mask, whose gradient passes to all of θ."""
        return straight_through(theta, theta * own_part(self.masks().kept[name]))


def straight_through(theta: Tensor, value: Tensor) -> Tensor:
    """``value`` forward, the identity backward; exact where value is θ or 0."""
    return theta + (value - theta).detach()
