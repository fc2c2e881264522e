"""Allocations from measured loss curves: how much the loss rises when one matrix alone is pruned."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.allocation.counts import Allocation, whole_counts
from pruning.batches import Batch, Loss, Progress, batch_size, evaluating, model_batches, scalar_loss
from pruning.structure import check_fraction, removal_count, unstructured
from pruning.weights import matrices


@torch.no_grad()
def loss_curves(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    sparsities: Sequence[float],
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Float[Tensor, "levels"]]:
    """L(matrix alone at this sparsity) − L, mean over samples, for each matrix and each of `sparsities` (float64).

    Sensitivity analysis as in Li et al. 2017 (arXiv:1608.08710), weight by weight. scores: by parameter name, which
    weights go first; stacked experts are taken one by one, as "name[e]". One pass over `batches` for each point;
    progress wraps the matrices. Every weight is as before afterwards, errors included.
    Raises: ValueError for sparsities that are not ascending in [0, 1), unknown parameters, empty batches."""
    check_levels(sparsities)
    parameters = dict(model.named_parameters())
    missing = [name for name in scores if name not in parameters]
    if missing:
        raise ValueError(f"scores must name parameters of the model, got {missing[0]!r}")
    held = list(model_batches(model, batches))
    weights = matrices({name: parameters[name].detach() for name in scores})
    parts = list(matrices(scores).items())
    curves = {}
    with evaluating(model):
        whole = _mean_loss(model, held, loss)
        for name, score in progress(parts) if progress else parts:
            points = [_loss_without(model, held, loss, weights[name], score, s) - whole for s in sparsities]
            curves[name] = torch.tensor(points, dtype=torch.float64)
    return curves


def check_levels(sparsities: Sequence[float]) -> None:
    """Raises: ValueError unless sparsities ascend in [0, 1)."""
    for value in sparsities:
        check_fraction("sparsities", value)
    if not sparsities or any(a >= b for a, b in pairwise(sparsities)):
        raise ValueError(f"sparsities must ascend, got {list(sparsities)}")


def _loss_without(
    model: nn.Module, batches: Sequence[Batch], loss: Loss | None, weight: Tensor, score: Tensor, sparsity: float
) -> float:
    before = weight.clone()
    weight.masked_fill_(~unstructured(score, removal_count(sparsity, score.numel())), 0)
    try:
        return _mean_loss(model, batches, loss)
    finally:
        weight.copy_(before)


def _mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> float:
    return sum(scalar_loss(model, b, loss).item() for b in batches) / sum(batch_size(b) for b in batches)


def equal_loss(curves: Mapping[str, Tensor], sparsities: Sequence[float]) -> Allocation:
    """Every matrix as sparse as one common rise of the loss allows; that rise is the least that reaches the total.

    curves: from `loss_curves` at `sparsities`, made monotone (the running maximum, at least 0) and joined by straight
    lines, from (0, 0) on and to sparsity 1 at an endless rise. Exactly ⌊S · N⌋ weights go.
    Raises: ValueError for sparsities that do not ascend in [0, 1) and curves of another length; where it is used, for a
    matrix without a curve and a total beyond the last sparsity of all curves."""
    check_levels(sparsities)
    lines = {name: _line(name, curve, sparsities) for name, curve in curves.items()}

    def allocation(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        sizes = {name: score.numel() for name, score in scores.items()}
        missing = [name for name in sizes if name not in lines]
        if missing:
            raise ValueError(f"curves must name every matrix, got none for {missing[0]!r}")
        total = removal_count(sparsity, sum(sizes.values()))
        if total > sparsities[-1] * sum(sizes.values()) + 1e-6:
            raise ValueError(f"sparsity must be at most the curves' last {sparsities[-1]}, got {sparsity}")
        rises = sorted({rise for name in sizes for _, rise in lines[name]})
        low, high = rises[0], rises[-1]
        for _ in range(100):
            middle = (low + high) / 2
            enough = sum(_reach(lines[name], middle) * size for name, size in sizes.items()) >= total
            low, high = (low, middle) if enough else (middle, high)
        exact = {name: _reach(lines[name], high) * size for name, size in sizes.items()}
        # steps of the curves overshoot: what is too much goes back in proportion
        share = total / max(sum(exact.values()), 1e-30)
        return whole_counts({name: value * min(share, 1.0) for name, value in exact.items()}, total, sizes)

    return allocation


def _line(name: str, curve: Tensor, sparsities: Sequence[float]) -> list[tuple[float, float]]:
    if len(curve) != len(sparsities) or not torch.isfinite(curve).all():
        raise ValueError(f"the curve of {name!r} must hold {len(sparsities)} finite numbers, got {curve.tolist()}")
    rises = curve.double().clamp_min(0).cummax(0).values.tolist()
    points = list(zip(sparsities, rises, strict=True))
    return points if sparsities[0] == 0 else [(0.0, 0.0), *points]


def _reach(line: Sequence[tuple[float, float]], rise: float) -> float:
    """The greatest sparsity whose loss rises by at most `rise`."""
    best = 0.0
    for (s0, r0), (s1, r1) in pairwise(line):
        if r1 <= rise:
            best = s1
        elif r0 <= rise:
            best = max(best, s0 + (s1 - s0) * (rise - r0) / (r1 - r0))
    return best
