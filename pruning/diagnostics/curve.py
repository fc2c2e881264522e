"""Loss against sparsity, of a whole model and of one matrix at a time."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.allocation import global_ranking
from pruning.batches import Batch, Loss, batch_size, evaluating, model_batches, scalar_loss
from pruning.diagnostics.figure import axes_for, labelled
from pruning.lottery import TrainFn
from pruning.masking import Masks
from pruning.saliency.data_free import magnitude
from pruning.sparsifier import select_masks
from pruning.weights import prunable_weights

# (model, sparsity): prunes in place
Prune = Callable[[nn.Module, float], Masks]


@dataclass(frozen=True)
class SparsityCurve:
    """Mean loss a sample at each sparsity, on held-out text and, if it was given, on training text."""

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    dense: float
    train_losses: tuple[float, ...] | None = None

    def best(self) -> tuple[float, float]:
        """(sparsity, loss) of the lowest held-out loss, dense included as sparsity 0; of equal ones the sparser."""
        pairs = [(0.0, self.dense), *zip(self.sparsities, self.losses, strict=True)]
        return min(pairs, key=lambda pair: (pair[1], -pair[0]))

    def is_hill(self) -> bool:
        """Occam's hill (Hoefler et al. 2021, arXiv:2102.00554, §1): some sparsity is better than dense, and a higher
        one worse again."""
        sparsity, loss = self.best()
        beyond = [l for s, l in zip(self.sparsities, self.losses, strict=True) if s > sparsity]
        return loss < self.dense and any(l > loss for l in beyond)

    def plot(self, *, ax: Any = None) -> Any:
        """Loss against sparsity, the dense loss as a line; returns the axes."""
        ax = axes_for(ax)
        ax.plot(self.sparsities, self.losses, marker="o", label="held out")
        if self.train_losses is not None:
            ax.plot(self.sparsities, self.train_losses, marker="o", linestyle="--", label="training")
        ax.axhline(self.dense, color="grey", linestyle=":", label="dense, held out")
        return labelled(ax, x="sparsity", y="loss (nats)", title="loss against sparsity", legend=True)


@dataclass(frozen=True)
class Sensitivity:
    """Parameter name → mean loss a sample with this one alone pruned, at each sparsity."""

    sparsities: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    dense: float

    def ranking(self) -> list[str]:
        """Names, the most sensitive (highest loss at the highest sparsity) first."""
        last = max(range(len(self.sparsities)), key=lambda n: self.sparsities[n])
        return sorted(self.losses, key=lambda name: -self.losses[name][last])

    def plot(self, *, ax: Any = None) -> Any:
        """One line a matrix; returns the axes."""
        ax = axes_for(ax)
        for name, losses in self.losses.items():
            ax.plot(self.sparsities, losses, marker="o", label=name)
        ax.axhline(self.dense, color="grey", linestyle=":")
        return labelled(
            ax, x="sparsity of one matrix", y="loss (nats)", title="sensitivity", legend=len(self.losses) <= 8
        )


def _least(model: nn.Module, sparsity: float) -> Masks:
    scores = {name: magnitude(weight) for name, weight in prunable_weights(model).items()}
    masks = select_masks(scores, sparsity=sparsity, allocation=global_ranking)
    masks.apply(model)
    return masks


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], *, loss: Loss | None = None) -> float:
    """Σ loss(model, batch) / Σ samples, in evaluation mode; loss is a sum over samples, None the next-token loss.

    Raises: ValueError without batches or for a loss that is not one finite number."""
    total, samples = 0.0, 0
    with evaluating(model):
        for batch in model_batches(model, batches):
            total += float(scalar_loss(model, batch, loss))
            samples += batch_size(batch)
    return total / samples


def sparsity_loss_curve(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sparsities: Sequence[float],
    prune: Prune | None = None,
    train_fn: TrainFn | None = None,
    train_batches: Sequence[Batch] | None = None,
    loss: Loss | None = None,
) -> SparsityCurve:
    """The curve of ``model``, which is not changed: each point prunes a copy, retrains it if ``train_fn`` is given
    (called with first step 0, last None), and measures it.

    prune(model, sparsity) prunes in place; None takes the least magnitudes over all matrices.
    Raises: ValueError without sparsities."""
    if not sparsities:
        raise ValueError("sparsities must hold at least one value, got none")
    held, trained = [], []
    for sparsity in sparsities:
        copied = copy.deepcopy(model)
        masks = (prune or _least)(copied, sparsity)
        if train_fn is not None:
            train_fn(copied, masks, 0, None)
        held.append(mean_loss(copied, batches, loss=loss))
        if train_batches is not None:
            trained.append(mean_loss(copied, train_batches, loss=loss))
    dense = mean_loss(model, batches, loss=loss)
    return SparsityCurve(tuple(sparsities), tuple(held), dense, tuple(trained) if train_batches is not None else None)


def layer_sensitivity(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    sparsities: Sequence[float] = (0.5, 0.8, 0.95),
    saliency: Callable[[Tensor], Tensor] = magnitude,
    weights: Sequence[str] | None = None,
    loss: Loss | None = None,
) -> Sensitivity:
    """What pruning one parameter alone costs; a stack of experts counts as one, each expert losing the same share.

    The model comes back as it was, errors included. Raises: ValueError without sparsities."""
    if not sparsities:
        raise ValueError("sparsities must hold at least one value, got none")
    losses: dict[str, tuple[float, ...]] = {}
    for name, weight in prunable_weights(model, weights).items():
        found, value = [], weight.detach().clone()
        for sparsity in sparsities:
            try:
                select_masks({name: saliency(weight.detach())}, sparsity=sparsity).apply(model)
                found.append(mean_loss(model, batches, loss=loss))
            finally:
                with torch.no_grad():
                    weight.copy_(value)
        losses[name] = tuple(found)
    return Sensitivity(tuple(sparsities), losses, mean_loss(model, batches, loss=loss))
