"""n:m groups solved in turn: each step against all masks and least squares, the error as it falls, what stays put."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.calibrated import group_descent, output_error, sparsegpt
from tests.pruning.test_calibrated import fixture
from tests.tolerances import close


def quadratic(change, system):
    return sum((row @ system @ row).item() for row in change)


def loop_descent(weight, new, system, groups, sweeps):
    """Every mask of every group of every row, its values by least squares on the whole row's error."""
    n, m = groups
    new, kept = new.clone(), torch.zeros_like(weight, dtype=torch.bool)
    root = torch.linalg.cholesky(system).mT
    for _ in range(sweeps):
        for row in range(len(weight)):
            for start in range(0, weight.shape[1], m):
                best = None
                for chosen in combinations(range(start, start + m), n):
                    left = [index for index in chosen if weight[row, index] != 0]
                    rest = new[row].clone()
                    rest[start : start + m] = 0
                    target = root @ (weight[row] - rest)
                    if left:
                        rest[left] = torch.linalg.lstsq(root[:, left], target[:, None]).solution.squeeze(1)
                    cost = ((root @ (weight[row] - rest)) ** 2).sum().item()
                    if best is None or cost < best[0] - 1e-12:
                        best = (cost, rest, left)
                new[row] = best[1]
                kept[row, start : start + m] = False
                kept[row, best[2]] = True
    return new, kept


@pytest.mark.parametrize(
    ("out", "columns", "groups"), [(4, 12, (2, 4)), (3, 9, (1, 3)), (2, 16, (3, 8)), (3, 72, (2, 4))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_group_takes_the_best_of_its_masks(out, columns, groups, dtype):
    weight, _, hessian = fixture(out, columns)
    if columns == 12:
        weight[0, 1:4] = weight[1, 5] = 0
    start = sparsegpt(weight, hessian, 0, groups=groups, block=groups[1])[0]
    new, kept = group_descent(weight.to(dtype), start.to(dtype), hessian.to(dtype), groups, damping=0.02, sweeps=2)
    ridged = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    expected, survivors = loop_descent(weight, start, ridged, groups, 2)
    assert kept.equal(survivors) and (new[~kept] == 0).all() and (new[weight == 0] == 0).all()
    close(new, expected, dtype)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2)]), st.integers(0, 9))
def test_the_error_never_rises_and_every_group_keeps_n(out, parts, groups, seed):
    n, m = groups
    weight, _, hessian = fixture(out, parts * m, seed=seed)
    ridged = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(parts * m, dtype=torch.float64)
    new = sparsegpt(weight, hessian, 0, groups=groups, block=m)[0]
    before = quadratic(weight - new, ridged)
    for _ in range(3):
        new, kept = group_descent(weight, new, hessian, groups, sweeps=1)
        assert (kept.unflatten(1, (-1, m)).sum(-1) == n).all()
        after = quadratic(weight - new, ridged)
        assert after <= before * (1 + 1e-9) + 1e-12
        before = after


def test_it_errs_far_less_than_sparsegpt():
    weight, _, hessian = fixture(40, 48, rows=400)
    swept = sparsegpt(weight, hessian, 0, groups=(2, 4))[0]
    new, _ = group_descent(weight, swept, hessian, (2, 4))
    assert output_error(weight, new, hessian) < 0.8 * output_error(weight, swept, hessian)


def test_what_loses_nothing_keeps_its_bits_and_dead_inputs_have_no_worth():
    weight, _, hessian = fixture(3, 8)
    weight[1, 0:2] = weight[1, 6:8] = 0
    hessian[2] = hessian[:, 2] = 0
    new, kept = group_descent(weight, sparsegpt(weight, hessian, 0, groups=(2, 4))[0], hessian, (2, 4))
    assert not kept[0, 2] and not kept[2, 2] and new.isfinite().all()
    weight[1, 2] = 1.0
    new, kept = group_descent(weight, weight.clone(), hessian, (2, 4))
    assert new[1].equal(weight[1]) and kept[1].equal(weight[1] != 0)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [((4, 4), {}, "0 < n < m with m dividing 8 inputs, got 4:4"), ((1, 3), {}, "dividing 8 inputs, got 1:3"),
     ((2, 4), {"sweeps": 0}, "sweeps must be >= 1, got 0"), ((2, 4), {"damping": -1.0}, "damping must be in"),
     ((8, 16), {}, "at most 512 choices for a group, got 12870 for 8:16")],
)  # fmt: skip
def test_bad_values_are_refused(groups, options, message):
    columns = 16 if groups[1] == 16 else 8
    with pytest.raises(ValueError, match=message):
        group_descent(torch.ones(2, columns), torch.ones(2, columns), torch.eye(columns), groups, **options)
