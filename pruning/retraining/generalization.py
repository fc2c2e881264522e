"""Pruning that follows the generalisation loss on held-out data."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.agreement import of_first
from pruning.allocation import Allocation, guarded_ranking
from pruning.learned.base import LearnedSparsity
from pruning.masking import Masks
from pruning.sharding import own_part
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction


def generalization_loss(held_out: float, best: float) -> float:
    """GL = 100 · (E_va / E_opt − 1), in per cent: how far the held-out loss is above its lowest so far.

    Prechelt 1997 (Connection pruning with static and adaptive pruning schedules). Raises: ValueError for best ≤ 0."""
    if not best > 0:
        raise ValueError(f"best must be > 0, got {best}")
    return 100 * (held_out / best - 1)


def pruning_share(loss: float, *, most: float, alpha: float, when: Literal["low", "high"]) -> float:
    """most · (1 − 1 / (1 + α GL)) where pruning fights overfitting, as Prechelt's lprune does ("high");
    most / (1 + α GL) where it waits for recovery, which is not his ("low"); between 0 and ``most``.

    >>> pruning_share(0.0, most=0.2, alpha=2.0, when="low"), pruning_share(0.5, most=0.2, alpha=2.0, when="high")
    (0.2, 0.1)
    """
    closed = most / (1 + alpha * max(loss, 0.0))
    return closed if when == "low" else most - closed


@final
class GeneralizationDriven(LearnedSparsity):
    """After each evaluation a share of the remaining weights goes, the smallest, as the generalisation loss says.

    Call ``observe(held_out_loss)`` at each evaluation (the trainer does). GL(t) = 100 · (E_va / E_opt − 1), E_opt the
    lowest held-out loss so far, and the share is :func:`pruning_share`: with ``when="high"`` Prechelt's, more the more
    the model overfits (α = 2; his ``most`` is 2/3 of the mean importance, here a share of weights), and nothing while
    the held-out loss still falls, so that ``sparsity`` is a bound and may not be reached; with ``when="low"`` up to
    ``most`` while the model generalises as well as ever, less while it recovers. What is pruned stays pruned, up to
    ``sparsity``; weights are compared as ``allocation`` counts them. history: (steps done, share of zeros from then
    on), at first and after each pruning.
    Raises: as :class:`LearnedSparsity`; ValueError for a sparsity outside [0, 1), most outside (0, 1), alpha < 0,
    another when, or a held-out loss that is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        most: float = 0.2,
        alpha: float = 2.0,
        when: Literal["low", "high"] = "high",
        begin: int = 0,
        allocation: Allocation = guarded_ranking,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, weights=weights)
        check_fraction("sparsity", sparsity)
        if not 0 < most < 1:
            raise ValueError(f"most must be in (0, 1), got {most}")
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if when not in ("low", "high"):
            raise ValueError(f"when must be 'low' or 'high', got {when!r}")
        self.sparsity, self.most, self.alpha, self.when, self.begin = sparsity, most, alpha, when, begin
        self.allocation, self.best, self.now = allocation, float("inf"), 0.0
        self.history: list[tuple[int, float]] = [(0, 0.0)]
        self._masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in self.views().items()})

    @torch.no_grad()
    def observe(self, held_out: float) -> None:
        """Take an evaluation's loss into account, and prune. Before step ``begin`` only the best is noted."""
        held_out = of_first(held_out, device=next(iter(self._weights.values())).device)
        self.best = min(self.best, held_out)
        loss = generalization_loss(held_out, self.best)
        if self.step < self.begin or self.finished:
            return
        share = pruning_share(loss, most=self.most, alpha=self.alpha, when=self.when)
        self.now = max(self.now, min(self.sparsity, 1 - (1 - self.now) * (1 - share)))
        scores = {name: weight.abs().masked_fill(~self._masks.kept[name], -torch.inf)
                  for name, weight in self.views().items()}  # fmt: skip
        self._masks = select_masks(scores, sparsity=self.now, allocation=self.allocation)
        self._masks.apply(self.model)
        self.history.append((self.step, self._masks.sparsity))

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ, which has its zeros."""
        return theta * own_part(self._masks.kept[name])

    def settle(self, optimizer: Optimizer) -> None:
        """Hold the zeros."""
        self._masks.apply(self.model)

    def masks(self) -> Masks:
        """What stays."""
        return self._held or self._masks

    def extra_state(self) -> dict[str, Any]:
        """The lowest loss (None before the first), the sparsity reached, when it was, and the masks."""
        best = None if self.best == float("inf") else self.best
        history = [list(row) for row in self.history]
        return {"best": best, "now": self.now, "history": history, "masks": self._masks.state_dict()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.best = float("inf") if state["best"] is None else state["best"]
        self.now, self._masks = state["now"], self._own(state["masks"])
        self.history = [(step, sparsity) for step, sparsity in state["history"]]
