"""Penalties and proximal steps as methods of training: weights that shrink, and the smallest set to 0."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, uniform
from pruning.axes import Axis
from pruning.learned.base import LearnedSparsity, add_to_part
from pruning.learned.penalties import Penalty, l1, unit_blocks, unit_norms, unit_size
from pruning.learned.thresholds import soft_threshold
from pruning.masking import Masks
from pruning.sharding import gathered, own_part, sharded_as, whole
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction


@final
class Regularized(LearnedSparsity):
    """Side loss strength · penalty(weights) / number of weights; the weights that it made smallest go at the end.

    penalty: :func:`pruning.learned.penalties.l1`, ``l2``, ``hoyer_square``, or ``group_lasso`` with axes bound. A
    gradient shrinks weights and leaves none at exactly 0, so evaluation and ``finish()`` keep the largest
    1 − sparsity, counted by ``allocation``.
    Raises: as :class:`LearnedSparsity`; ValueError for a sparsity outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        penalty: Penalty = l1,
        strength: float = 1.0,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, strength=strength, weights=weights)
        check_fraction("sparsity", sparsity)
        self.sparsity, self.penalty, self.allocation = sparsity, penalty, allocation
        self._largest = Masks({})

    def prepare(self) -> None:
        """Choose the largest weights."""
        scores = {name: weight.abs() for name, weight in self.views().items()}
        self._largest = select_masks(scores, sparsity=self.sparsity, allocation=self.allocation)

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ in training, the largest of θ in evaluation."""
        return theta if training else theta * own_part(self._largest.kept[name])

    def loss(self) -> Tensor:
        """strength · penalty / number of weights, all of it on every rank: weights held in part are gathered for it."""
        return self._priced(gathered(self.views()))

    @torch.enable_grad()
    def _add_loss(self) -> None:
        views = self.views()
        leaves = {name: weight.detach().requires_grad_() for name, weight in gathered(views).items()}
        priced = self._priced(leaves)
        # a penalty of units does not reach the weights of product keys
        slopes = torch.autograd.grad(priced, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for (name, weight), slope in zip(self._weights.items(), slopes, strict=True):
            add_to_part(weight, own_part(sharded_as(slope, views[name])))

    def _priced(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.strength * self.penalty(weights) / sum(weight.numel() for weight in weights.values())


@final
class Proximal(LearnedSparsity):
    """After each optimiser step w ← sign(w) · max(|w| − δ, 0), δ = lr · strength: the proximal step of an L1 penalty.

    With ``axes`` it is that of the group lasso: w_unit ← w_unit · max(1 − δ √n / ‖w_unit‖, 0), n the weights of a unit
    (Parikh & Boyd 2014, sections 6.5.1 and 6.5.2). The zeros are exact and may come back; the sparsity is found, not
    asked for, and grows with strength. lr is that of the parameter's group at this step.
    Raises: as :class:`LearnedSparsity`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 0.02,
        axes: Sequence[Axis] | None = None,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, strength=strength, weights=weights)
        self.axes = None if axes is None else tuple(axes)

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ: its zeros are its own."""
        return theta

    def settle(self, optimizer: Optimizer) -> None:
        """The proximal step."""
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        if self.axes is None:
            for weight in self._weights.values():
                own = own_part(weight.data)
                own.copy_(soft_threshold(own, rates.get(id(weight), 0.0) * self.strength))
            return
        with whole(self.views()) as values:
            for axis in self.axes:
                owners = [self._weights[s.parameter] for s in axis.slices if s.parameter in self._weights]
                shrink_units(values, axis, rates.get(id(owners[0]), 0.0) * self.strength if owners else 0.0)


def shrink_units(weights: dict[str, Tensor], axis: Axis, delta: float) -> None:
    """w_unit ← w_unit · max(1 − δ √n / ‖w_unit‖, 0) for each unit of an axis, in place. Raises: as ``unit_blocks``."""
    norms = unit_norms(weights, axis)
    factor = (1 - delta * unit_size(weights, axis) ** 0.5 / torch.where(norms > 0, norms, 1)).clamp_min(0)
    for block in unit_blocks(weights, axis):
        block.mul_(factor.view(-1, *[1] * (block.ndim - 1)).to(block.dtype))
