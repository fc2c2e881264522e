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
from pruning.retraining.zero_test import ZeroTest, count_below
from pruning.sharding import gathered, own_part, put
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction


def generalization_loss(held_out: float, best: float) -> float:
    """GL = 100 · (E_va / E_opt − 1), in per cent: how far the held-out loss is above its lowest so far.

    Prechelt 1997 (Connection pruning with static and adaptive pruning schedules). Raises: ValueError for best ≤ 0."""
    if not best > 0:
        raise ValueError(f"best must be > 0, got {best}")
    return 100 * (held_out / best - 1)


def pruning_share(loss: float, *, most: float, alpha: float, when: Literal["low", "high"]) -> float:
    """most · (1 − 1 / (1 + α GL)) where pruning fights overfitting, the λ of Prechelt's lprune ("high");
    most / (1 + α GL) where it waits for recovery, which is not his ("low"); between 0 and ``most``.

    >>> pruning_share(0.0, most=0.2, alpha=2.0, when="low"), pruning_share(0.5, most=0.2, alpha=2.0, when="high")
    (0.2, 0.1)
    """
    closed = most / (1 + alpha * max(loss, 0.0))
    return closed if when == "low" else most - closed


@final
class GeneralizationDriven(LearnedSparsity):
    """After each evaluation weights go, as many as the generalisation loss says.

    Call ``observe(held_out_loss)`` at each evaluation (the trainer does). GL(t) = 100 · (E_va / E_opt − 1), E_opt the
    lowest held-out loss so far, and λ is :func:`pruning_share` of it. What λ is a share of, ``criterion`` says:

    - "magnitude": of the weights that are left, the smallest. GL and λ(t) are Prechelt's; what goes is not.
    - "statistic": as many go as have T < λ · (mean T over all that are left), those of least T, which is Prechelt's
      lprune (1997; ``most`` = 2/3, α = 2). T is Finnoff, Hergert & Zimmermann's, of the steps since the last
      evaluation, with batches for their patterns (:class:`ZeroTest`, which says what that changes); after fewer than
      two steps nothing goes. His are the rule and its λ; ours are the evaluations at which it is asked, and the three
      bounds: none goes at λ = 0, none beyond ``sparsity``, and how many go from each matrix is ``allocation``'s
      (over all together, the default, just those below).

    when="high", Prechelt's: more the more the model overfits, and nothing while the held-out loss still falls, so that
    ``sparsity`` is a bound and may not be reached. when="low", not his: up to ``most`` while the model generalises as
    well as ever, less while it recovers. What is pruned stays pruned, up to ``sparsity``. history: (steps done, share
    of zeros from then on), at first and after each pruning.
    Raises: as :class:`LearnedSparsity`; ValueError for a sparsity outside [0, 1), most outside (0, 1), alpha < 0,
    another when or criterion, a held-out loss that is not positive, or a state gathered under the other criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        most: float = 0.2,
        alpha: float = 2.0,
        when: Literal["low", "high"] = "high",
        criterion: Literal["magnitude", "statistic"] = "magnitude",
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
        if criterion not in ("magnitude", "statistic"):
            raise ValueError(f"criterion must be 'magnitude' or 'statistic', got {criterion!r}")
        self.sparsity, self.most, self.alpha, self.when, self.begin = sparsity, most, alpha, when, begin
        self.criterion, self.allocation, self.best, self.now = criterion, allocation, float("inf"), 0.0
        self.history: list[tuple[int, float]] = [(0, 0.0)]
        self._masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in self.views().items()})
        parts = {name: own_part(weight.data) for name, weight in self._weights.items()}
        self._test = ZeroTest(parts) if criterion == "statistic" else None

    def before_step(self, optimizer: Optimizer) -> bool:
        """Take the step's gradients into the statistic, if it is asked for. True: every step is taken."""
        if self._test is not None and not self.finished:
            self._gather(self._test, optimizer)
        return super().before_step(optimizer)

    @torch.no_grad()
    def observe(self, held_out: float) -> None:
        """Take an evaluation's loss into account, and prune. Before step ``begin`` only the best is noted."""
        held_out = of_first(held_out, device=next(iter(self._weights.values())).device)
        self.best = min(self.best, held_out)
        loss = generalization_loss(held_out, self.best)
        if self.step >= self.begin and not self.finished:
            self._prune(pruning_share(loss, most=self.most, alpha=self.alpha, when=self.when))
        if self._test is not None:
            self._test.forget()

    def _prune(self, share: float) -> None:
        scores = self.wholes(self._test.statistic()) if self._test is not None else self._sizes()
        if self._test is not None:
            share = self._share_below(scores, share)
        self.now = max(self.now, min(self.sparsity, 1 - (1 - self.now) * (1 - share)))
        left = {name: score.masked_fill(~self._masks.kept[name], -torch.inf) for name, score in scores.items()}
        self._masks = select_masks(left, sparsity=self.now, allocation=self.allocation)
        self._masks.apply(self.model)
        self.history.append((self.step, self._masks.sparsity))

    def _sizes(self) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in self.views().items()}

    def _share_below(self, scores: Mapping[str, Tensor], share: float) -> float:
        """The share of what is left that has T < share · mean T, rank 0's on every rank."""
        kept = gathered(self._masks.kept)
        left = {name: score[kept[name]] for name, score in gathered(scores).items()}
        count = sum(score.numel() for score in left.values())
        below = count_below(left, share) / count if count else 0.0
        return of_first(below, device=next(iter(self._weights.values())).device)

    @torch.no_grad()
    def _gather(self, test: ZeroTest, optimizer: Optimizer) -> None:
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: own_part(weight.data) for name, weight in self._weights.items()}
        slopes = {
            name: torch.zeros_like(weights[name]) if weight.grad is None else own_part(weight.grad)
            for name, weight in self._weights.items()
        }
        moves = {name: rates.get(id(self._weights[name]), 0.0) * slope.float() for name, slope in slopes.items()}
        test.take(weights, moves)

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
        """The lowest loss (None before the first), the sparsity reached, when it was, the masks, and what the statistic
        has gathered since the last evaluation."""
        best = None if self.best == float("inf") else self.best
        history = [list(row) for row in self.history]
        state = {"best": best, "now": self.now, "history": history, "masks": self._masks.state_dict()}
        if self._test is None:
            return state
        sums = {kind: self.wholes(parts) for kind, parts in self._test.sums().items()}
        return {**state, "seen": self._test.seen, "sums": sums}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if ("sums" in state) != (self._test is not None):
            theirs = "statistic" if "sums" in state else "magnitude"
            raise ValueError(f"criterion must be that of the state, {theirs!r}, got {self.criterion!r}")
        self.best = float("inf") if state["best"] is None else state["best"]
        self.now, self._masks = state["now"], self._own(state["masks"])
        self.history = [(step, sparsity) for step, sparsity in state["history"]]
        if self._test is not None:
            self._test.seen = state["seen"]
            for kind, parts in self._test.sums().items():
                for name, whole in self.wholes(parts).items():
                    put(whole, state["sums"][kind][name].to(whole.device))
