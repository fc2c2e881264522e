"""Searches over ratios against every possible choice."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.allocation import equal_loss, evolve, least_error
from pruning.structure import removal_count

LEVELS = (0.0, 0.25, 0.5, 0.75)


def names(count):
    return [f"m{i}" for i in range(count)]


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 74), st.integers(0, 500))
def test_dynamic_programming_finds_the_least_sum_of_errors(sizes, percent, seed):
    generator = torch.Generator().manual_seed(seed)
    errors = {n: torch.rand(4, generator=generator, dtype=torch.float64).sort().values for n in names(len(sizes))}
    scores = {n: torch.rand(1, size) for n, size in zip(errors, sizes, strict=True)}
    total = removal_count(percent / 100, sum(sizes))
    best = None
    for choice in product(range(4), repeat=len(sizes)):
        removed = [removal_count(LEVELS[i], size) for i, size in zip(choice, sizes, strict=True)]
        if sum(removed) >= total:
            cost = sum(float(errors[n][i]) for n, i in zip(errors, choice, strict=True))
            best = min(best, (cost, removed), key=lambda pair: pair[0]) if best else (cost, removed)
    if best is None:
        with pytest.raises(ValueError, match="must remove"):
            least_error(errors, LEVELS)(scores, percent / 100)
        return
    counts = list(least_error(errors, LEVELS)(scores, percent / 100).values())
    assert sum(counts) == total
    # what exceeds the total is given back, so that no matrix loses more than the best choice takes
    assert all(count <= most for count, most in zip(counts, best[1], strict=True))


def test_many_weights_are_counted_in_units_and_the_budget_still_holds():
    errors = {"flat": torch.tensor([0.0, 1, 2, 3]), "steep": torch.tensor([0.0, 100, 200, 300])}
    scores = {"flat": torch.rand(1000, 1000), "steep": torch.rand(500, 1001)}
    counts = least_error(errors, LEVELS, bins=500)(scores, 0.4)
    assert sum(counts.values()) == removal_count(0.4, 1_500_500)
    assert counts["flat"] > 0.59 * 1_000_000 and counts["steep"] < 0.05 * 500_500


@pytest.mark.parametrize("make", [least_error, equal_loss])
def test_bad_curves(make):
    good = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    with pytest.raises(ValueError, match="sparsities must ascend, got"):
        make(good, (0.5, 0.25, 0.6, 0.7))
    with pytest.raises(ValueError, match=r"sparsities must be in \[0, 1\), got 1.0"):
        make(good, (0.0, 0.5, 0.7, 1.0))
    with pytest.raises(ValueError, match="'a' must hold 4 finite numbers"):
        make({"a": torch.tensor([0.0, 1.0, torch.nan, 3.0])}, LEVELS)
    with pytest.raises(ValueError, match="must name every matrix, got none for 'b'"):
        make(good, LEVELS)({"b": torch.rand(2, 2)}, 0.5)
    with pytest.raises(ValueError, match=r"sparsity must be at most|must remove"):
        make(good, LEVELS)({"a": torch.rand(10, 10)}, 0.9)


def test_equal_loss_gives_every_matrix_the_sparsity_of_one_common_rise():
    curves = {
        "a": torch.tensor([1.0, 2.0, 4.0]),
        "b": torch.tensor([2.0, 4.0, 8.0]),
        "c": torch.tensor([0.0, 0.0, 9.0]),
    }
    levels, scores = (0.25, 0.5, 0.75), {n: torch.rand(20, 20) for n in "abc"}
    # a rise of 2: a at 0.5, b at 0.25, c at 0.5 + 0.25·2/9
    expected = {"a": 0.5 * 400, "b": 0.25 * 400, "c": (0.5 + 0.5 / 9) * 400}
    total = sum(expected.values())
    counts = equal_loss(curves, levels)(scores, total / 1200)
    assert sum(counts.values()) == removal_count(total / 1200, 1200)
    assert all(abs(counts[n] - expected[n]) <= 1 for n in "abc")


@given(st.integers(0, 75), st.integers(0, 100))
def test_equal_loss_hits_every_total(percent, seed):
    generator = torch.Generator().manual_seed(seed)
    curves = {n: torch.randn(4, generator=generator) for n in names(3)}
    scores = {n: torch.rand(3, 7 + i) for i, n in enumerate(curves)}
    counts = equal_loss(curves, LEVELS)(scores, percent / 100)
    total = sum(score.numel() for score in scores.values())
    assert sum(counts.values()) == removal_count(percent / 100, total)
    assert all(0 <= counts[n] <= scores[n].numel() for n in counts)


def test_evolution_finds_the_minimum_of_a_known_cost():
    sizes, sparsity = {"a": 100, "b": 100, "c": 200}, 0.5
    target = {"a": 10, "b": 90, "c": 100}
    seen = []

    def cost(counts):
        seen.append(counts)
        return sum((counts[n] - target[n]) ** 2 for n in counts) / 1e4

    options = {"generations": 60, "offspring": 12}
    found = evolve(cost, sizes, sparsity, generator=torch.Generator().manual_seed(0), **options)
    assert found.cost < 0.01 < found.history[0] and len(found.history) == 61
    assert list(found.history) == sorted(found.history, reverse=True)
    assert all(sum(counts.values()) == 200 and all(0 <= counts[n] < sizes[n] for n in counts) for counts in seen)
    again = evolve(cost, sizes, sparsity, generator=torch.Generator().manual_seed(0), **options)
    assert again == found
    better = evolve(cost, sizes, sparsity, generator=torch.Generator().manual_seed(1), start=target, **options)
    assert better.cost == 0.0 and better.counts == target


@pytest.mark.parametrize("options, message", [
    ({"generations": 0}, "generations must be >= 1, got 0"),
    ({"offspring": 0}, "offspring must be >= 1, got 0"),
    ({"step": 0.0}, r"step must be in \(0, 1\], got 0.0"),
    ({"density": 1.5}, r"density must be in \[0, 1\], got 1.5"),
    ({"start": {"a": 3}}, "start must remove 5 weights .* got 3"),
])  # fmt: skip
def test_bad_searches(options, message):
    with pytest.raises(ValueError, match=message):
        evolve(lambda counts: 0.0, {"a": 10}, 0.5, generator=torch.Generator(), **options)


def test_evolution_keeps_the_least_density():
    seen = []
    evolve(lambda counts: seen.append(counts) or -counts["a"], {"a": 100, "b": 100}, 0.5, density=0.3,
           generator=torch.Generator().manual_seed(0), generations=30)  # fmt: skip
    assert max(counts["a"] for counts in seen) == 70
