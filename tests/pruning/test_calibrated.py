"""Wanda, SparseGPT, optimal brain surgeon and refits on one matrix, against slow loops and brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.calibrated import (
    DampingRaised,
    admm,
    exact_obs,
    layer_hessian,
    layerwise_obs,
    magnitude_mask,
    obs_scores,
    output_error,
    refit,
    sparsegpt,
    wanda_mask,
    wanda_scores,
)
from tests.tolerances import close


def correlated(columns, rows=200, *, seed=0):
    """Rows whose columns lean on each other and differ in scale: what the methods must tell apart."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 0.5, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) @ (mix + torch.eye(columns)) * scales


def fixture(out=5, columns=12, *, seed=0, rows=200):
    x = correlated(columns, rows, seed=seed)
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return weight, x, layer_hessian(x.mT @ x, len(x))


def error(weight, new, x):
    return ((x @ (weight - new).mT) ** 2).sum().item()


def ridge(hessian, damping):
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def loop_sparsegpt(weight, hessian, count, *, block, damping, groups=None):
    """Optimal brain surgeon in column order: the inverse of what is left of H is taken anew at every column."""
    new, rows, columns = weight.clone(), *weight.shape
    h = ridge(hessian, damping)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    gone = torch.zeros_like(weight, dtype=torch.bool)
    taken = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        quota = count * rows * stop // (rows * columns) - taken
        taken += quota
        if groups is None:
            scores = {(r, c): new[r, c].item() ** 2 / inverses[c][0, 0].item()
                      for r in range(rows) for c in range(start, stop)}  # fmt: skip
            for r, c in sorted(scores, key=lambda at: (scores[at], at))[:quota]:
                gone[r, c] = True
        for c in range(start, stop):
            if groups is not None and c % groups[1] == 0:
                for r in range(rows):
                    inside = sorted(range(c, c + groups[1]), key=lambda q: (new[r, q] ** 2 / inverses[q][0, 0]).item())
                    gone[r, inside[: groups[1] - groups[0]]] = True
            for r in range(rows):
                if gone[r, c]:
                    new[r, c:] -= new[r, c] / inverses[c][0, 0] * inverses[c][:, 0]
                    new[r, c] = 0
    return new, ~gone


@pytest.mark.parametrize("out, columns, count, block", [
    (5, 12, 30, 4), (3, 7, 0, 3), (4, 9, 35, 128), (1, 1, 0, 1),
    (3, 45, 70, 40), (2, 37, 30, 128), (2, 33, 40, 17),  # blocks wider than the columns that a sweep passes on together
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparsegpt_is_column_by_column_surgery(out, columns, count, block, dtype):
    weight, _, hessian = fixture(out, columns)
    new, kept = sparsegpt(weight.to(dtype), hessian.to(dtype), count, block=block, damping=0.02)
    expected, survivors = loop_sparsegpt(weight, hessian, count, block=block, damping=0.02)
    assert kept.equal(survivors) and int((~kept).sum()) == count
    close(new, expected, dtype)
    assert (new[~kept] == 0).all()


@pytest.mark.parametrize("out, columns, count, block", [(5, 12, 30, 4), (3, 7, 8, 128), (4, 12, 0, 4), (2, 8, 16, 3)])
def test_columns_by_descending_diagonal_are_those_of_permuted_inputs(out, columns, count, block):
    weight, x, hessian = fixture(out, columns)
    # a linear layer of permuted inputs, pruned from left to right by the loops
    order = sorted(range(columns), key=lambda j: -float(x[:, j].square().sum()))
    assert order != list(range(columns))
    permuted = x[:, order]
    expected, survivors = loop_sparsegpt(weight[:, order], layer_hessian(permuted.mT @ permuted, len(x)), count,
                                         block=block, damping=0.02)  # fmt: skip
    new, kept = sparsegpt(weight, hessian, count, block=block, damping=0.02, order="diag")
    assert kept[:, order].equal(survivors) and int((~kept).sum()) == count
    close(new[:, order], expected)
    if (columns, block) == (12, 4) and count:
        assert not sparsegpt(weight, hessian, count, block=block, damping=0.02)[1].equal(kept)
    # inputs in that order already: nothing changes
    again = sparsegpt(weight[:, order], hessian[order][:, order], count, block=block, damping=0.02, order="diag")
    close(again[0], expected)


def test_orders_that_do_not_go():
    weight, _, hessian = fixture()
    with pytest.raises(ValueError, match="order must be None or 'diag', got 'diagonal'"):
        sparsegpt(weight, hessian, 10, order="diagonal")
    with pytest.raises(ValueError, match="takes apart the columns of n:m groups: structure must be None, got 2:4"):
        sparsegpt(weight, hessian, 30, order="diag", groups=(2, 4))


@pytest.mark.parametrize("groups", [(2, 4), (1, 3), (3, 4)])
def test_sparsegpt_chooses_each_group_when_its_columns_come(groups):
    weight, _, hessian = fixture(6, 24)
    count = 6 * 24 // groups[1] * (groups[1] - groups[0])
    new, kept = sparsegpt(weight, hessian, count, groups=groups, block=12, damping=0.01)
    expected, survivors = loop_sparsegpt(weight, hessian, count, block=12, damping=0.01, groups=groups)
    assert kept.equal(survivors) and (kept.unflatten(1, (-1, groups[1])).sum(-1) == groups[0]).all()
    close(new, expected)


def test_arguments_stay_as_they_are_however_they_are_stored():
    weight, _, hessian = fixture(6, 24)
    for solve in (sparsegpt, layerwise_obs, admm):
        turned, gram = weight.mT.contiguous().mT, hessian.clone()
        new, kept = solve(turned, gram, 60)
        assert turned.equal(weight) and gram.equal(hessian)
        expected, survivors = solve(weight, hessian, 60)
        close(new, expected)
        assert kept.equal(survivors)


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [5.0, 1.0, 0.5, -0.5]])
    squares = torch.tensor([16.0, 0.25, 1.0, 4.0])
    assert wanda_scores(weight, squares).tolist() == [[4, 2, 2, 6], [20, 0.5, 0.5, 1]]
    # row by row, the earlier of equal ones first; magnitude would take the 0.5s and a 1
    assert wanda_mask(weight, squares, 4).int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]
    assert wanda_mask(weight, squares, 3).int().tolist() == [[1, 0, 1, 1], [1, 0, 0, 1]]
    assert wanda_mask(weight, squares, 4, groups=(1, 2)).int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1]]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=25)
def test_counts_are_exact_where_everything_ties(out, columns, percent, dead):
    weight = torch.ones(out, columns, dtype=torch.float64)
    hessian = torch.eye(columns, dtype=torch.float64)
    hessian.diagonal()[:dead] = 0
    count = percent * weight.numel() // 100
    made = [sparsegpt(weight, hessian, count, block=4)[1], layerwise_obs(weight, hessian, count)[1],
            exact_obs(weight, hessian, count)[1], wanda_mask(weight, hessian.diagonal(), count),
            magnitude_mask(weight, count)]  # fmt: skip
    assert [int((~kept).sum()) for kept in made] == [count] * 5
    lost = (~made[3]).sum(1)
    assert lost.max() - lost.min() <= 1


def brute_force_removals(weight, x, damping, kept):
    """Every single removal, its row refitted by least squares on the rows themselves: the cheapest one."""
    rows, columns = weight.shape
    pull = (damping * (2 * x.square().sum(0) / len(x)).mean() * len(x) / 2).sqrt()
    design = torch.cat([x, pull * torch.eye(columns, dtype=x.dtype)])
    best = None
    for r, c in itertools.product(range(rows), range(columns)):
        if not kept[r, c]:
            continue
        left = kept[r].clone()
        left[c] = False
        target = design @ weight[r]
        solved = torch.zeros(columns, dtype=x.dtype)
        solved[left] = torch.linalg.lstsq(design[:, left], target[:, None]).solution.squeeze(1)
        before = torch.zeros(columns, dtype=x.dtype)
        before[kept[r]] = torch.linalg.lstsq(design[:, kept[r]], target[:, None]).solution.squeeze(1)
        cost = ((design @ solved - target) ** 2).sum() - ((design @ before - target) ** 2).sum()
        if best is None or cost < best[0]:
            best = (cost, r, c, solved)
    return best


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_exact_obs_takes_at_each_step_the_removal_that_brute_force_takes(damping):
    weight, x, hessian = fixture(3, 5, rows=40)
    kept, current = torch.ones_like(weight, dtype=torch.bool), weight.clone()
    for count in range(1, 13):
        _, r, c, solved = brute_force_removals(weight, x, damping, kept)
        kept[r, c] = False
        current[r] = solved
        new, survivors = exact_obs(weight, hessian, count, damping=damping)
        assert survivors.equal(kept)
        close(new, current)


def test_obs_scores_are_the_rise_of_the_error_under_the_best_single_removal():
    weight, x, hessian = fixture(2, 6, rows=50)
    scores = obs_scores(weight, hessian, damping=0.0)
    for r, c in itertools.product(range(2), range(6)):
        left = torch.arange(6) != c
        solved = torch.linalg.lstsq(x[:, left], (x @ weight[r])[:, None])
        residual = x[:, left] @ solved.solution.squeeze(1) - x @ weight[r]
        close(scores[r, c], residual.square().mean())


def test_refit_is_least_squares_on_the_rows_themselves():
    weight, x, hessian = fixture(7, 9)
    kept = torch.rand(7, 9, generator=torch.Generator().manual_seed(3)) > 0.5
    kept[2], kept[3] = True, False
    new = refit(weight, kept, hessian, damping=0.0)
    for r in range(7):
        expected = torch.zeros(9, dtype=x.dtype)
        if kept[r].any():
            goal = (x @ weight[r])[:, None]
            expected[kept[r]] = torch.linalg.lstsq(x[:, kept[r]], goal).solution.squeeze(1)
        close(new[r], expected)
    assert new[2].equal(weight[2])


def test_layerwise_obs_ranks_once_and_refits():
    weight, _, hessian = fixture(4, 8)
    inverse = torch.linalg.inv(ridge(hessian, 0.05))
    scores = {(r, c): (weight[r, c] ** 2 / (2 * inverse[c, c])).item() for r in range(4) for c in range(8)}
    lost = sorted(scores, key=scores.__getitem__)[:15]
    new, kept = layerwise_obs(weight, hessian, 15, damping=0.05)
    assert sorted(map(tuple, (~kept).nonzero().tolist())) == sorted(lost)
    close(new, refit(weight, kept, hessian, damping=0.05))


def test_every_method_chooses_otherwise_and_the_errors_fall_in_their_order():
    weight, x, hessian = fixture(24, 32, rows=400)
    count = weight.numel() // 2
    made = {
        "magnitude": (kept := magnitude_mask(weight, count), weight * kept)[::-1],
        "wanda": (kept := wanda_mask(weight, hessian.diagonal(), count), weight * kept)[::-1],
        "sparsegpt": sparsegpt(weight, hessian, count, block=8),
        "obs": layerwise_obs(weight, hessian, count),
        "exact_obs": exact_obs(weight, hessian, count),
    }
    masks = [kept for _, kept in made.values()]
    assert all(int((~kept).sum()) == count for kept in masks)
    assert not any(a.equal(b) for a, b in itertools.combinations(masks, 2))
    errors = {name: error(weight, new, x) for name, (new, _) in made.items()}
    assert errors["exact_obs"] < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    assert errors["obs"] < errors["wanda"]
    close(torch.tensor(output_error(weight, made["wanda"][0], hessian)),
          torch.tensor(errors["wanda"] / (x @ weight.mT).square().sum().item()))  # fmt: skip
    again, kept = made["sparsegpt"]
    assert error(weight, refit(weight, kept, hessian, damping=0.0), x) < error(weight, again, x)


def test_zeros_stay_and_dead_inputs_go_first():
    weight, x, _ = fixture(4, 10)
    x[:, 3] = 0
    hessian = layer_hessian(x.mT @ x, len(x))
    weight[0, :6] = 0
    for method in (sparsegpt, layerwise_obs, exact_obs):
        options = {"block": 5} if method is sparsegpt else {}
        new, kept = method(weight, hessian, 15, **options)
        assert int((~kept).sum()) == 15 and not kept[0, :6].any() and not kept[:, 3].any(), method
        assert (new[~kept] == 0).all() and torch.isfinite(new).all()
        assert (weight == 0).sum() == 6, "the given weight is as it was"
        new, kept = method(weight, hessian, 2, **options)
        assert new.equal(weight) and kept.equal(weight != 0), "zeros outnumber the count"
    kept = wanda_mask(weight, hessian.diagonal(), 20)
    assert not kept[0, :6].any() and not kept[:, 3].any()


def test_a_hessian_that_is_not_positive_definite_is_refused_with_the_dampings_tried():
    hessian = torch.tensor([[1.0, 40.0], [40.0, 1.0]])
    with pytest.raises(ValueError, match=r"positive definite.* damping 0.001, 0.01, 0.1 of its mean .* larger damp"):
        sparsegpt(torch.ones(1, 2), hessian, 1, damping=0.001)
    # a second copy of one input: singular without damping, and tried again with it
    twin = torch.ones(2, 2)
    with pytest.warns(DampingRaised, match="not positive definite with damping 0 .* 0.01 was taken"):
        new, kept = sparsegpt(torch.ones(1, 2), twin, 1, damping=0.0)
    assert kept.tolist() == [[False, True]]
    close(new, torch.tensor([[0.0, 1 + 1 / 1.01]]))
    with pytest.warns(DampingRaised):
        refitted = refit(torch.ones(1, 2), kept, twin, damping=0.0)
    close(refitted, torch.tensor([[0.0, 1 + 1 / 1.01]]))


def test_wanda_counts_a_zero_weight_before_that_of_a_dead_input():
    kept = wanda_mask(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), 1)
    assert kept.tolist() == [[True, False]]


def test_bad_values_are_refused():
    weight, _, hessian = fixture(2, 4)
    with pytest.raises(ValueError, match="multiple of m=4 in 2:4, got 6"):
        sparsegpt(weight, hessian, 4, groups=(2, 4), block=6)
    with pytest.raises(ValueError, match=r"damping must be in \[0, inf\), got -1"):
        sparsegpt(weight, hessian, 4, damping=-1.0)
    with pytest.raises(ValueError, match=r"out·in² <= 67108864, got 4096·4096²; use 'obs'"):
        exact_obs(torch.empty(4096, 4096, device="meta"), torch.empty(4096, 4096, device="meta"), 3)
    with pytest.raises(ValueError, match="rows must be >= 1, got 0"):
        layer_hessian(hessian, 0)
    with pytest.raises(ValueError, match="must be finite"):
        layer_hessian(hessian * torch.inf, 3)
    with pytest.raises(ValueError, match="must be finite"):
        wanda_mask(weight, torch.full((4,), torch.nan, dtype=torch.float64), 3)


def test_groups_in_blocks_wider_than_what_a_sweep_passes_on_together():
    weight, _, hessian = fixture(3, 40)
    new, kept = sparsegpt(weight, hessian, 60, block=40, groups=(2, 4), damping=0.02)
    expected, survivors = loop_sparsegpt(weight, hessian, 60, block=40, groups=(2, 4), damping=0.02)
    assert kept.equal(survivors)
    close(new, expected)
