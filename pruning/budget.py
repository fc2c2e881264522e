"""As much as must go to meet a budget of parameters, FLOPs or measured time, instead of a fraction."""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.model_axes import axes_of, prunable_axes
from pruning.selection import check_scores, select_units
from pruning.surgery import count_parameters, predict_parameters, shrink

Counts = dict[str, int]
Kept = dict[str, list[int]]
# bisections of a measured budget, at most
PASSES = 5


@dataclass(frozen=True)
class BudgetReport:
    """budget: "params", "flops" or "latency"; asked and achieved are shares of the dense model's.

    removed and total: units of each kind; kept: axis name → units, by their indices before. steps: how many looks at a
    removal were taken (with latency: measurements). quartiles: with latency, of the measured shares, whose median is
    `achieved`."""

    budget: str
    asked: float
    achieved: float
    removed: dict[str, int]
    total: dict[str, int]
    kept: dict[str, tuple[int, ...]]
    parameters_before: int
    parameters_after: int
    steps: int
    quartiles: tuple[float, float] | None = None

    def __str__(self) -> str:
        units = ", ".join(
            f"{count} of {self.total[kind]} {kind.replace('_', ' ')}s" for kind, count in self.removed.items()
        )
        share = self.parameters_after / self.parameters_before
        spread = "" if self.quartiles is None else "; quartiles {:.2%} and {:.2%}".format(*self.quartiles)
        return (
            f"{self.budget} {self.achieved:.2%} of the dense model's (asked {self.asked:.2%}{spread}), "
            f"without {units}; "
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} ({share:.1%})"
        )


def prune_to_budget(
    model: nn.Module,
    scores_by_kind: Mapping[str, Mapping[str, Tensor]],
    *,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    length: int = 512,
    run: Callable[[nn.Module], object] | None = None,
    rounds: int = 5,
    resolution: float = 1 / 64,
    min_units: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> BudgetReport:
    """Remove the fewest units that bring the model to one budget, a share of what it takes now, in place.

    scores_by_kind: {"head": head_importance(...), "neuron": neuron_importance(...)}; every kind loses the same share of
    its units, to the unit, the lowest scores first over all layers (`select_units`); axes keep at least min_units.
    params: parameters, tied ones once. flops: of the matrix products of a token, by the model's own
    `flops_per_token(length)`, else 2 · the elements of its Linear and Conv1D weights and of the experts that a token
    passes, k of E. Both are found by bisection over all counts, without touching a weight, and are the fewest where a
    further unit never costs more, as it does not but for heads that share keys. latency: median seconds of `run(model)`
    by the dense model's, `rounds` pairs in turns for each look, bisected to a share of `resolution`; the bisection is
    repeated until it ends twice at the same removal (5 times at most), so that one disturbed look does not decide, and
    what was found must meet the budget by the median of all looks at it. It needs memory for a second model, and on a
    GPU `run` must synchronise.

    >>> prune_to_budget(model, {"head": heads, "neuron": neurons}, params=0.7)
    >>> prune_to_budget(model, {"neuron": neurons}, latency=0.6, run=lambda m: m(ids))

    Raises: ValueError unless exactly one budget is given, in (0, 1); for latency without run; if all that may go does
    not meet it, saying how near it comes; and as `select_units`. The model has not changed then."""
    name, asked = _only({"params": params, "flops": flops, "latency": latency})
    if rounds < 1 or not 0 < resolution < 1:
        raise ValueError(f"rounds must be >= 1 and resolution in (0, 1), got {rounds} and {resolution}")
    search = _Search(_checked_axes(model, scores_by_kind), scores_by_kind, min_units)
    cost = _costs(name, model, search, length, run, rounds, clock)
    tries = search.shares(resolution) if name == "latency" else search.steps()
    found = _least(search, tries, cost, asked, name)
    before = count_parameters(model)[0]
    shrink(model, search.flat, found.kept)
    gone = {kind: sum(axis.size - len(found.kept[axis.name]) for axis in axes) for kind, axes in search.axes.items()}
    kept = {axis: tuple(units) for axis, units in found.kept.items()}
    return BudgetReport(name, asked, found.share, gone, search.sizes(), kept, before, count_parameters(model)[0],
                        found.looks, found.quartiles)  # fmt: skip


def _checked_axes(model: nn.Module, scores_by_kind: Mapping[str, Mapping[str, Tensor]]) -> dict[str, list[Axis]]:
    axes = {kind: axes_of(model, kind) for kind in scores_by_kind}
    if not axes:
        raise ValueError("scores_by_kind must name at least one kind, got none")
    for kind, scores in scores_by_kind.items():
        check_scores(scores, axes[kind])
    return axes


def _only(budgets: Mapping[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(budgets)} must be given, got {', '.join(given) or 'none'}")
    name, value = next(iter(given.items()))
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), a share of what the model takes now, got {value}")
    return name, value


@dataclass(frozen=True)
class _Search:
    """Removals in order: the k-th takes the k lowest shares of all kinds together."""

    axes: Mapping[str, Sequence[Axis]]
    scores: Mapping[str, Mapping[str, Tensor]]
    least: int

    @property
    def flat(self) -> list[Axis]:
        """All axes; whole layers last, for they renumber the others."""
        every = [axis for axes in self.axes.values() for axis in axes]
        return sorted(every, key=lambda axis: axis.kind == "layer")

    def sizes(self) -> Counts:
        return {kind: sum(axis.size for axis in axes) for kind, axes in self.axes.items()}

    def steps(self) -> list[Counts]:
        """Counts of every kind after 0, 1, 2, ... units, so that all have lost nearly the same share."""
        sizes = self.sizes()
        order = sorted((unit / size, kind) for kind, size in sizes.items() for unit in range(1, size + 1))
        counts, found = dict.fromkeys(sizes, 0), [dict.fromkeys(sizes, 0)]
        for _, kind in order:
            counts[kind] += 1
            found.append(dict(counts))
        return found

    def shares(self, resolution: float) -> list[Counts]:
        """Counts of every kind at the multiples of `resolution`."""
        steps = round(1 / resolution)
        return [{kind: size * step // steps for kind, size in self.sizes().items()} for step in range(steps + 1)]

    def kept(self, counts: Counts) -> Kept:
        found: Kept = {}
        for kind, axes in self.axes.items():
            found |= select_units(self.scores[kind], axes, count=counts[kind], min_units=self.least)
        return found


@dataclass(frozen=True)
class _Found:
    """What to keep, the share that it takes, how many looks it took, and the quartiles of measured shares."""

    kept: Kept
    share: float
    looks: int
    quartiles: tuple[float, float] | None


def _least(
    search: _Search, tries: Sequence[Counts], cost: Callable[[Kept], list[float]], asked: float, name: str
) -> _Found:
    """The first of `tries` that costs at most `asked`. Each bisection decides by its own looks, of which it takes the
    median, and what was found by the median of all looks at it: if that is too dear, a little more goes.

    Raises: ValueError, saying how near it comes, if the last of `tries` is too dear by every look of a bisection, or
    what is left in the end by the median of all looks at it."""
    seen: dict[int, tuple[Kept, list[float]]] = {}
    looks = 0

    def at(place: int) -> float:
        nonlocal looks
        if place not in seen:
            seen[place] = (search.kept(tries[place]), [])
        kept, shares = seen[place]
        if shares and name != "latency":
            return shares[0]
        now = cost(kept)
        shares += now
        looks += 1
        return statistics.median(now)

    def refused(nearest: float) -> ValueError:
        return ValueError(f"{name} must be at least {nearest:.4f}, all that may be removed, got {asked}")

    def bisected() -> int:
        low, high = 0, len(tries) - 1
        # a clock gets as many looks as there may be bisections
        if all(at(high) > asked for _ in range(PASSES if name == "latency" else 1)):
            raise refused(at(high))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if at(middle) <= asked else (middle + 1, high)
        return high

    found = bisected()
    for _ in range(PASSES - 1 if name == "latency" else 0):
        before, found = found, bisected()
        if found == before:
            break
    while statistics.median(seen[found][1]) > asked:
        if found + 1 == len(tries):
            raise refused(statistics.median(seen[found][1]))
        found += 1
        at(found)
    kept, shares = seen[found]
    spread = statistics.quantiles(shares, n=4) if len(shares) > 1 else None
    return _Found(kept, statistics.median(shares), looks, None if spread is None else (spread[0], spread[2]))


def _costs(
    name: str,
    model: nn.Module,
    search: _Search,
    length: int,
    run: Callable[[nn.Module], object] | None,
    rounds: int,
    clock: Callable[[], float],
) -> Callable[[Kept], list[float]]:
    """What is left of the budget's quantity, as a share of the dense model's, once only some units are kept: one value,
    or one for each round of a clock."""
    if name == "latency":
        if run is None:
            raise ValueError("latency is measured: run must be a function of the model, got None")
        return _latency(model, run, rounds, clock)
    return _params(model, search.flat) if name == "params" else _flops(model, length)


def _params(model: nn.Module, axes: Sequence[Axis]) -> Callable[[Kept], list[float]]:
    before = count_parameters(model)[0]
    return lambda kept: [predict_parameters(model, axes, kept)[0] / before]


def _flops(model: nn.Module, length: int) -> Callable[[Kept], list[float]]:
    hollow = _hollow(model)
    before = _model_flops(hollow, length)
    return lambda kept: [_model_flops(_smaller(hollow, kept), length) / before]


def _model_flops(model: nn.Module, length: int) -> float:
    own = getattr(model, "flops_per_token", None)
    if own is not None:
        return own(length)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    plain = sum(layer.get_parameter("weight").numel() for layer in layers)
    return 2.0 * (plain + _expert_weights(model, {id(layer.get_parameter("weight")) for layer in layers}))


def _expert_weights(model: nn.Module, counted: set[int]) -> float:
    """Elements that a token meets of the stacked experts, k of E, and of their routers."""
    weights, total = dict(model.named_parameters()), 0.0
    for axis in prunable_axes(model):
        for piece in axis.slices if axis.kind == "expert" else ():
            weight = weights[piece.parameter]
            share = axis.least / axis.size if weight.ndim > 2 else 1.0
            total += share * weight.numel() if id(weight) not in counted else 0
    return total


def _hollow(model: nn.Module) -> nn.Module:
    """The model without memory for its parameters; ties stay."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(memo))


def _smaller(model: nn.Module, kept: Kept) -> nn.Module:
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        # a try that is thrown away is not worth what shrink says of the model's config
        warnings.simplefilter("ignore")
        shrink(other, [axis for axis in prunable_axes(other) if axis.name in kept], kept)
    return other


def _latency(
    model: nn.Module, run: Callable[[nn.Module], object], rounds: int, clock: Callable[[], float]
) -> Callable[[Kept], list[float]]:
    """Of each round the shrunk model's seconds by the dense one's, after one run of each."""

    def seconds(other: nn.Module) -> float:
        start = clock()
        run(other)
        return clock() - start

    def ratios(kept: Kept) -> list[float]:
        other = _smaller(model, kept)
        with torch.no_grad():
            run(model), run(other)
            return [seconds(other) / seconds(model) for _ in range(rounds)]

    return ratios
