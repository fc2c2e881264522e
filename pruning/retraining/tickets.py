"""Tickets within one training run: prune and rewind between passes, or prune once the mask has settled."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.allocation import Allocation, uniform
from pruning.lottery import EarlyBird, Ticket, tensors_to_rewind
from pruning.mask_selection import select_masks
from pruning.masking import Masks, check_kept, check_same, clear_gradients
from pruning.resuming import check_named, named
from pruning.saliency.data_free import magnitude
from pruning.sharding import as_wholes, put, sharded_as, spread_layouts
from pruning.structure import check_fraction
from pruning.weights import growable_weights


@final
class Rewinding:
    """A lottery ticket found and trained in one run: :func:`pruning.lottery.find_ticket` as a method of a trainer.

    Steps 0 … rewind − 1 train all weights; the values that they end with, W_k, are kept. Then rounds + 1 passes of
    ``every`` steps. After pass r ≤ rounds the smallest magnitudes go, until a share (1 − sparsity)^(r/rounds) of the
    weights is left; what stays, and every other parameter and buffer, goes back to W_k, and the optimiser forgets its
    moments; where there are others (of tables with sparse gradients), call :func:`start_afresh` on each once
    ``rewound()``, as the trainer does. The last pass trains the ticket: the run takes rewind + (rounds + 1) · every
    steps, of which rewind + every train the weights that it ends with. The stream of data is not wound back. Frankle et
    al. 2020 (arXiv:1912.05671).
    Raises: ValueError for a sparsity outside [0, 1), rounds or every below 1, rewind below 0, and weights that are
    frozen or shared by two layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        every: int,
        rounds: int = 3,
        rewind: int = 0,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        check_fraction("sparsity", sparsity)
        for name, value, least in (("every", every, 1), ("rounds", rounds, 1), ("rewind", rewind, 0)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        self.model, self.sparsity, self.every, self.rounds, self.rewind = model, sparsity, every, rounds, rewind
        self.allocation, self.step = allocation, 0
        self._weights, self._layouts = growable_weights(model, weights), spread_layouts(model)
        self._masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in self._views().items()})
        self._values = {} if rewind else self._now()

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clear the gradients of pruned weights, which would count where gradients are clipped. True: step."""
        clear_gradients(self.model, self._masks.kept)
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step and hold the zeros; keep W_k when it is reached; prune and rewind at the end of a pass."""
        self.step += 1
        self._masks.apply(self.model)
        if self.step == self.rewind:
            self._values = self._now()
        if self.rewound():
            self._prune(self.share(self.step))
            Ticket(self._masks, self._values, self.rewind).apply(self.model)
            start_afresh(optimizer)

    def rewound(self) -> bool:
        """Whether the last step ended a pass, so that every parameter has gone back to W_k."""
        ended, inside = divmod(self.step - self.rewind, self.every)
        return not inside and 1 <= ended <= self.rounds

    def share(self, step: int) -> float:
        """Share of zeros after ``step`` steps: that of the rounds that have ended."""
        ended = min(self.rounds, max(0, step - self.rewind) // self.every)
        return self.sparsity if ended == self.rounds else 1 - (1 - self.sparsity) ** (ended / self.rounds)

    def masks(self) -> Masks:
        """The weights that are there in this pass."""
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        """Name, sparsity and passes, step, masks and W_k, for a checkpoint."""
        values = as_wholes(self._values, self._layouts)
        return named(self, self._asked()) | {"step": self.step, "masks": self._masks.state_dict(), "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; the masks are applied to the model at once.

        Raises: ValueError if it is another method's, of another sparsity or of other passes, or its masks are not those
        of this model's weights; then nothing has changed."""
        check_named(state, self, self._asked())
        views = self._views()
        check_same(state["masks"], views)
        kept = {name: sharded_as(mask.to(views[name].device), views[name]) for name, mask in state["masks"].items()}
        masks = Masks.from_state_dict(kept)
        masks.apply(self.model)
        self._masks, self.step, self._values = masks, state["step"], self._own_values(state["values"])

    def _asked(self) -> dict[str, float]:
        return {"sparsity": self.sparsity, "every": self.every, "rounds": self.rounds, "rewind": self.rewind}

    def _views(self) -> dict[str, Tensor]:
        return as_wholes({name: weight.data for name, weight in self._weights.items()}, self._layouts)

    def _own_values(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of W_k, which a checkpoint holds whole, the parts that this process holds of the model, as it holds them."""
        if not saved:
            return {}
        mine = {name: torch.empty_like(tensor) for name, tensor in self._now().items()}
        for name, view in as_wholes(mine, self._layouts).items():
            put(view, saved[name].to(view.device))
        return mine

    def _now(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in tensors_to_rewind(self.model).items()}

    def _prune(self, sparsity: float) -> None:
        kept = self._masks.kept
        scores = {n: magnitude(w).masked_fill(~kept[n], -torch.inf) for n, w in self._views().items()}
        self._masks = select_masks(scores, sparsity=sparsity, allocation=self.allocation)
        check_kept(self._masks.kept, sparsity)


@final
class EarlyBirdPruning:
    """Dense until the mask has settled, then pruned to it, the weights that stay going on as they are.

    Every ``every`` steps :class:`pruning.lottery.EarlyBird` draws a mask; at the first that is near each of the last
    ``window``, or at step ``end`` if none was, the smallest magnitudes go. You et al. 2020 (arXiv:1909.11957), whose
    distance is the share of all the weights in which two masks differ: under 0.1 for each of the last 5. Masks of
    density d differ in at most 2 · min(d, 1 − d) of the weights, so that above 95% sparsity all are that near, and the
    mask is taken as soon as there are window + 1. relative=True, which is not the paper's, divides by that largest
    distance, so that the threshold says the same at every sparsity.
    found: the step at which it pruned, None before. forced: whether that was ``end``, where no mask had settled: then
    it is magnitude pruning at that step, and no early bird.
    Raises: as `EarlyBird`; ValueError for every or end below 1, weights that are frozen or shared by two layers, and
    window + 1 masks, the fewest that can settle, that are not drawn by ``end``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        every: int,
        end: int,
        window: int = 5,
        threshold: float = 0.1,
        relative: bool = False,
        allocation: Allocation = uniform,
        weights: Sequence[str] | None = None,
    ) -> None:
        for name, value in (("every", every), ("end", end)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if every * (window + 1) > end:
            raise ValueError(f"every must be <= end / (window + 1) = {end // (window + 1)}, so that a mask can settle"
                             f" by end={end}, got {every}")  # fmt: skip
        self.model, self.every, self.end, self.step = model, every, end, 0
        self.bird = EarlyBird(model, sparsity=sparsity, window=window, threshold=threshold, relative=relative,
                              allocation=allocation, weights=weights)  # fmt: skip
        self.found: int | None = None
        self.forced = False
        growable_weights(model, weights)

    def before_step(self, optimizer: Optimizer) -> bool:
        """Once it pruned, clear the gradients of what went: they would count where training clips. True: step."""
        if self.found is not None:
            clear_gradients(self.model, self.bird.masks().kept)
        return True

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step; look at the mask when it is time; hold the zeros once it was found."""
        self.step += 1
        if self.found is None and (self.step % self.every == 0 or self.step == self.end):
            settled = self.bird.observe()
            self.found = self.step if settled or self.step >= self.end else None
            self.forced = self.found is not None and not settled
        if self.found is not None:
            self.bird.masks().apply(self.model)

    def masks(self) -> Masks:
        """All weights before it pruned, then those that stay."""
        if self.found is not None:
            return self.bird.masks()
        return Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in self.bird.views().items()})

    def state_dict(self) -> dict[str, Any]:
        """Name, sparsity, step, when it pruned and whether it had to, and the masks seen, for a checkpoint."""
        seen = {"step": self.step, "found": self.found, "forced": self.forced, "bird": self.bird.state_dict()}
        return named(self, self._asked()) | seen

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises: ValueError if it is another method's, of another sparsity or distance, or its masks are not those of
        this model's weights."""
        check_named(state, self, self._asked())
        for masks in state["bird"]["last"]:
            check_same(masks, self.bird.views())
        self.step, self.found, self.forced = state["step"], state["found"], state["forced"]
        self.bird.load_state_dict(state["bird"])

    def _asked(self) -> dict[str, bool | float]:
        return {"sparsity": self.bird.sparsity, "relative": self.bird.relative}


def start_afresh(optimizer: Optimizer) -> None:
    """Moments and counts of steps to 0; whole numbers, such as places of sparse moments, stay."""
    for slots in optimizer.state.values():
        for slot in slots.values():
            if isinstance(slot, Tensor) and slot.is_floating_point():
                slot.zero_()
