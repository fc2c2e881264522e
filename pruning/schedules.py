"""Step → sparsity, for pruning while training. A step is the number of optimiser steps done."""

from collections.abc import Callable, Sequence

from pruning.structure import check_fraction

Schedule = Callable[[int], float]


def one_shot(sparsity: float, *, step: int = 0) -> Schedule:
    """0 before `step`, `sparsity` from then on. Raises: ValueError if sparsity is outside [0, 1)."""
    check_fraction("sparsity", sparsity)
    return lambda now: sparsity if now >= step else 0.0


def linear(sparsity: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """s_t = s_i + (s_f − s_i)·(t − t₀)/(t₁ − t₀), held for `every` steps at a time; 0 before `begin`.

    Raises: as `cubic`."""
    return _gradual(sparsity, begin, end, every, initial, lambda left: sparsity + (initial - sparsity) * left)


def cubic(sparsity: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³, held for `every` steps at a time; 0 before `begin`.

    Zhu & Gupta 2017 (arXiv:1710.01878), eq. 1; t₀ = begin, t₁ = end, s_i = initial, s_f = sparsity.
    Raises: ValueError unless 0 <= initial <= sparsity < 1, 0 <= begin < end and every >= 1."""
    return _gradual(sparsity, begin, end, every, initial, lambda left: sparsity + (initial - sparsity) * left**3)


def exponential(sparsity: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """1 − s_t = (1 − s_f)·((1 − s_i)/(1 − s_f))^(1 − (t − t₀)/(t₁ − t₀)): in equal times the same share of what is left
    goes. Held for `every` steps at a time; 0 before `begin`. Raises: as `cubic`."""
    return _gradual(
        sparsity, begin, end, every, initial, lambda left: 1 - (1 - sparsity) * ((1 - initial) / (1 - sparsity)) ** left
    )


def iterative(sparsity: float, *, begin: int, every: int, rounds: int) -> Schedule:
    """Prune–retrain: at `begin`, `begin + every`, … the same share of what is left goes, `sparsity` in `rounds` rounds.

    After round k of n: 1 − (1 − sparsity)^(k/n) (Han et al. 2015, arXiv:1506.02626; the rounds of a lottery ticket),
    with `every` steps of retraining after each. Raises: ValueError for a sparsity outside [0, 1), begin < 0, every < 1
    or rounds < 1."""
    check_fraction("sparsity", sparsity)
    for name, value, least in (("begin", begin, 0), ("every", every, 1), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")

    def schedule(step: int) -> float:
        done = min(rounds, (step - begin) // every + 1) if step >= begin else 0
        return sparsity if done == rounds else 1 - (1 - sparsity) ** (done / rounds)

    return schedule


def prunings(schedule: Schedule, *, steps: int) -> list[int]:
    """The steps in [0, steps) at which the sparsity is higher than at the step before."""
    values = [0.0, *(schedule(step) for step in range(steps))]
    return [step for step in range(steps) if values[step + 1] > values[step]]


def rewarmed(pruned: Sequence[int], *, warmup: int) -> Callable[[int], float]:
    """Step → factor on the learning rate: after each pruning at step p a linear warm-up, min(1, (t − p + 1)/warmup).

    Le & Hua 2021 (arXiv:2105.03193): a large rate, reached by a warm-up, is what retraining needs. 1 before the first.
    Raises: ValueError for warmup < 1."""
    if warmup < 1:
        raise ValueError(f"warmup must be >= 1, got {warmup}")

    def factor(step: int) -> float:
        last = _last(pruned, step)
        return 1.0 if last is None else min(1.0, (step - last + 1) / warmup)

    return factor


def rewound(pruned: Sequence[int], *, to: int = 0) -> Callable[[int], int]:
    """Step → the step whose learning rate is used: each pruning at step p winds the rate back to that of step `to`.

    t before the first pruning, then to + (t − p); never beyond t. Renda et al. 2020 (arXiv:2003.02389): learning rate
    rewinding, the weights stay. Raises: ValueError for to < 0."""
    if to < 0:
        raise ValueError(f"to must be >= 0, got {to}")

    def clock(step: int) -> int:
        last = _last(pruned, step)
        return step if last is None else min(step, to + step - last)

    return clock


def _last(pruned: Sequence[int], step: int) -> int | None:
    return max((p for p in pruned if p <= step), default=None)


def _gradual(
    sparsity: float, begin: int, end: int, every: int, initial: float, path: Callable[[float], float]
) -> Schedule:
    """path: the share of the way that is left, in (0, 1], → sparsity."""
    check_fraction("sparsity", sparsity)
    if not 0 <= initial <= sparsity:
        raise ValueError(f"initial must be in [0, sparsity={sparsity}], got {initial}")
    if not 0 <= begin < end:
        raise ValueError(f"begin must be in [0, end={end}), got {begin}")
    if every < 1:
        raise ValueError(f"every must be >= 1, got {every}")

    def schedule(step: int) -> float:
        if step < begin:
            return 0.0
        if step >= end:
            return sparsity
        return path(1 - (step - begin) // every * every / (end - begin))

    return schedule
