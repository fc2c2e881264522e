"""Two ways to keep the Fisher trace low while a model trains: low samples first, and a penalty."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pruning import Masks
from pruning.diagnostics import FisherCurriculum, fisher_penalty, low_fisher_first
from pruning.saliency.products import twice_differentiable
from training.data import Batch, Batches
from transformer import Transformer


class Admitted:
    """Batches of a stream; between two steps only from samples of a pool, lowest Fisher trace first.

    The pool is ranked once, with the model as it is at step ``begin``; the lowest share ``start`` of it is open then,
    and more each step, all of it just before ``end``. lowest=False opens it in a random order: the control, with as
    few samples and as many repetitions. masks: the weights that the trace is of."""

    def __init__(
        self,
        stream: Batches,
        model: Transformer,
        pool: Int[Tensor, "n length"],
        *,
        begin: int,
        end: int,
        start: float,
        lowest: bool,
        weights: list[str],
        masks: Masks,
        seed: int,
    ) -> None:
        if not 0 <= begin < end:
            raise ValueError(f"begin must be in [0, end={end}), got {begin}")
        self.stream, self.model, self.pool, self.weights, self.masks = stream, model, pool, weights, masks
        self.begin, self.end, self.start, self.lowest = begin, end, start, lowest
        self._draw = torch.Generator().manual_seed(seed)
        self._order: FisherCurriculum | None = None
        self._step = 0

    def next(self) -> Batch:
        """The next batch: from the stream, or drawn from what the pool has open."""
        step, self._step = self._step, self._step + 1
        whole = self.stream.next()
        if not self.begin <= step < self.end:
            return whole
        if self._order is None:
            self._order = self._ranked()
        # the window's targets are its own tokens one later: one token less than a window of the stream
        open_now = self._order.admitted(step - self.begin, steps=self.end - self.begin, start=self.start)
        chosen = open_now[torch.randint(len(open_now), (len(whole.inputs),), generator=self._draw)]
        rows = self.pool[chosen]
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def _ranked(self) -> FisherCurriculum:
        count = len(self.pool)
        if not self.lowest:
            return FisherCurriculum(torch.randperm(count, generator=self._draw), torch.zeros(count, dtype=torch.double))
        return low_fisher_first(self.model, [self.pool], weights=self.weights, masks=self.masks, generator=self._draw)


class Penalised:
    """λ · :func:`pruning.diagnostics.fisher_penalty` in every ``every``-th step, on batches of a stream of its own.

    Of the weights that the masks keep. A :class:`training.moments.Sparsifier` that adds to the gradients."""

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        *,
        strength: float,
        every: int,
        weights: list[str],
        masks: Masks,
        seed: int,
    ) -> None:
        if not strength > 0:
            raise ValueError(f"strength must be > 0, got {strength}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.model, self.batches, self.strength, self.every = model, batches, strength, every
        self.weights, self.masks = weights, masks
        self._draw = torch.Generator().manual_seed(seed)
        self._step = 0

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Add the penalty's gradient."""
        if self._step % self.every == 0:
            with twice_differentiable(self.model):
                ids = self.batches.next().inputs
                value = fisher_penalty(self.model, ids, weights=self.weights, masks=self.masks, generator=self._draw)
                (self.strength * value).backward()
        self._step += 1
        return True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The step, the position in the text and the generator."""
        return {"step": self._step, "data": self.batches.state_dict(), "draw": self._draw.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        self._step = state["step"]
        self.batches.load_state_dict(state["data"])
        self._draw.set_state(state["draw"])
