"""Learning–compression: train towards the nearest sparse weights, and pull ever harder."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, guarded_ranking
from pruning.learned.base import LearnedSparsity
from pruning.sharding import gathered, own_part, put
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction
from pruning.weights import check_unshared


@final
class LearningCompression(LearnedSparsity):
    """min L(w) subject to w = c, ‖c‖₀ ≤ κ, by alternation (Carreira-Perpiñán & Idelbayev 2018, CVPR, algorithm 1).

    L step: ``every`` optimiser steps on L(w) + μ/2 ‖w − c − λ/μ‖². C step: c = top-κ(w − λ/μ); then λ ← λ − μ (w − c)
    with ``multipliers`` (augmented Lagrangian; without them λ = 0, the quadratic penalty) and μ ← growth · μ. κ is
    counted by ``allocation``, over all matrices together as in the paper, each of which keeps at least one. Evaluation
    and ``finish()`` take c of the present w. Raises: as :class:`LearnedSparsity`; ValueError for mu ≤ 0, growth < 1,
    every < 1 or a sparsity outside [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        mu: float = 1e-3,
        growth: float = 1.1,
        every: int = 50,
        multipliers: bool = True,
        allocation: Allocation = guarded_ranking,
        weights: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, weights=weights)
        check_unshared(model, self._weights)
        check_fraction("sparsity", sparsity)
        if not mu > 0:
            raise ValueError(f"mu must be > 0, got {mu}")
        for name, value in (("growth", growth), ("every", every)):
            if not value >= 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.sparsity, self.mu, self.growth, self.every = sparsity, mu, growth, every
        self.multipliers, self.allocation = multipliers, allocation
        self._lambda = {name: torch.zeros_like(own_part(weight.data)) for name, weight in self._weights.items()}
        self._compressed = self._c_step()
        self._evaluated: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """The C step of the present weights."""
        self._evaluated = self._c_step(shifted=False)

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """w in training, c in evaluation."""
        return theta if training else self._evaluated[name]

    def loss(self) -> Tensor:
        """μ/2 ‖w − c − λ/μ‖²."""
        gaps = [(self.part(name) - compressed - self._lambda[name] / self.mu).square().sum()
                for name, compressed in self._compressed.items()]  # fmt: skip
        return self.mu / 2 * torch.stack(gaps).sum()

    def settle(self, optimizer: Optimizer) -> None:
        """The C step, the multipliers' and the penalty's, if it is time."""
        if self.step % self.every:
            return
        self._compressed = self._c_step()
        if self.multipliers:
            for name, weight in self._weights.items():
                self._lambda[name].sub_(self.mu * (own_part(weight.data) - self._compressed[name]))
        self.mu *= self.growth

    def gap(self) -> float:
        """‖w − c‖ / ‖w‖ over all weights: how far the constraint is from being met."""
        values, compressed = gathered(self.views()), gathered(self.wholes(self._compressed))
        off = sum(float((w - compressed[n]).square().sum()) for n, w in values.items())
        whole = sum(float(w.square().sum()) for w in values.values())
        return (off / whole) ** 0.5 if whole else 0.0

    def extra_state(self) -> dict[str, Any]:
        """μ, the compressed weights and the multipliers."""
        return {"mu": self.mu, "compressed": self.wholes(self._compressed), "multipliers": self.wholes(self._lambda)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.mu = state["mu"]
        for own, saved in ((self._compressed, state["compressed"]), (self._lambda, state["multipliers"])):
            for name, tensor in self.wholes(own).items():
                put(tensor, saved[name])

    @torch.no_grad()
    def _c_step(self, *, shifted: bool = True) -> dict[str, Tensor]:
        values = {name: own_part(weight.data).clone() for name, weight in self._weights.items()}
        if shifted:
            values = {name: value - self._lambda[name] / self.mu for name, value in values.items()}
        scores = self.wholes({name: value.abs() for name, value in values.items()})
        masks = select_masks(scores, sparsity=self.sparsity, allocation=self.allocation)
        return {name: value * own_part(masks.kept[name]) for name, value in values.items()}
