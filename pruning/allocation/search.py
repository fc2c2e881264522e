"""Ratios of the layers by search under one budget: dynamic programming over measured errors, and evolution."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.allocation.counts import Allocation, whole_counts
from pruning.allocation.sensitivity import check_levels
from pruning.structure import removal_count


def least_error(errors: Mapping[str, Tensor], sparsities: Sequence[float], *, bins: int = 10_000) -> Allocation:
    """One of `sparsities` for each matrix, with the least sum of errors among all choices that remove enough.

    errors[name][i]: what matrix `name` costs at sparsities[i], such as output errors or `loss_curves`, which add up
    where the losses of different matrices do not interact (SPDY, Frantar & Alistarh 2022, arXiv:2201.13096). A knapsack
    with one choice for each matrix, solved exactly by dynamic programming where there are at most `bins` weights; else
    removals are counted in units of ⌈N/bins⌉ weights, rounded down, so that the budget still holds. The choice removes
    at least ⌊S · N⌋; what is too much is given back where the last step of sparsity cost most for each weight.
    Raises: ValueError for bad sparsities, errors of another length or not finite, bins < 1; where it is used, for a
    matrix without errors and a total that the sparsities cannot reach."""
    check_levels(sparsities)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    for name, values in errors.items():
        if len(values) != len(sparsities) or not torch.isfinite(values).all():
            raise ValueError(f"errors of {name!r} must hold {len(sparsities)} finite numbers, got {values.tolist()}")

    def allocation(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        missing = [name for name in scores if name not in errors]
        if missing:
            raise ValueError(f"errors must name every matrix, got none for {missing[0]!r}")
        sizes = {name: score.numel() for name, score in scores.items()}
        total = removal_count(sparsity, sum(sizes.values()))
        levels = {name: [removal_count(s, size) for s in sparsities] for name, size in sizes.items()}
        unit = max(1, -(-sum(sizes.values()) // bins))
        table = {name: errors[name].double().tolist() for name in sizes}
        chosen = _knapsack(table, {n: [c // unit for c in level] for n, level in levels.items()}, -(-total // unit))
        if chosen is None:
            raise ValueError(f"sparsities up to {sparsities[-1]} must remove {total} weights in units of {unit}")
        return _given_back(chosen, levels, table, total)

    return allocation


def _knapsack(
    errors: Mapping[str, Sequence[float]], removed: Mapping[str, Sequence[int]], total: int
) -> dict[str, int] | None:
    """Index of one level for each matrix: Σ removed ≥ total at the least Σ errors; None if none reaches it."""
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    stages = []
    for name, values in errors.items():
        found, pick, source = np.full(total + 1, np.inf), np.zeros(total + 1, int), np.zeros(total + 1, int)
        for index, (error, count) in enumerate(zip(values, removed[name], strict=True)):
            origin = np.arange(total + 1) - count
            # whatever goes beyond the total counts as the total
            origin[total] = max(total - count, 0) + int(np.argmin(best[max(total - count, 0) :]))
            moved = np.where(origin >= 0, best[np.maximum(origin, 0)], np.inf) + error
            better = moved < found
            found[better], pick[better], source[better] = moved[better], index, origin[better]
        best = found
        stages.append((name, pick, source))
    if not np.isfinite(best[total]):
        return None
    chosen, left = {}, total
    for name, pick, source in reversed(stages):
        chosen[name], left = int(pick[left]), int(source[left])
    return {name: chosen[name] for name in errors}


def _given_back(
    chosen: Mapping[str, int], levels: Mapping[str, Sequence[int]], errors: Mapping[str, Sequence[float]], total: int
) -> dict[str, int]:
    """The chosen counts less what they exceed the total by, taken from the dearest last steps."""
    counts = {name: levels[name][index] for name, index in chosen.items()}
    steps = []
    for name, index in chosen.items():
        room = counts[name] - (levels[name][index - 1] if index else 0)
        saved = errors[name][index] - (errors[name][index - 1] if index else 0.0)
        steps.append((-saved / max(room, 1), name, room))
    surplus = sum(counts.values()) - total
    for _, name, room in sorted(steps) + [(0.0, name, counts[name]) for name in counts]:
        back = min(surplus, room, counts[name])
        counts[name] -= back
        surplus -= back
    return counts


@dataclass(frozen=True)
class Evolved:
    """The best counts that a search met, what they cost, and the best cost after each generation (index 0: the start).

    Use the counts as an allocation by `fixed_counts`."""

    counts: dict[str, int]
    cost: float
    history: tuple[float, ...]


def evolve(
    cost: Callable[[dict[str, int]], float],
    sizes: Mapping[str, int],
    sparsity: float,
    *,
    generator: torch.Generator,
    start: Mapping[str, int] | None = None,
    generations: int = 20,
    offspring: int = 16,
    step: float = 0.1,
    density: float = 0.0,
) -> Evolved:
    """Removal counts of each matrix, ⌊S · N⌋ in all, that make `cost(counts)` small: a (1 + λ) evolution strategy.

    An offspring moves up to `step` of a matrix' weights from the removals of one matrix to those of another, once or
    more; of the parent and its `offspring` children the best lives on, the older of equals (as EvoPress, Sieberling et
    al. 2024, arXiv:2410.14649, moves levels). The cost is whatever counts: the loss of the model pruned so. Draws on
    the CPU from `generator`. start: None is the same share of each. density: every matrix keeps max(1, ⌈density·n⌉).
    Raises: ValueError for options outside their bounds, and a start that does not remove ⌊S · N⌋."""
    _check_search(generations, offspring, step, density)
    total = removal_count(sparsity, sum(sizes.values()))
    limits = {name: size - min(size, max(1, int(np.ceil(density * size - 1e-9)))) for name, size in sizes.items()}
    if start is not None and (start.keys() != sizes.keys() or sum(start.values()) != total):
        raise ValueError(f"start must remove {total} weights of the matrices in sizes, got {sum(start.values())}")
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()} if start is None else start
    best = whole_counts(exact, total, limits)
    value = cost(dict(best))
    history = [value]
    for _ in range(generations):
        children = [_mutated(best, sizes, limits, step, generator) for _ in range(offspring)]
        costs = [cost(dict(child)) for child in children]
        least = min(range(offspring), key=lambda index: costs[index])
        if costs[least] < value:
            best, value = children[least], costs[least]
        history.append(value)
    return Evolved(best, value, tuple(history))


def _check_search(generations: int, offspring: int, step: float, density: float) -> None:
    for name, number in (("generations", generations), ("offspring", offspring)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    for name, share in (("step", step), ("density", density)):
        if not 0 <= share <= 1 or (name == "step" and share == 0):
            raise ValueError(f"{name} must be in {'(0' if name == 'step' else '[0'}, 1], got {share}")


def _mutated(
    counts: Mapping[str, int],
    sizes: Mapping[str, int],
    limits: Mapping[str, int],
    step: float,
    generator: torch.Generator,
) -> dict[str, int]:
    """Some removals moved from one matrix to another, one to three times."""
    child, names = dict(counts), list(counts)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        giver, taker = torch.randint(len(names), (2,), generator=generator).tolist()
        room = min(child[names[giver]], limits[names[taker]] - child[names[taker]])
        most = min(room, max(1, int(step * min(sizes[names[giver]], sizes[names[taker]]))))
        if giver != taker and most > 0:
            moved = int(torch.randint(1, most + 1, (), generator=generator))
            child[names[giver]] -= moved
            child[names[taker]] += moved
    return child
