"""Allocations by formula against loops over sorted lists, with ties, and exact totals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import erk, global_ranking, magnitude, select_masks, uniform
from pruning.allocation import fixed_counts, keep_dense, lamp_ranking, min_density
from pruning.allocation.counts import whole_counts
from pruning.saliency import lamp
from tests.tolerances import close

SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)
VALUES = st.integers(0, 3)


def scores_of(shapes, seed, *, ties=True):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, 4, (200,), generator=generator).float() if ties else torch.rand(200, generator=generator)
    parts, at = {}, 0
    for index, (rows, columns) in enumerate(shapes):
        parts[f"m{index}"] = draw[at : at + rows * columns].view(rows, columns)
        at += rows * columns
    return parts


def lamp_by_loop(values):
    """w_u² over the sum of the squares that come at or after u in ascending order, earlier positions first."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    found = [0.0] * len(values)
    for rank, i in enumerate(order):
        rest = sum(values[j] ** 2 for j in order[rank:])
        found[i] = values[i] ** 2 / rest if rest else 0.0
    return found


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_lamp_by_a_loop(values):
    weight = torch.tensor([values], dtype=torch.float32)
    close(lamp(weight)[0], torch.tensor(lamp_by_loop([abs(v) for v in values]), dtype=torch.float64))


def test_lamp_keeps_the_order_and_its_precision():
    weight = torch.cat([torch.tensor([1e4]), torch.linspace(1e-3, 2e-3, 1000)])[None]
    found = lamp(weight)[0]
    assert found.argsort().equal(weight[0].argsort()) and len(found.unique()) == 1001
    assert found.max() == 1.0
    squares = sorted(float(w) ** 2 for w in weight[0])
    expected = torch.tensor([s / sum(squares[i:]) for i, s in enumerate(squares)], dtype=torch.float64)
    close(found.sort().values[-2:], expected[-2:])


def test_lamp_takes_experts_one_by_one():
    weight = torch.randn(3, 4, 2)
    assert all(lamp(weight)[e].equal(lamp(weight[e])) for e in range(3))


@given(SHAPES, st.integers(0, 99), st.integers(0, 50))
def test_lamp_ranking_is_one_ranking_of_lamp_scores(shapes, percent, seed):
    scores = scores_of(shapes, seed)
    counts = lamp_ranking(scores, percent / 100)
    ranked = sorted(
        (value, list(scores).index(name), i)
        for name, score in scores.items()
        for i, value in enumerate(lamp_by_loop(score.flatten().tolist()))
    )
    total = percent * sum(s.numel() for s in scores.values()) // 100
    assert sum(counts.values()) == total
    # floats of equal value may differ in the last bit between the two sums
    border = ranked[total][0] if total < len(ranked) else 2.0
    if not any(abs(value - border) < 1e-9 for value, _, _ in ranked[:total]):
        assert counts == {n: sum(list(scores)[m] == n for _, m, _ in ranked[:total]) for n in scores}


def test_the_strongest_weight_of_a_matrix_outlives_all_others():
    scores = {"small": torch.full((2, 3), 1e-6), "large": torch.rand(4, 5) + 1}
    assert global_ranking(scores, 0.5) == {"small": 6, "large": 7}
    counts = lamp_ranking(scores, 0.9)
    assert counts["small"] < 6 and counts["large"] < 20
    with pytest.raises(ValueError, match="LAMP needs scores >= 0, got -1"):
        lamp_ranking({"a": -torch.ones(1, 2)}, 0.5)
    gone = {"a": torch.tensor([[-torch.inf, 1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0, 5.0]])}
    kept = select_masks(gone, sparsity=0.5, allocation=lamp_ranking).kept
    assert not kept["a"][0, 0] and sum(int(mask.sum()) for mask in kept.values()) == 3


@given(st.lists(st.tuples(st.floats(-1, 9), st.integers(0, 9)), min_size=1, max_size=6), st.data())
def test_whole_counts_are_near_and_exact(pairs, data):
    exact = {str(i): value for i, (value, _) in enumerate(pairs)}
    limits = {str(i): limit for i, (_, limit) in enumerate(pairs)}
    total = data.draw(st.integers(0, sum(limits.values())))
    counts = whole_counts(exact, total, limits)
    assert sum(counts.values()) == total and all(0 <= counts[n] <= limits[n] for n in counts)
    inside = all(0 <= exact[n] <= limits[n] for n in exact)
    if inside and abs(sum(exact.values()) - total) < 1:
        assert all(abs(counts[n] - exact[n]) <= 1 for n in exact)


def test_whole_counts_refuses_more_than_there_is():
    with pytest.raises(ValueError, match=r"total must be in \[0, 3\], got 4"):
        whole_counts({"a": 4.0}, 4, {"a": 3})


@given(SHAPES, st.integers(0, 95), st.integers(0, 30), st.sampled_from([0.0, 0.03]),
       st.sampled_from([global_ranking, erk, lamp_ranking]))  # fmt: skip
def test_no_matrix_falls_below_its_least_density(shapes, percent, seed, density, base):
    scores = scores_of(shapes, seed)
    total = percent * sum(s.numel() for s in scores.values()) // 100
    limits = {n: s.numel() - max(1, -(-round(density * 100) * s.numel() // 100)) for n, s in scores.items()}
    if total > sum(limits.values()):
        with pytest.raises(ValueError, match="matrices a share of .* lets .* go, of which .* can"):
            min_density(base, density)(scores, percent / 100)
        return
    counts = min_density(base, density)(scores, percent / 100)
    assert sum(counts.values()) == total and all(0 <= counts[n] <= limits[n] for n in scores)
    free = base(scores, percent / 100)
    if all(free[n] <= limits[n] for n in scores):
        assert counts == free


def test_a_matrix_that_would_collapse_is_held_and_the_others_pay():
    scores = {"small": torch.full((2, 5), 0.1), "a": torch.rand(10, 4) + 1, "b": torch.rand(10, 5) + 1}
    assert global_ranking(scores, 0.6)["small"] == 10
    counts = min_density(global_ranking)(scores, 0.6)
    assert counts["small"] == 9 and sum(counts.values()) == 60
    assert min_density(global_ranking, 0.5)(scores, 0.4)["small"] == 5
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got 1.5"):
        min_density(uniform, 1.5)


def test_dense_matrices_lose_nothing_and_the_total_is_kept():
    scores = {"first": torch.rand(4, 5), "b": torch.rand(6, 5), "experts[0]": torch.rand(2, 5),
              "experts[1]": torch.rand(2, 5), "last": torch.rand(6, 5)}  # fmt: skip
    for base in (global_ranking, erk):
        counts = keep_dense(base, ["experts"], first=1)(scores, 0.5)
        assert [counts[n] for n in ("first", "experts[0]", "experts[1]")] == [0, 0, 0]
        assert counts["b"] + counts["last"] == 50
    one = keep_dense(global_ranking, ["experts[1]"])(scores, 0.5)
    assert one["experts[1]"] == 0 and sum(one.values()) == 50
    assert keep_dense(uniform)(scores, 0.5) == uniform(scores, 0.5)
    assert keep_dense(uniform, first=5)(scores, 0.0) == dict.fromkeys(scores, 0)
    with pytest.raises(ValueError, match="got 'third' among"):
        keep_dense(uniform, ["third"])(scores, 0.5)
    with pytest.raises(ValueError, match="leave 30 weights, of which 50 cannot be removed"):
        keep_dense(uniform, first=4)(scores, 0.5)
    with pytest.raises(ValueError, match="first must be >= 0, got -1"):
        keep_dense(uniform, first=-1)


def test_fixed_counts():
    scores = {"a": torch.rand(2, 5), "b": torch.rand(2, 5)}
    assert fixed_counts({"a": 7, "b": 3})(scores, 0.5) == {"a": 7, "b": 3}
    with pytest.raises(ValueError, match="counts remove 10 weights, but sparsity=0.4 asks for 8"):
        fixed_counts({"a": 7, "b": 3})(scores, 0.4)
    with pytest.raises(ValueError, match="counts must name the matrices"):
        fixed_counts({"a": 7})(scores, 0.5)


def test_no_two_allocations_agree_on_a_fixture():
    torch.manual_seed(0)
    scores = {"a": magnitude(torch.randn(10, 30)), "b": magnitude(0.5 * torch.randn(20, 20)),
              "c": magnitude(torch.randn(5, 40) ** 3)}  # fmt: skip
    found = [tuple(rule(scores, 0.8).values()) for rule in (uniform, global_ranking, erk, lamp_ranking)]
    assert len(set(found)) == 4
