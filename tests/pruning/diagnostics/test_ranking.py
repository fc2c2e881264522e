"""Rank correlations against plain loops over pairs, and the stability of a ranking."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.diagnostics import RankingStability, kendall_tau, layer_kind, magnitudes, ranking_stability, spearman_rho
from tests.pruning.test_transformer import build

ROWS = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-4, 4).map(float), min_size=n, max_size=n)] * 2)
)


def kendall_by_loop(one, two):
    alike = otherwise = tied_one = tied_two = 0
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    for i, j in pairs:
        product = (one[i] - one[j]) * (two[i] - two[j])
        alike, otherwise = alike + (product > 0), otherwise + (product < 0)
        tied_one, tied_two = tied_one + (one[i] == one[j]), tied_two + (two[i] == two[j])
    scale = ((len(pairs) - tied_one) * (len(pairs) - tied_two)) ** 0.5
    return (alike - otherwise) / scale if scale else 0.0


def spearman_by_loop(one, two):
    def ranks(row):
        return [sum(b < a for b in row) + (sum(b == a for b in row) + 1) / 2 for a in row]

    first, second = ranks(one), ranks(two)
    mean = (len(one) + 1) / 2
    cross = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    scale = (sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second)) ** 0.5
    return cross / scale if scale else 0.0


@given(ROWS)
def test_correlations_are_the_plain_loops(rows):
    one, two = rows
    assert kendall_tau(torch.tensor(one), torch.tensor(two)) == pytest.approx(kendall_by_loop(one, two), abs=1e-9)
    assert spearman_rho(torch.tensor(one), torch.tensor(two)) == pytest.approx(spearman_by_loop(one, two), abs=1e-9)


def test_stability_by_kind_of_layer():
    model = build("moe")
    last = magnitudes(dict(model.named_parameters()))
    noise = {name: torch.rand(w.shape, generator=torch.Generator().manual_seed(7)) for name, w in last.items()}
    middle = {n: w if n.startswith("layers") and w.ndim == 3 else noise[n] for n, w in last.items()}
    names = [n for n, w in last.items() if n.startswith("layers") and w.ndim > 1]
    snapshots = {step: {n: scores[n] for n in names} for step, scores in ((0, noise), (50, middle), (100, last))}
    found = ranking_stability(snapshots, samples=300, generator=torch.Generator().manual_seed(0))
    assert set(found.kendall) == {"attention", "expert", "dense"}
    for table in (found.kendall, found.spearman):
        assert all(values[-1] == pytest.approx(1.0) and abs(values[0]) < 0.25 for values in table.values())
        assert table["expert"][1] == pytest.approx(1.0) and abs(table["attention"][1]) < 0.25
    assert found.stable_from("expert") == 50 and found.stable_from("attention") == 100


def test_kinds_by_name():
    model = build("moe")
    kinds = {name: layer_kind(name, p) for name, p in model.named_parameters() if p.ndim > 1}
    assert kinds["layers.0.attention.query.weight"] == "attention"
    assert [name for name, kind in kinds.items() if kind == "expert"]
    assert layer_kind("layers.0.feedforward.up.weight", torch.ones(2, 2)) == "dense"


def test_bad_input():
    one = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="snapshots must be of at least 2 steps, got 1"):
        ranking_stability({0: one})
    with pytest.raises(ValueError, match="scores of step 0 must be of the names and shapes"):
        ranking_stability({0: {"b": torch.ones(3)}, 1: one})
    with pytest.raises(ValueError, match="samples must be >= 2, got 1"):
        ranking_stability({0: one, 1: one}, samples=1)


def test_a_ranking_is_stable_from_where_it_stays_not_from_where_it_first_agrees():
    found = RankingStability((0, 10, 20, 30, 40), {"dense": (0.2, 0.95, 0.6, 0.91, 1.0), "expert": (0.9,) * 5}, {})
    assert found.stable_from("dense") == 30 and found.stable_from("expert") == 0
    assert found.stable_from("dense", threshold=0.5) == 10 and found.stable_from("dense", threshold=0.92) == 40
