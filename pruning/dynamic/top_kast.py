"""Top-KAST: the forward pass sees the largest weights, the backward pass trains a few more."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, erk
from pruning.dynamic.base import check_counts
from pruning.masking import Masks, check_shapes
from pruning.resuming import check_named, named
from pruning.sharding import as_wholes, gathered, own_part, sharded_as, spread_layouts
from pruning.sparsifier import select_masks
from pruning.structure import check_fraction
from pruning.weights import growable_weights, matrices


@final
class TopKAST:
    """Jayakumar et al. 2020 (arXiv:2106.03517): always sparse, forward and backward.

    The parameters keep all their values θ. A: the (1 − sparsity) largest of abs(θ), which the forward pass uses
    (inside ``parametrise()``); B ⊇ A: the (1 − backward_sparsity) largest, which the optimiser moves. Every ``every``
    steps both are chosen again, so that a weight of B \\ A that grows enters A. The exploration penalty
    penalty/2 · (Σ_A θ² + Σ_{B∖A} θ² / (1 − sparsity)) keeps those of B ∖ A from staying for their first value alone.
    Nothing grows afresh: a weight that comes back into B goes on from its value and from its optimiser state, whose
    moments have decayed meanwhile.

    >>> method = TopKAST(model, sparsity=0.9, backward_sparsity=0.8)
    >>> with method.parametrise():
    ...     loss = model(ids, labels=ids).loss
    ...     loss.backward()
    >>> method.before_step(optimizer); optimizer.step(); method.after_step(optimizer)
    >>> method.finish()    # the zeros go into the weights

    Raises: ValueError unless 0 ≤ backward_sparsity ≤ sparsity < 1, every ≥ 1 and penalty ≥ 0; for weights that are
    frozen or shared by two layers, and a sparsity that leaves a matrix empty.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        backward_sparsity: float | None = None,
        allocation: Allocation | None = None,
        every: int = 1,
        penalty: float = 1e-4,
        weights: Sequence[str] | None = None,
    ) -> None:
        check_fraction("sparsity", sparsity)
        backward = max(0.0, 1 - 2 * (1 - sparsity)) if backward_sparsity is None else backward_sparsity
        if not 0 <= backward <= sparsity:
            raise ValueError(f"backward_sparsity must be in [0, sparsity={sparsity}], got {backward}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if not penalty >= 0:
            raise ValueError(f"penalty must be >= 0, got {penalty}")
        self.model, self.sparsity, self.backward_sparsity = model, sparsity, backward
        self.every, self.penalty, self.step = every, penalty, 0
        self.allocation = erk if allocation is None else allocation
        self._weights, self._layouts = growable_weights(model, weights), spread_layouts(model)
        self._resting: dict[str, Tensor] = {}
        self._choose()
        parts = matrices(gathered(self._forward.kept))
        check_counts(parts, {name: int((~mask).sum()) for name, mask in parts.items()}, sparsity)

    @contextmanager
    def parametrise(self) -> Iterator[None]:
        """Inside, the weights outside A are 0; on leaving, all values come back. Forward and backward run inside."""
        values = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._forward.apply(self.model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in values.items():
                    self._weights[name].copy_(value)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> bool:
        """Clear the gradients outside B, add the penalty's. True: the optimiser takes every step."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                inside, allowed = own_part(self._forward.kept[name]), own_part(self._backward.kept[name])
                value = own_part(weight.data)
                pull = torch.where(inside, value, value / (1 - self.sparsity))
                own_part(weight.grad).add_(pull, alpha=self.penalty).masked_fill_(~allowed, 0)
                self._resting[name] = value[~allowed].clone()
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Weights outside B stay as they were, through decay and momentum too; A and B are chosen again if due."""
        for name, values in self._resting.items():
            own_part(self._weights[name].data)[~own_part(self._backward.kept[name])] = values
        self._resting = {}
        self.step += 1
        if self.step % self.every == 0:
            self._choose()

    def masks(self) -> Masks:
        """A: the weights of the forward pass."""
        return self._forward

    def finish(self) -> Masks:
        """Set the weights outside A to 0 for good; returns A."""
        self._forward.apply(self.model)
        return self._forward

    def state_dict(self) -> dict[str, Any]:
        """Name, sparsities, step and both sets, for a checkpoint."""
        sets = {"forward": self._forward.state_dict(), "backward": self._backward.state_dict()}
        return named(self, self._asked()) | {"step": self.step} | sets

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises: ValueError if it is another method's or of other sparsities, or its masks are not those of this model's
        weights."""
        check_named(state, self, self._asked())
        self._forward, self._backward = (self._own(state[key]) for key in ("forward", "backward"))
        self.step, self._resting = state["step"], {}

    def _asked(self) -> dict[str, float]:
        return {"sparsity": self.sparsity, "backward_sparsity": self.backward_sparsity}

    def _own(self, masks: Mapping[str, Tensor]) -> Masks:
        if masks.keys() != self._weights.keys():
            odd = sorted(masks.keys() ^ self._weights.keys())
            raise ValueError(f"masks must be those of the model's {len(self._weights)} weights, got {odd[0]!r} besides")
        views = self._views()
        check_shapes(masks, views)
        here = {name: sharded_as(mask.to(views[name].device), views[name]) for name, mask in masks.items()}
        return Masks.from_state_dict(here)

    def _views(self) -> dict[str, Tensor]:
        return as_wholes({name: weight.data for name, weight in self._weights.items()}, self._layouts)

    def _choose(self) -> None:
        scores = {name: weight.abs() for name, weight in self._views().items()}
        self._forward = select_masks(scores, sparsity=self.sparsity, allocation=self.allocation)
        wider = select_masks(scores, sparsity=self.backward_sparsity, allocation=self.allocation)
        # an allocation that saturates may order the two otherwise in one matrix
        self._backward = Masks({name: wider.kept[name] | mask for name, mask in self._forward.kept.items()})
        self._resting = {}
