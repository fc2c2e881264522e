"""Methods whose forward pass sees the weights of highest score, chosen again every so many steps."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, uniform
from pruning.learned.base import LearnedSparsity
from pruning.masking import Masks
from pruning.schedules import Schedule
from pruning.sparsifier import select_masks
from pruning.weights import check_unshared


class ChosenMasks(LearnedSparsity):
    """The mask is chosen by ``scores()`` at sparsity ``schedule(step)``, before the first step and every ``every``.

    Counts are those of ``allocation``, exact under ties. Nothing is pruned for good before ``finish()``.
    Raises: as :class:`pruning.learned.base.LearnedSparsity`; ValueError for every < 1 or a schedule outside [0, 1).
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
        super().__init__(model, gate_lr=gate_lr, weights=weights)
        check_unshared(model, self._weights)
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.schedule, self.allocation, self.every = schedule, allocation, every
        self._chosen = Masks({})

    @abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """A score for each weight, the higher the longer it stays."""

    def choose(self) -> None:
        """Take the highest scores at the present step's sparsity."""
        self._chosen = select_masks(self.scores(), sparsity=self.schedule(self.step), allocation=self.allocation)

    def settle(self, optimizer: Optimizer) -> None:
        """Choose again if it is time."""
        if self.step % self.every == 0:
            self.choose()

    def masks(self) -> Masks:
        """Those of the forward pass; once finished, those that are held."""
        return self._held or self._chosen

    def extra_state(self) -> dict[str, Any]:
        """The masks, which may be some steps old."""
        return dict(self._chosen.state_dict())

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take the masks back. Raises: ValueError if they are not those of this model's weights."""
        self._chosen = self._own(state)
