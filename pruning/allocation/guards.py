"""Allocations around allocations: matrices that stay dense, and a least density against layer collapse."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from pruning.allocation.counts import Allocation, global_ranking, whole_counts
from pruning.structure import removal_count


def keep_dense(allocation: Allocation, names: Sequence[str] = (), *, first: int = 0) -> Allocation:
    """`allocation` over all but the named matrices and the `first` ones, which lose nothing; the others make up for it.

    Gale et al. 2019 (arXiv:1902.09574) keep the first layer and the output dense so (`prunable_weights` leaves the
    output head out anyway). names: of parameters, or of one expert as "name[e]". What is removed is what `allocation`
    would remove of all matrices together.
    Raises: ValueError if first < 0; where it is used, for a name without a matrix, and where the others hold too few
    weights."""
    if first < 0:
        raise ValueError(f"first must be >= 0, got {first}")

    def kept_dense(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        dense = {name for name in scores if name in names or name.partition("[")[0] in names}
        for name in names:
            if not any(name in (found, found.partition("[")[0]) for found in dense):
                raise ValueError(f"names must be matrices of the model, got {name!r} among {sorted(scores)[:5]}…")
        dense |= set(list(scores)[:first])
        rest = {name: score for name, score in scores.items() if name not in dense}
        held, total = sum(s.numel() for s in rest.values()), sum(allocation(scores, sparsity).values())
        if total and total >= held:
            raise ValueError(f"{len(dense)} dense matrices leave {held} weights, of which {total} cannot be removed")
        counts = allocation(rest, total / held) if total else {}
        return {name: counts.get(name, 0) for name in scores}

    return kept_dense


def min_density(allocation: Allocation, density: float = 0.0) -> Allocation:
    """`allocation`, but every matrix keeps at least max(1, ⌈density · n⌉) of its n weights: no layer collapses.

    Matrices that would lose more are held at that, and the others are allocated again with what is left to remove, in
    total as much as before.
    Raises: ValueError if density is outside [0, 1]; where it is used, if the matrices together cannot lose so much."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], got {density}")

    def guarded(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        limits = {name: s.numel() - min(s.numel(), max(1, math.ceil(density * s.numel() - 1e-9)))
                  for name, s in scores.items()}  # fmt: skip
        counts = allocation(scores, sparsity)
        total, held = sum(counts.values()), dict[str, int]()
        if total > sum(limits.values()):
            raise ValueError(
                f"sparsity must leave each of {len(limits)} matrices a share of {density:g} of its weights and at least"
                f" one: it lets {total} go, of which {sum(limits.values())} can"
            )
        while over := {name: limits[name] for name, count in counts.items() if count > limits[name]}:
            held |= over
            rest = {name: score for name, score in scores.items() if name not in held}
            counts = _spread(allocation, rest, total - sum(held.values()), limits)
        return {name: held.get(name, counts.get(name, 0)) for name in scores}

    return guarded


guarded_ranking = min_density(global_ranking)
"""One ranking over all matrices, in which each keeps at least its highest weight: what training with one ranking uses,
where an empty matrix would pass nothing on and get no gradient by which to come back."""


def _spread(
    allocation: Allocation, scores: Mapping[str, Tensor], total: int, limits: Mapping[str, int]
) -> dict[str, int]:
    """`total` removals from these matrices, as `allocation` shares them out."""
    sizes = {name: score.numel() for name, score in scores.items()}
    if not total or total == sum(sizes.values()):
        return dict.fromkeys(sizes, 0) if not total else sizes
    found = allocation(scores, total / sum(sizes.values()))
    return whole_counts(found, total, sizes)


def fixed_counts(counts: Mapping[str, int]) -> Allocation:
    """The counts of a search as an allocation. Raises, where it is used: ValueError for other matrices, and if the
    sparsity asks for another total."""

    def fixed(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        if counts.keys() != scores.keys():
            raise ValueError(f"counts must name the matrices {sorted(scores)[:3]}…, got {sorted(counts)[:3]}…")
        asked = removal_count(sparsity, sum(score.numel() for score in scores.values()))
        if asked != sum(counts.values()):
            raise ValueError(f"counts remove {sum(counts.values())} weights, but sparsity={sparsity} asks for {asked}")
        return dict(counts)

    return fixed
