"""Allocations by formula: uniform, one ranking, LAMP, Erdős–Rényi; and the rounding that keeps totals exact."""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.structure import removal_count, unstructured

# (scores of each matrix, sparsity) → weights to remove from each matrix
Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """⌊sparsity · n⌋ of every matrix of n weights; scores do not matter.

    Raises: ValueError if sparsity is outside [0, 1)."""
    return {name: removal_count(sparsity, score.numel()) for name, score in scores.items()}


def global_ranking(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """One ranking over all matrices: the ⌊sparsity · N⌋ lowest of all N scores go, wherever they are.

    Of equal scores the earlier matrix and the earlier position go first. A matrix may end empty.
    Raises: ValueError if sparsity is outside [0, 1) or a score is NaN."""
    sizes = [score.numel() for score in scores.values()]
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    every = torch.cat([score.reshape(-1).to(dtype) for score in scores.values()])
    keep = unstructured(every, removal_count(sparsity, every.numel()))
    return {name: int((~part).sum()) for name, part in zip(scores, keep.split(sizes), strict=True)}


def lamp_of_magnitudes(scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """s_u² / Σ_{v ≥ u} s_v² in the ascending order of s, float64; −inf stays, and counts for nothing.

    Of equal scores the earlier position comes first. Raises: ValueError for negative and NaN scores."""
    flat = scores.reshape(-1).double()
    gone = flat == -torch.inf
    if not (flat.masked_fill(gone, 0) >= 0).all():
        raise ValueError(f"LAMP needs scores >= 0, got {flat[~gone].min().item():g}")
    values, order = flat.masked_fill(gone, 0).sort(stable=True)
    squares = values.square()
    # summed from the greatest down: the sum less a running sum from the least would cancel
    above = squares.flip(0).cumsum(0).flip(0)
    shares = torch.where(above > 0, squares / above, 0)
    return torch.empty_like(flat).scatter(0, order, shares).masked_fill(gone, -torch.inf).view(scores.shape)


def lamp_ranking(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Global ranking of the LAMP form of any scores: s² / Σ of the squares of its matrix that are not smaller.

    Lee et al. 2021 (arXiv:2010.07611), for magnitudes. The greatest score of a matrix becomes 1, above all others, so
    that no matrix goes before each has one weight left. A score of −inf (gone already) stays.
    Raises: ValueError as `global_ranking`, and for negative scores."""
    return global_ranking({name: lamp_of_magnitudes(score) for name, score in scores.items()}, sparsity)


def whole_counts(exact: Mapping[str, float], total: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers near `exact` that add up to `total`, each in [0, limit]: floors, then by largest remainders.

    Raises: ValueError if the limits together are below the total."""
    if not 0 <= total <= sum(limits.values()):
        raise ValueError(f"total must be in [0, {sum(limits.values())}], got {total}")
    counts = {name: min(max(math.floor(value), 0), limits[name]) for name, value in exact.items()}
    while sum(counts.values()) != total:
        step = 1 if sum(counts.values()) < total else -1
        free = [name for name in counts if (counts[name] < limits[name] if step > 0 else counts[name] > 0)]
        free.sort(key=lambda name: step * (counts[name] - exact[name]))
        for name in free[: abs(total - sum(counts.values()))]:
            counts[name] += step
    return counts


def erk(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Density of a matrix [out, in] in proportion to (out + in) / (out · in): small matrices stay denser.

    Erdős–Rényi (Mocanu et al. 2018, arXiv:1707.04780), which is what the kernel variant of Evci et al. 2020
    (arXiv:1911.11134) is for matrices. Σ removed = ⌊sparsity · N⌋: where the rule asks for more than all weights of a
    matrix, that matrix stays dense and the rest is solved again; what rounding leaves goes by largest remainders.
    Scores do not matter. Raises: ValueError if sparsity is outside [0, 1)."""
    sizes = {name: score.numel() for name, score in scores.items()}
    keep = sum(sizes.values()) - removal_count(sparsity, sum(sizes.values()))
    dense: set[str] = set()
    while True:
        rest = {name: float(sum(scores[name].shape)) for name in sizes if name not in dense and sizes[name]}
        left = keep - sum(sizes[name] for name in dense)
        exact = {name: left * weight / sum(rest.values()) for name, weight in rest.items()}
        full = {name for name, value in exact.items() if value > sizes[name]}
        if not full:
            break
        dense |= full
    kept = {name: math.floor(value) for name, value in exact.items()}
    order = sorted(kept, key=lambda name: -(exact[name] - kept[name]))
    for name in order[: left - sum(kept.values())]:
        kept[name] += 1
    return {name: size - (size if name in dense else kept.get(name, 0)) for name, size in sizes.items()}
