"""Which units stay: scores of whole axes and a number of removals → the units to keep, under grouped-query rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pruning.axes import Axis


@dataclass(frozen=True)
class Option:
    """One feasible way to shrink an axis: `groups` groups survive with `units` units each; `score` is what goes."""

    removed: int
    score: float
    groups: int
    units: int


def select_units(
    scores: Mapping[str, Tensor], axes: Sequence[Axis], *, count: int, min_units: int = 0
) -> dict[str, list[int]]:
    """Axis name → sorted units to keep, after the removal of `count` units over all axes together.

    Of all feasible removals the largest count that does not exceed `count` is taken, and among these the least total
    score. Feasible: an axis of independent units loses any of them; a grouped axis loses whole groups, and every
    surviving group the same number of units; each axis keeps at least min(min_units, size), and its own ``least``.
    Independent units are sorted (lowest score first; equal scores by position: earlier axis, then earlier unit, goes
    first). Grouped axes are solved exactly, as a knapsack over the best (groups, units) choice of each axis for each
    count; of equal totals the earlier axis loses more.
    Stacked axes lose of every group its lowest, as many from each (and `multiple` of them at a time), in the order of
    the mean score: the optimum where the axes have equally many groups. Of them min_units counts for each group.
    scores: [size] for each axis. Raises: ValueError if a score is missing, misshapen or not finite, and for stacked
    axes among others."""
    check_scores(scores, axes)
    if min_units < 0:
        raise ValueError(f"min_units must be >= 0, got {min_units}")
    if any(axis.stacked for axis in axes):
        return _stacked(scores, axes, count, min_units)
    if all(axis.groups == 1 or axis.group_size == 1 for axis in axes):
        return _lowest(scores, axes, count, min_units)
    tables = {axis.name: _table(scores[axis.name], axis) for axis in axes}
    options = [_options(tables[axis.name], _floor(axis, min_units)) for axis in axes]
    chosen = _knapsack(options, count)
    return {axis.name: _keep(tables[axis.name], option)[1] for axis, option in zip(axes, chosen, strict=True)}


def select_alike(
    scores: Mapping[str, Tensor], axes: Sequence[Axis], *, count: int, min_units: int = 0
) -> dict[str, list[int]]:
    """Axis name → sorted units to keep, after the removal of `count` units from each axis, so that all end alike.

    The axes have equally many units in equally many groups, and end with equally many groups of equally many units:
    of the shapes whose count is the largest feasible that does not exceed `count`, the one with the least total score
    over all axes. Each axis then keeps its best units of that shape. Raises: as `select_units`."""
    if all(axis.groups == 1 or axis.group_size == 1 or axis.stacked for axis in axes):
        found = [select_units(scores, [axis], count=count, min_units=min_units) for axis in axes]
        return {name: units for kept in found for name, units in kept.items()}
    check_scores(scores, axes)
    tables = [_table(scores[axis.name], axis) for axis in axes]
    least = max(_floor(axis, min_units) for axis in axes)
    shapes = list(zip(*(_shapes(table, least) for table in tables), strict=True))
    # fewer groups come first, and win on equal scores
    chosen = min((s for s in shapes if s[0].removed <= count), key=lambda s: (-s[0].removed, sum(o.score for o in s)))
    return {axis.name: _keep(table, chosen[0])[1] for axis, table in zip(axes, tables, strict=True)}


def completed(axis: Axis, units: Sequence[int]) -> list[int]:
    """`units` and the others that must stay with them for surgery to take the set: sorted.

    `axis.least` units stay, and every group that keeps one keeps as many as the fullest; the first ones fill up. Of a
    stacked axis every group keeps at least one, and a multiple of `axis.multiple`.

    >>> completed(heads, [0, 2, 3])  # four heads on two key-value heads
    [0, 1, 2, 3]"""
    stays = set(units)
    if axis.stacked:
        return _completed_stack(axis, stays)
    stays |= set([unit for unit in range(axis.size) if unit not in stays][: max(0, axis.least - len(stays))])
    rows = [range(group * axis.group_size, (group + 1) * axis.group_size) for group in range(axis.groups)]
    counts = [len(stays.intersection(row)) for row in rows]
    for row, count in zip(rows, counts, strict=True):
        if count:
            stays |= set([unit for unit in row if unit not in stays][: max(counts) - count])
    return sorted(stays)


def _completed_stack(axis: Axis, stays: set[int]) -> list[int]:
    rows = [range(group * axis.group_size, (group + 1) * axis.group_size) for group in range(axis.groups)]
    most = max(1, *(len(stays.intersection(row)) for row in rows))
    count = min(-(-most // axis.multiple) * axis.multiple, axis.group_size)
    for row in rows:
        stays = stays | set([unit for unit in row if unit not in stays][: count - len(stays.intersection(row))])
    return sorted(stays)


def check_scores(scores: Mapping[str, Tensor], axes: Sequence[Axis]) -> None:
    """Raises: ValueError unless each axis has one finite score for each of its units."""
    for axis in axes:
        if axis.name not in scores:
            raise ValueError(f"scores must name axis {axis.name!r}, got {sorted(scores)}")
        values = scores[axis.name]
        if list(values.shape) != [axis.size]:
            raise ValueError(
                f"scores of {axis.name!r} must have shape [{axis.size}], got {list(values.shape)}; "
                "score the model again after it was pruned"
            )
        if not torch.isfinite(values).all():
            raise ValueError(f"scores of {axis.name!r} must be finite, got {values.tolist()}")


def _floor(axis: Axis, min_units: int) -> int:
    return max(min(min_units, axis.size), axis.least)


def _lowest(scores: Mapping[str, Tensor], axes: Sequence[Axis], count: int, min_units: int) -> dict[str, list[int]]:
    candidates = []
    for position, axis in enumerate(axes):
        values = scores[axis.name].double().cpu()
        spare = torch.argsort(values, stable=True)[: axis.size - _floor(axis, min_units)]
        candidates += [(values[unit].item(), position, unit) for unit in spare.tolist()]
    gone = {(position, unit) for _, position, unit in sorted(candidates)[:count]}
    return {
        axis.name: [unit for unit in range(axis.size) if (position, unit) not in gone]
        for position, axis in enumerate(axes)
    }


def _stacked(scores: Mapping[str, Tensor], axes: Sequence[Axis], count: int, min_units: int) -> dict[str, list[int]]:
    for axis in axes:
        if not axis.stacked:
            raise ValueError(f"stacked axes are chosen apart from others, got {axis.name!r} among them")
    candidates = []
    for position, axis in enumerate(axes):
        ranked = np.sort(_table(scores[axis.name], axis), axis=1)
        spare = axis.group_size - max(1, min(min_units, axis.group_size), -(-axis.least // axis.groups))
        start = 0
        for end in range(axis.group_size % axis.multiple or axis.multiple, spare + 1, axis.multiple):
            candidates.append((float(ranked[:, start:end].mean()), position, start, end))
            start = end
    gone, left = [0] * len(axes), count
    for _, position, start, end in sorted(candidates):
        # one that does not fit ends its axis, whose next ones are as large
        if gone[position] == start and (end - start) * axes[position].groups <= left:
            left -= (end - start) * axes[position].groups
            gone[position] = end
    return {axis.name: _highest(scores[axis.name], axis, less) for axis, less in zip(axes, gone, strict=True)}


def _highest(scores: Tensor, axis: Axis, less: int) -> list[int]:
    order = np.argsort(_table(scores, axis), axis=1, kind="stable")[:, less:]
    return (np.sort(order, axis=1) + axis.group_size * np.arange(axis.groups)[:, None]).reshape(-1).tolist()


def _table(scores: Tensor, axis: Axis) -> np.ndarray:
    return scores.double().cpu().numpy().reshape(axis.groups, axis.group_size)


def _keep(table: np.ndarray, option: Option) -> tuple[float, list[int]]:
    """Score kept and units kept, the best for this many groups and units: top units of each group, then top groups."""
    size = table.shape[1]
    top = np.sort(np.argsort(table, axis=1, kind="stable")[:, size - option.units :], axis=1)
    sums = np.take_along_axis(table, top, axis=1).sum(axis=1)
    groups = np.sort(np.argsort(sums, kind="stable")[len(sums) - option.groups :])
    units = (top[groups] + groups[:, None] * size).reshape(-1)
    return float(sums[groups].sum()), units.tolist()


def _options(table: np.ndarray, least: int) -> list[Option]:
    """The cheapest option for each feasible number of removals, in ascending order of that number."""
    best: dict[int, Option] = {}
    for option in _shapes(table, least):
        # on equal scores fewer groups win: they free keys and values too
        if option.removed not in best or option.score < best[option.removed].score:
            best[option.removed] = option
    return [best[removed] for removed in sorted(best)]


def _shapes(table: np.ndarray, least: int) -> list[Option]:
    """Every feasible number of groups and of units in each, fewest groups first."""
    total_groups, size = table.shape
    found = []
    for groups in range(total_groups + 1):
        for units in range(1, size + 1) if groups else [0]:
            removed = table.size - groups * units
            if groups * units >= least:
                kept, _ = _keep(table, Option(removed, 0.0, groups, units))
                found.append(Option(removed, float(table.sum()) - kept, groups, units))
    return found


def _knapsack(options: Sequence[Sequence[Option]], count: int) -> list[Option]:
    """One option of each axis: the most removals that are at most `count`, at the least total score."""
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    picks = []
    for choices in options:
        total, pick = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)
        for index, option in enumerate(choices):
            if option.removed <= count:
                candidate = best[: count + 1 - option.removed] + option.score
                better = candidate < total[option.removed :]
                total[option.removed :][better] = candidate[better]
                pick[option.removed :][better] = index
        best = total
        picks.append(pick)
    left = int(np.flatnonzero(np.isfinite(best)).max())
    chosen = []
    for choices, pick in zip(reversed(options), reversed(picks), strict=True):
        chosen.append(choices[pick[left]])
        left -= chosen[-1].removed
    return chosen[::-1]
