"""Calibrated methods with counts of any allocation and, of pure scores, with tiles: against loops of this file."""

import copy

import pytest
import torch
from torch import nn

from pruning import block, erk, owl, prunable_weights, sparsify
from pruning.calibrated import layer_hessian, prune_calibrated, sparsegpt
from pruning.saliency import outlier_shares
from tests.pruning.test_calibrated_models import BATCHES, inputs_of, language_model
from tests.tolerances import close

FIRST = "layers.0.attention.query"


def wanda_by_hook(model, names):
    norms = {name: inputs_of(model, name.removesuffix(".weight"), BATCHES).square().sum(0).sqrt() for name in names}
    return {name: model.get_parameter(name).detach().abs() * norms[name] for name in names}


def zeros_of(model, names):
    return {name: int((model.get_parameter(name) == 0).sum()) for name in names}


def test_owl_gives_sparsegpt_and_wanda_the_counts_of_its_paper():
    dense = language_model()
    shares = outlier_shares(dense, prunable_weights(dense), BATCHES)
    sizes = {name: weight.numel() for name, weight in prunable_weights(dense).items()}
    raised = {name: 0.16 * (shares[name] - min(shares.values())) / (max(shares.values()) - min(shares.values()))
              for name in sizes}  # fmt: skip
    mean = sum(raised[name] * sizes[name] for name in sizes) / sum(sizes.values())
    for method in ("wanda", "sparsegpt", "obs", "admm"):
        model = copy.deepcopy(dense)
        masks = sparsify(model, sparsity=0.5, method=method, allocation="owl", calibration=BATCHES)
        assert masks.zeros == sum(sizes.values()) // 2
        found = zeros_of(model, sizes)
        for name, size in sizes.items():
            assert abs(found[name] - (0.5 - raised[name] + mean) * size) <= 1
        assert len({round(found[name] / size, 2) for name, size in sizes.items()}) > 1
        if method == "sparsegpt":
            x, weight = inputs_of(dense, FIRST, BATCHES), dense.get_submodule(FIRST).weight.detach()
            expected = sparsegpt(weight, layer_hessian(x.mT @ x, len(x)), found[f"{FIRST}.weight"])[0]
            close(model.get_submodule(FIRST).weight, expected, torch.float32)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "exact_obs"])
def test_one_ranking_counts_wandas_scores_of_the_dense_model(method):
    dense = language_model(layers=1)
    names = list(prunable_weights(dense))
    every = [(float(score), name) for name, part in wanda_by_hook(dense, names).items() for score in part.flatten()]
    gone = [name for _, name in sorted(every)[: len(every) * 6 // 10]]
    sparsify(dense, sparsity=0.6, method=method, allocation="global", calibration=BATCHES)
    # sums in float32 against float64: a tie at the edge may fall to another matrix
    found = zeros_of(dense, names)
    assert sum(found.values()) == len(gone) and all(abs(found[name] - gone.count(name)) <= 1 for name in names)


def test_lamp_and_erk_and_functions_of_them():
    found = {}
    for allocation in ("lamp", "erk", "sensitivity", erk):
        model = language_model(layers=1)
        masks = sparsify(model, sparsity=0.7, method="wanda", allocation=allocation, calibration=BATCHES)
        assert masks.zeros == 7 * masks.total // 10
        found[allocation] = zeros_of(model, masks.kept)
    assert found["erk"] == found[erk] and len({tuple(f.values()) for f in found.values()}) == 3
    shapes = {name: weight.detach() for name, weight in prunable_weights(language_model(layers=1)).items()}
    assert found["erk"] == erk(shapes, 0.7)


def test_magnitude_counts_magnitudes_and_what_is_zero_goes_first():
    model = language_model(layers=1)
    with torch.no_grad():
        model.get_submodule(FIRST).weight[:12] = 0
    names = list(prunable_weights(model))
    every = sorted((float(w.abs()), name) for name in names for w in model.get_parameter(name).detach().flatten())
    gone = [name for _, name in every[: len(every) // 2]]
    seen = []

    def ranking(scores, share):
        seen.append({name: int((score == -torch.inf).sum()) for name, score in scores.items()})
        return {name: gone.count(name) for name in scores}

    report = prune_calibrated(model, BATCHES, method="magnitude", sparsity=0.5, allocation=ranking)
    assert seen[0][f"{FIRST}.weight"] == 12 * 16 and sum(seen[0].values()) == 12 * 16
    assert {one.name: one.zeros for one in report.matrices} == {name: gone.count(name) for name in names}


def test_experts_are_counted_one_by_one_and_owl_needs_them_reached():
    model = language_model(experts=4, layers=1)
    allocation = owl(outlier_shares(model, prunable_weights(model), BATCHES))
    report = prune_calibrated(model, BATCHES, method="wanda", sparsity=0.5, allocation=allocation)
    assert report.masks.zeros == report.masks.total // 2
    few = [BATCHES[0][:1, :1]]
    with pytest.raises(ValueError, match=r"calibration must reach .*\[\d\], got no row of input: give more batches"):
        sparsify(language_model(experts=4, layers=1), sparsity=0.5, method="wanda", allocation="global",
                 calibration=few)  # fmt: skip
    with pytest.warns(UserWarning, match="no calibration row reached"):
        sparsify(language_model(experts=4, layers=1), sparsity=0.5, method="wanda", allocation="erk", calibration=few)


@pytest.mark.parametrize("structure, height, width", [("block 4x8", 4, 8), ("row", 1, 16), ("column", 16, 1)])
def test_wanda_takes_whole_tiles_of_least_score(structure, height, width):
    dense = language_model()
    model = copy.deepcopy(dense)
    sparsify(model, sparsity=0.5, method="wanda", structure=structure, calibration=BATCHES)
    scores = wanda_by_hook(dense, [f"{FIRST}.weight"])[f"{FIRST}.weight"]
    tiles = [(i, j) for i in range(0, 16, height) for j in range(0, 16, width)]
    order = sorted(tiles, key=lambda t: float(scores[t[0] : t[0] + height, t[1] : t[1] + width].sum()))
    expected = dense.get_submodule(FIRST).weight.detach().clone()
    for i, j in order[: len(tiles) // 2]:
        expected[i : i + height, j : j + width] = 0
    assert model.get_submodule(FIRST).weight.equal(expected)


def test_tiles_by_one_ranking_and_of_magnitude():
    model = language_model(layers=1)
    masks = sparsify(model, sparsity=0.5, method="wanda", structure="block 4x4", allocation="global",
                     calibration=BATCHES)  # fmt: skip
    assert masks.zeros == 16 * (masks.total // 16 // 2)
    assert len({float(mask.float().mean()) for mask in masks.kept.values()}) > 1
    model = language_model(layers=1)
    report = prune_calibrated(model, BATCHES, method="magnitude", sparsity=0.5, structure="block 4x4", refit=True)
    weight = language_model(layers=1).get_submodule(FIRST).weight.detach().abs()
    assert report.masks.kept[f"{FIRST}.weight"].equal(block(4, 4)(weight, 128))
    assert not model.get_submodule(FIRST).weight.equal(weight) and report.matrices[0].error


def test_tiles_that_do_not_fit_change_nothing():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0.weight: block 4x4 needs a matrix .* divisible by 4x4, got \[4, 6\]"):
        sparsify(model, sparsity=0.5, method="wanda", structure="block 4x4", calibration=[torch.randn(3, 6)])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_order_of_columns_reaches_every_layer():
    dense = language_model()
    model = copy.deepcopy(dense)
    masks = sparsify(model, sparsity=0.5, method="sparsegpt", order="diag", calibration=BATCHES)
    assert masks.sparsity == 0.5
    x, weight = inputs_of(dense, FIRST, BATCHES), dense.get_submodule(FIRST).weight.detach()
    order = x.square().sum(0).argsort(descending=True)
    moved = x[:, order]
    expected = sparsegpt(weight[:, order], layer_hessian(moved.mT @ moved, len(x)), weight.numel() // 2)[0]
    close(model.get_submodule(FIRST).weight[:, order], expected, torch.float32)


@pytest.mark.parametrize("options, message", [
    ({"method": "magnitude"}, "method='magnitude' has no order of columns: order must be None, got 'diag'"),
    ({"method": "wanda", "calibration": BATCHES}, "method='wanda' has no order of columns"),
    ({"method": "sparsegpt", "structure": "2:4", "calibration": BATCHES}, "structure must be None, got 2:4"),
    ({"method": "sparsegpt", "order": "act", "calibration": BATCHES}, "order must be None or 'diag', got 'act'"),
])  # fmt: skip
def test_an_order_goes_with_sparsegpt_alone(options, message):
    model = language_model(layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsify(model, **({"order": "diag", "sparsity": 0.5} | options))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
