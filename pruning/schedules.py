"""Step → sparsity, for pruning while training. A step is the number of optimiser steps done."""

from collections.abc import Callable

from pruning.structure import check_fraction

Schedule = Callable[[int], float]


def one_shot(sparsity: float, *, step: int = 0) -> Schedule:
    """0 before `step`, `sparsity` from then on. Raises: ValueError if sparsity is outside [0, 1)."""
    check_fraction("sparsity", sparsity)
    return lambda now: sparsity if now >= step else 0.0


def linear(sparsity: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """s_t = s_i + (s_f − s_i)·(t − t₀)/(t₁ − t₀), held for `every` steps at a time; 0 before `begin`.

    Raises: as `cubic`."""
    return _gradual(sparsity, begin, end, every, initial, power=1)


def cubic(sparsity: float, *, begin: int, end: int, every: int = 1, initial: float = 0.0) -> Schedule:
    """s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))³, held for `every` steps at a time; 0 before `begin`.

    Zhu & Gupta 2017 (arXiv:1710.01878), eq. 1; t₀ = begin, t₁ = end, s_i = initial, s_f = sparsity.
    Raises: ValueError unless 0 <= initial <= sparsity < 1, 0 <= begin < end and every >= 1."""
    return _gradual(sparsity, begin, end, every, initial, power=3)


def _gradual(sparsity: float, begin: int, end: int, every: int, initial: float, *, power: int) -> Schedule:
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
        held = (step - begin) // every * every
        return sparsity + (initial - sparsity) * (1 - held / (end - begin)) ** power

    return schedule
