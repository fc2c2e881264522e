"""Predictors of active neurons: labels by the methods' formulas, recall and cost counted on rows not trained on."""

import pytest
import torch
from torch import nn

from moe.predictor import (
    ActivePredictor,
    active_neurons,
    foresight,
    recall_threshold,
    train_predictor,
    train_predictors,
)
from moe.sparsified import FeedForwardSite, sparsify_activations
from moe.thresholded import ThresholdedFeedForward, Thresholds
from tests.typecheck import unchecked


def test_the_predictor_keeps_the_recall_and_leaves_out_most_idle_neurons():
    generator = torch.Generator().manual_seed(3)
    x, low = torch.randn(2000, 8), torch.randn(8, 3)
    active = x @ low @ torch.randn(3, 24) > 1.0
    predictor = train_predictor(x, active, rank=3, recall=0.95, generator=generator, steps=400)
    held_x, held = x[1800:], active[1800:]
    with torch.no_grad():
        predicted = predictor.active(held_x)
    recall = (predicted & held).sum() / held.sum()
    assert 0.95 <= recall < 0.97
    assert (predicted & ~held).sum() / (~held).sum() < 0.1
    everything = train_predictor(x, active, rank=1, recall=1.0, generator=generator, steps=1)
    with torch.no_grad():
        assert everything.active(held_x)[held].all()


@pytest.mark.parametrize("execution", ["auto", "sparse", "dense"])
def test_a_nan_reaches_the_output(execution):
    layer = ThresholdedFeedForward(8, 24, predictor=ActivePredictor(8, 24, rank=2), execution=execution).eval()
    x = torch.randn(2, 8)
    x[1, 3] = torch.nan
    with torch.no_grad():
        y = layer(x)
    assert y[0].isfinite().all() and y[1].isnan().any()


@pytest.fixture
def network():
    parts = nn.Linear(6, 9, bias=False), nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False)
    return FeedForwardSite(nn.Module(), *parts, "swiglu")


@pytest.mark.parametrize("method", ["hard", "cats", "cett"])
def test_active_neurons_are_those_over_the_threshold(network, method):
    x = torch.randn(5, 6)
    for linear in (network.gate, network.up, network.down):
        linear.requires_grad_(False)
    got = active_neurons(network, x, method=method, thresholds=Thresholds(gate=0.1, down=0.05))
    for token in range(5):
        for i in range(9):
            gate = float(network.gate.weight[i] @ x[token])
            opened = gate * float(torch.sigmoid(torch.tensor(gate)))
            h = opened * float(network.up.weight[i] @ x[token])
            size = {"hard": h, "cats": opened, "cett": h * float(network.down.weight[:, i].norm())}[method]
            assert bool(got[token, i]) == (abs(size) > (0.1 if method == "cats" else 0.05))


def test_the_recall_threshold_is_the_largest_that_keeps_the_share():
    logits = torch.tensor([3.0, -1.0, 0.5, 2.0])
    for recall, kept in ((1.0, 4), (0.75, 3), (0.74, 3), (0.5, 2), (0.25, 1)):
        limit = recall_threshold(logits, recall)
        assert (logits > limit).sum() == kept and limit > logits.sort().values[4 - kept] - 1e-5
    # one of ten may be missed, though (1 - 0.9) * 10 is a little less than one in floats
    assert (torch.arange(10.0) > recall_threshold(torch.arange(10.0), 0.9)).sum() == 9


def test_predictors_are_put_into_a_model_by_name(network):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = network.gate, network.up, network.down
            self.act_fn = nn.SiLU()

    class Only(nn.Module):
        def active(self, x):
            return torch.arange(9).expand(*x.shape[:-1], 9) == 4

    model = nn.Sequential(Block())
    sparse = sparsify_activations(model, method="hard", predictors={"0": Only()})
    x = torch.randn(2, 6)
    h = nn.functional.silu(x @ network.gate.weight[4]) * (x @ network.up.weight[4])
    torch.testing.assert_close(model(x), h[:, None] * network.down.weight[:, 4])
    model.eval()
    sparse.restore()
    assert not model[0].training
    with pytest.raises(ValueError, match="predictors must name 0, got other"):
        sparsify_activations(model, method="hard", predictors={"other": Only()})
    with pytest.raises(ValueError, match="with a predictor, got 'teal'"):
        sparsify_activations(model, method="teal", predictors={"0": Only()})


def test_errors(network):
    with unchecked():
        with pytest.raises(ValueError, match="got 'teal': it drops inputs and not neurons"):
            active_neurons(network, torch.randn(2, 6), method="teal", thresholds=Thresholds())
        with pytest.raises(ValueError, match=r"recall must be in \(0, 1\], got 0"):
            train_predictor(torch.randn(20, 2), torch.ones(20, 2).bool(), rank=1, recall=0.0)
        with pytest.raises(ValueError, match="rows of x must be >= 10, got 5"):
            train_predictor(torch.randn(5, 2), torch.ones(5, 2).bool(), rank=1)
        with pytest.raises(ValueError, match="got no such entry"):
            train_predictor(torch.randn(20, 2), torch.zeros(20, 2).bool(), rank=1, steps=1)


def test_what_predictors_of_a_model_tell_is_counted_over_all_its_networks():
    class Network(nn.Module):
        activation = "relu"

        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    model = nn.ModuleDict({"a": Network(), "b": Network()}).requires_grad_(False)
    inputs = {name: torch.randn(40, 4, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    limits = dict.fromkeys("ab", Thresholds(down=0.1))
    made = train_predictors(
        model, inputs, method="hard", thresholds=limits, rank=64, steps=5, generator=torch.Generator().manual_seed(2)
    )
    assert {one.down.out_features for one in made.values()} == {4}
    for one in made.values():
        one.threshold = 0.05  # the trained one is a logit itself but for its last bit
    told = foresight(model, inputs, made, method="hard", thresholds=limits)
    found = wanted = computed = 0
    for name, x in inputs.items():
        for row in x:
            h = torch.relu(model[name].up.weight @ row)
            logits = made[name].up.weight @ (made[name].down.weight @ row) + made[name].up.bias
            for i in range(6):
                needed, guessed = bool(h[i] > 0.1), bool(logits[i] > made[name].threshold)
                wanted, computed, found = wanted + needed, computed + guessed, found + (needed and guessed)
    assert (told.recall, told.predicted, told.active) == pytest.approx((found / wanted, computed / 480, wanted / 480))
    with pytest.raises(ValueError, match="thresholds must name a, b, got a"):
        foresight(model, inputs, made, method="hard", thresholds={"a": Thresholds()})


def test_the_last_tenth_of_the_rows_sets_the_threshold_and_nothing_else():
    x, active = torch.randn(40, 4), torch.rand(40, 6) < 0.5
    other = active.clone()
    other[36:] = ~other[36:]
    one, two = (
        train_predictor(x, labels, rank=2, recall=0.5, steps=20, generator=torch.Generator().manual_seed(0))
        for labels in (active, other)
    )
    for got, wanted in zip(two.parameters(), one.parameters(), strict=True):
        assert got.equal(wanted), "training saw the labels of the last tenth"
    for predictor, labels in ((one, active), (two, other)):
        logits = predictor(x[36:])[labels[36:]].sort().values
        assert predictor.threshold == pytest.approx(logits[len(logits) // 2].item(), abs=1e-6)
