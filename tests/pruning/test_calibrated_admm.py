"""ADMM on one matrix: against slow loops, against least squares on the rows, and in whole models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import sparsify
from pruning.calibrated import admm, layer_hessian, output_error, prune_calibrated, sparsegpt
from tests.pruning.test_calibrated import correlated, fixture
from tests.tolerances import close
from transformer import DenseConfig, Transformer, TransformerConfig


def loop_admm(weight, hessian, count, *, groups, damping, costs, steps, ramp):
    """Boža's iteration with Python sorting and a plain inverse."""
    rows, columns = weight.shape
    scale = [hessian[j, j].item() ** 0.5 for j in range(columns)]
    system = torch.zeros(columns, columns, dtype=torch.float64)
    for i in range(columns):
        for j in range(columns):
            system[i, j] = hessian[i, j].item() / scale[i] / scale[j]
    system += damping * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(system + torch.eye(columns, dtype=torch.float64))
    start = weight * torch.tensor(scale, dtype=torch.float64)
    primal, dual, gone = start, torch.zeros_like(start), set()
    for step in range(1, steps + 1):
        total = primal + dual
        if step <= ramp:
            scores = {(r, c): total[r, c].item() ** 2 * costs[r].item() for r in range(rows) for c in range(columns)}
            may = sorted(scores, key=lambda at: (scores[at], at))[:count]
            if groups is not None:
                n, m = groups
                may = []
                for r in range(rows):
                    for c in range(0, columns, m):
                        inside = sorted(range(c, c + m), key=lambda q: (scores[r, q], q))
                        may += [(r, q) for q in inside[: m - n]]
            share = 1 - (1 - step / ramp) ** 3
            gone = set(sorted(may, key=lambda at: (scores[at], at))[: round(share * len(may))])
        sparse = total.clone()
        for at in gone:
            sparse[at] = 0
        dual = total - sparse
        primal = (start @ system + sparse - dual) @ inverse
    out, kept = primal + dual, torch.ones_like(weight, dtype=torch.bool)
    for at in gone:
        out[at], kept[at] = 0, False
    out = out / torch.tensor(scale, dtype=torch.float64)
    untouched = kept.all(1)
    out[untouched] = weight[untouched]
    return out, kept


@pytest.mark.parametrize(
    ("out", "columns", "count", "groups"),
    [(5, 12, 30, None), (3, 7, 2, None), (4, 9, 35, None), (6, 24, 72, (2, 4)), (4, 12, 32, (1, 3))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_bozas_iteration(out, columns, count, groups, dtype):
    weight, _, hessian = fixture(out, columns)
    costs = torch.linspace(0.5, 2, out, dtype=torch.float64)
    options = {"groups": groups, "damping": 0.02, "steps": 9, "ramp": 5}
    new, kept = admm(weight.to(dtype), hessian.to(dtype), count, costs=costs.to(dtype), **options)
    expected, survivors = loop_admm(weight, hessian, count, costs=costs, **options)
    assert kept.equal(survivors) and int((~kept).sum()) == count and (new[~kept] == 0).all()
    close(new, expected, dtype)


def test_on_its_mask_it_comes_to_least_squares():
    weight, x, hessian = fixture(4, 10)
    new, kept = admm(weight, hessian, 20, damping=0.05, steps=4000, ramp=4)
    pull = torch.diag((0.05 * x.square().sum(0)).sqrt())
    design = torch.cat([x, pull])
    for row in range(4):
        left = kept[row]
        solved = torch.linalg.lstsq(design[:, left], design @ weight[row][:, None]).solution.squeeze(1)
        torch.testing.assert_close(new[row, left], solved, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("count", "groups"), [(0, (2, 4)), (1200, None)])
def test_it_errs_less_than_sparsegpt(count, groups):
    x = correlated(48, rows=400)
    hessian = layer_hessian(x.mT @ x, len(x))
    weight = torch.randn(50, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    swept = output_error(weight, sparsegpt(weight, hessian, count, groups=groups)[0], hessian)
    assert output_error(weight, admm(weight, hessian, count, groups=groups)[0], hessian) < 0.9 * swept


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=25)
def test_counts_are_exact_where_everything_ties(out, columns, percent, dead):
    weight, hessian = torch.ones(out, columns), torch.eye(columns)
    hessian.diagonal()[:dead] = 0
    count = percent * weight.numel() // 100
    new, kept = admm(weight, hessian, count)
    assert int((~kept).sum()) == count and new.isfinite().all() and (new[~kept] == 0).all()
    assert new[kept.all(1)].equal(weight[kept.all(1)])


def test_zeros_stay_and_dead_inputs_go_first():
    weight, _, hessian = fixture(4, 8)
    weight[1, 2:6] = 0
    hessian[3] = hessian[:, 3] = 0
    new, kept = admm(weight, hessian, 7)
    assert (new[1, 2:6] == 0).all() and not kept[:, 3].any() and int((~kept).sum()) == 7
    assert int((~admm(weight, hessian, 2)[1]).sum()) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ramp": 0}, r"ramp must be in \[1, steps=32\], got 0"), ({"steps": 4, "ramp": 5}, r"\[1, steps=4\], got 5"),
     ({"damping": -1.0}, r"damping must be in \[0, inf\), got -1.0")],
)  # fmt: skip
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        admm(torch.ones(2, 4), torch.eye(4), 3, **options)


@pytest.mark.parametrize("options", [{"structure": "2:4"}, {"sparsity": 0.5, "allocation": "loss"}])
def test_a_model_by_name(options):
    torch.manual_seed(0)
    config = TransformerConfig.uniform(vocab_size=17, dim=16, num_layers=2, num_heads=2, feedforward=DenseConfig(24))
    batches = [torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    first, second = Transformer(config).eval(), Transformer(config).eval()
    second.load_state_dict(first.state_dict())
    masks = sparsify(first, method="admm", calibration=batches, **options)
    report = prune_calibrated(second, batches, method="admm", **options)
    assert masks.zeros == report.masks.zeros == masks.total // 2
    assert all(one.equal(two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert all(matrix.error is not None and matrix.error < 1 for matrix in report.matrices)
