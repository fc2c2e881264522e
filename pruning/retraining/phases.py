"""Dense and sparse phases in turn: dense–sparse–dense, iterative hard thresholding."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, uniform
from pruning.dynamic.base import reset_state
from pruning.learned.base import LearnedSparsity
from pruning.masking import Masks, clear_gradients
from pruning.sharding import own_part
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction
from pruning.weights import check_unshared


class Phases(LearnedSparsity):
    """In a sparse phase the largest weights at its beginning train and the others are held at 0; else all train.

    Weights come back at 0, with fresh optimiser state. Abstract: which steps are sparse is the method's.
    Raises: as :class:`pruning.learned.base.LearnedSparsity`; ValueError for a sparsity outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, weights=weights)
        check_unshared(model, self._weights)
        check_fraction("sparsity", sparsity)
        self.sparsity, self.allocation = sparsity, allocation
        self._now: Masks | None = None

    @abstractmethod
    def sparse_at(self, step: int) -> bool:
        """Whether the step after ``step`` others belongs to a sparse phase."""

    def enter(self) -> None:
        """Choose and prune, if the present step belongs to a sparse phase."""
        if self.sparse_at(self.step):
            self._now = self.largest()
            self._now.apply(self.model)

    def largest(self) -> Masks:
        """The weights of largest magnitude, counted by the allocation."""
        scores = {name: weight.abs() for name, weight in self.views().items()}
        return select_masks(scores, sparsity=self.sparsity, allocation=self.allocation)

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ as it is: a sparse phase has its zeros in θ."""
        return theta

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clear the gradients of what is held at 0."""
        held = self._held if self.finished else self._now
        clear_gradients(self.model, {} if held is None else held.kept)
        return True

    def settle(self, optimizer: Optimizer) -> None:
        """Hold the zeros; enter or leave a sparse phase."""
        if self._now is not None:
            self._now.apply(self.model)
        if self.sparse_at(self.step) and self._now is None:
            self.enter()
        elif not self.sparse_at(self.step) and self._now is not None:
            self._now = None
        if self._now is not None:
            for name, mask in self._now.kept.items():
                reset_state(optimizer, self._weights[name], ~own_part(mask))

    def extra_state(self) -> dict[str, Any]:
        """The masks of a sparse phase."""
        return {} if self._now is None else dict(self._now.state_dict())

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the masks back."""
        self._now = self._own(state) if state else None


@final
class DenseSparseDense(Phases):
    """Han et al. 2017, DSD (arXiv:1607.04381): train, prune the smallest and retrain, then let all train again.

    Dense before step ``begin``, sparse before ``end``, dense from then on, the pruned weights from 0: a regulariser,
    whose result is dense. The paper lowers the learning rate tenfold in the last phase; that is the rate schedule's.
    Raises: as :class:`Phases`; ValueError unless 0 ≤ begin < end.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        begin: int,
        end: int,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, sparsity=sparsity, allocation=allocation, weights=weights)
        if not 0 <= begin < end:
            raise ValueError(f"begin must be in [0, end={end}), got {begin}")
        self.first, self.last = begin, end
        self.enter()

    def sparse_at(self, step: int) -> bool:
        """From ``begin`` to before ``end``."""
        return self.first <= step < self.last

    def finish(self) -> Masks:
        """Nothing is pruned; after the dense phase all masks are True, and nothing is held."""
        self.finished = True
        return self.masks()


@final
class HardThresholding(Phases):
    """Jin et al. 2016 (arXiv:1607.05423): prune the smallest and train the rest, restore all and train all, in turn.

    From step ``begin`` on: ``sparse_steps`` steps on the largest weights at that time, ``dense_steps`` on all, again
    and again, each cycle with a choice of its own. Evaluation and ``finish()`` keep the largest, so end in a sparse
    phase.
    Raises: as :class:`Phases`; ValueError for begin < 0, sparse_steps < 1 or dense_steps < 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        sparse_steps: int,
        dense_steps: int,
        begin: int = 0,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, sparsity=sparsity, allocation=allocation, weights=weights)
        for name, value, least in (
            ("begin", begin, 0),
            ("sparse_steps", sparse_steps, 1),
            ("dense_steps", dense_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.sparse_steps, self.dense_steps, self.first = sparse_steps, dense_steps, begin
        self._largest = Masks({})
        self.enter()

    def sparse_at(self, step: int) -> bool:
        """In the first ``sparse_steps`` of each cycle."""
        return step >= self.first and (step - self.first) % (self.sparse_steps + self.dense_steps) < self.sparse_steps

    def prepare(self) -> None:
        """The masks of this phase, or in a dense one those that would begin the next."""
        self._largest = self.largest() if self._now is None else self._now

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ in training, the largest of θ in evaluation."""
        return theta if training else theta * own_part(self._largest.kept[name])

    @torch.no_grad()
    def masks(self) -> Masks:
        """Those of this phase, or in a dense one those that would begin the next."""
        return self._held or (self.largest() if self._now is None else self._now)
