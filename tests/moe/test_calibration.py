"""Thresholds from calibration batches: shares counted in sorted lists, errors measured by a hand-written network."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from moe.calibration import calibrate_thresholds, calibrate_to_perplexity, feedforward_inputs, thresholds_from_inputs
from moe.depth import MixtureOfDepths
from moe.recorded import _Reservoir, single_sequences
from moe.sparsified import sparsify_activations
from moe.thresholded import Thresholds
from tests.tolerances import close
from tests.typecheck import unchecked


class Gated(nn.Module):
    def __init__(self, dim=6, hidden=20):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Residual(nn.Module):
    """Two networks of different scale, each with a residual connection."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Gated(), Gated(hidden=12)

    def forward(self, x, attention_mask=None):
        x = x + self.first(x)
        return x + 3 * self.second(x)


def inputs_of(model, batches):
    first = torch.cat([b.reshape(-1, 6) for b in batches])
    return {"first": first, "second": first + model.first(first)}


def parts(module, x):
    gate = module.gate_proj(x)
    gate = gate / (1 + (-gate).exp())
    return gate, gate * module.up_proj(x)


@pytest.fixture
def case():
    model = Residual().double()
    return model, [torch.randn(4, 10, 6).double() for _ in range(3)]


def share(values, limit):
    return sum(abs(v) <= limit for v in values.flatten().tolist()) / values.numel()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_the_share_of_dropped_values_is_the_sparsity(case, sparsity):
    model, batches = case
    for method in ("hard", "cats", "teal", "cett"):
        found = calibrate_thresholds(model, batches, method=method, sparsity=sparsity)
        assert list(found) == ["first", "second"]
        for name, x in inputs_of(model, batches).items():
            module = model.get_submodule(name)
            gate, h = parts(module, x)
            limits = found[name]
            compared = {
                "hard": [(h, limits.down)],
                "cats": [(gate, limits.gate)],
                "teal": [(x, limits.gate), (x, limits.up), (h, limits.down)],
                "cett": [(h * module.down_proj.weight.norm(dim=0), limits.down)],
            }
            for values, limit in compared[method]:
                # an entry equal to the threshold may round to either side when the rows come in another order
                assert abs(share(values, limit) - sparsity) <= 1.6 / values.numel()


def test_the_error_target_is_met_and_no_larger_level_would_meet_it(case):
    """Cumulative output error by CETT: ‖Σ_dropped h_i down_i‖ / ‖y‖, from loops over neurons."""
    model, batches = case
    found = calibrate_thresholds(model, batches, method="cett", error=0.2)
    for name, x in inputs_of(model, batches).items():
        module = model.get_submodule(name)
        h, down = parts(module, x)[1], module.down_proj.weight

        def cett(limit, h=h, down=down):
            total = 0.0
            for row in h:
                contributions = [row[i] * down[:, i] for i in range(len(row))]
                lost = sum((c for c in contributions if c.norm() <= limit), torch.zeros(6).double())
                total += (lost.norm() / sum(contributions).norm()).item()
            return total / len(h)

        limit = found[name].down
        assert 0 < cett(limit) <= 0.2
        size = (h.abs() * down.norm(dim=0)).flatten().sort().values
        above = size[int((size <= limit).sum()) + math.ceil(size.numel() / 512)]
        assert cett(above.item()) > 0.2


def test_greedy_saves_as_much_and_errs_less(case):
    model, batches = case
    with torch.no_grad():
        model.first.up_proj.weight[2:] *= 0.001
    x = inputs_of(model, batches)["first"]
    dense = model.first(x)
    error, saved = {}, {}
    for allocation in ("uniform", "greedy"):
        limits = calibrate_thresholds(model, batches, method="teal", sparsity=0.5, allocation=allocation)
        sparse = sparsify_activations(model, method="teal", thresholds=limits, execution="dense")
        error[allocation] = ((model.first(x) - dense).norm(dim=-1) / dense.norm(dim=-1)).mean()
        sparse.restore()
        t = limits["first"]
        h = parts(model.first, x)[1]
        saved[allocation] = (share(x, t.gate) + share(x, t.up) + share(h, t.down)) / 3
    assert error["greedy"] < 0.9 * error["uniform"]
    assert abs(saved["greedy"] - saved["uniform"]) < 0.01


@pytest.mark.parametrize("sparsity", [0.97, 0.99, 0.9999])
def test_greedy_near_one_raises_every_projection_as_far_as_it_goes(case, sparsity):
    model, batches = case
    x = inputs_of(model, batches)["first"]
    t = calibrate_thresholds(model, batches, method="teal", sparsity=sparsity, allocation="greedy")["first"]
    saved = (share(x, t.gate) + share(x, t.up) + share(parts(model.first, x)[1], t.down)) / 3
    assert abs(saved - min(sparsity, 1 - 1 / 1024)) < 0.002


@pytest.mark.parametrize("method", ["hard", "cats", "cett", "teal"])
def test_equal_errors_share_out_a_mean_sparsity(case, method):
    """One error for both networks, of 20 and of 12 neurons; their sparsities differ, and weigh 20 : 12 in the mean."""
    model, batches = case
    with torch.no_grad():
        # two of the neurons do nearly everything: the second network can drop far more than the first
        model.second.up_proj.weight[2:] *= 0.01
    limits = calibrate_thresholds(model, batches, method=method, sparsity=0.5, allocation="equal_error")
    levels, errors = {}, {}
    for name, x in inputs_of(model, batches).items():
        module = model.get_submodule(name)
        gate, h = parts(module, x)
        t, down = limits[name], module.down_proj.weight
        size = {"cats": gate.abs(), "cett": h.abs() * down.norm(dim=0)}.get(method, h.abs())
        if method == "teal":
            gate, h = parts(module, x * (x.abs() > t.up))
            size = h.abs()
        levels[name] = share(parts(module, x)[1], t.down) if method == "teal" else share(size, max(t.gate, t.down))
        dense = module(x)
        sparse = (h * (size > (t.gate if method == "cats" else t.down))) @ down.T
        errors[name] = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).mean().item()
    assert abs((20 * levels["first"] + 12 * levels["second"]) / 32 - 0.5) < 0.01
    assert abs(errors["first"] - errors["second"]) < 0.03
    if method in ("hard", "cett"):
        assert levels["second"] > levels["first"] + 0.02


def test_equal_error_without_any_sparsity_drops_nothing(case):
    model, batches = case
    limits = calibrate_thresholds(model, batches, method="cett", sparsity=0.0, allocation="equal_error")
    assert limits == {"first": Thresholds(), "second": Thresholds()}


def test_rows_kept_from_one_pass_give_the_same_thresholds(case):
    model, batches = case
    seeded = [torch.Generator().manual_seed(2) for _ in range(2)]
    inputs = feedforward_inputs(model, batches, rows=9, generator=seeded[0])
    for options in ({"method": "cett", "error": 0.1}, {"method": "teal", "sparsity": 0.4}):
        seeded[1].manual_seed(2)
        expected = calibrate_thresholds(model, batches, rows=9, generator=seeded[1], **options)
        assert thresholds_from_inputs(model, inputs, **options) == expected
    with pytest.raises(ValueError, match="inputs must name first, second, got first"):
        thresholds_from_inputs(model, {"first": inputs["first"]}, sparsity=0.4)


def test_calibration_leaves_the_model_as_it_was(case):
    model, batches = case
    model.first.eval()
    before = {name: module.training for name, module in model.named_modules()}
    calibrate_thresholds(model, batches, sparsity=0.5)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_padding_is_left_out_and_rows_are_bounded(case):
    model, _ = case
    x = torch.randn(2, 5, 6).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = feedforward_inputs(model, [{"x": x, "attention_mask": mask}])["first"]
    wanted = torch.stack([x[0, 0], x[0, 1], x[0, 2], x[1, 0]])
    assert sorted(found.tolist()) == sorted(wanted.tolist())
    few = feedforward_inputs(model, [x, x + 1], rows=7, generator=torch.Generator().manual_seed(1))["first"]
    again = feedforward_inputs(model, [x, x + 1], rows=7, generator=torch.Generator().manual_seed(1))["first"]
    assert few.shape == (7, 6) and torch.equal(few, again)
    assert all(row in torch.cat([x, x + 1]).reshape(-1, 6).tolist() for row in few.tolist())


def loss_of(model, x):
    """Any finite number that grows as the output leaves the target."""
    return ((model(x) - x) ** 2).mean() * 0 + (model(x) - TARGETS["dense"](x)).norm() / 50 + 1.0


TARGETS = {}


def test_perplexity_rises_by_at_most_the_percentage(case):
    model, batches = case
    frozen = Residual().double()
    frozen.load_state_dict(model.state_dict())
    TARGETS["dense"] = frozen
    results = [calibrate_to_perplexity(model, batches, loss=loss_of, percent=p) for p in (1.0, 10.0)]
    for percent, found in zip((1.0, 10.0), results, strict=True):
        close(torch.tensor(found.dense_perplexity), torch.tensor(math.e))
        assert found.perplexity <= math.e * (1 + percent / 100) * (1 + 1e-9)
        sparse = sparsify_activations(model, method="cett", thresholds=found.thresholds)
        measured = sum(loss_of(model.eval(), b).item() for b in batches) / 3
        sparse.restore()
        close(torch.tensor(found.perplexity), torch.tensor(math.exp(measured)))
    assert 0 < results[0].error < results[1].error
    assert results[0].thresholds["first"].down < results[1].thresholds["first"].down


def test_errors(case):
    model, batches = case
    with unchecked():
        for wrong, message in (
            ({}, "exactly one of sparsity and error must be given, got sparsity=None, error=None"),
            ({"sparsity": 0.5, "error": 0.1}, "exactly one"),
            ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
            ({"error": -0.1}, "error must be >= 0, got -0.1"),
            ({"sparsity": 0.5, "method": "wanda"}, "method must be .* got 'wanda'"),
            ({"sparsity": 0.5, "method": "cats", "allocation": "greedy"}, "'greedy' must come with method='teal'"),
            ({"sparsity": 0.5, "allocation": "best"}, "allocation must be 'uniform', 'greedy' or 'equal_error', got"),
            ({"error": 0.5, "allocation": "equal_error"}, "'equal_error' must come with a sparsity, got error=0.5"),
            ({"sparsity": 0.5, "rows": 0}, "rows must be >= 1, got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                calibrate_thresholds(model, batches, **wrong)
        with pytest.raises(ValueError, match="got none for first, second"):
            calibrate_thresholds(model, [], sparsity=0.5)
        with pytest.raises(ValueError, match="got none"):
            calibrate_thresholds(nn.Linear(2, 2), batches, sparsity=0.5)
        with pytest.raises(ValueError, match="batches must be >= 1, got 0"):
            calibrate_to_perplexity(model, [], loss=loss_of)
        with pytest.raises(ValueError, match="percent must be >= 0.0, got -1"):
            calibrate_to_perplexity(model, batches, loss=loss_of, percent=-1)
        with pytest.raises(FloatingPointError, match="dense model must be finite, got nan"):
            calibrate_to_perplexity(model, batches, loss=lambda m, b: m(b).sum() * math.nan)


def test_thresholds_are_applied_by_name(case):
    model, batches = case
    limits = calibrate_thresholds(model, batches, sparsity=0.5)
    sparse = sparsify_activations(model, method="teal", thresholds=limits)
    assert {name: layer.thresholds for name, layer in sparse.layers.items()} == limits
    assert limits["first"] != limits["second"] and isinstance(limits["first"], Thresholds)
    sparse.restore()


def test_rows_are_drawn_alike_from_the_first_batch_and_the_last():
    drawn = torch.zeros(40)
    for seed in range(60):
        kept = _Reservoir(8, torch.Generator().manual_seed(seed))
        for part in torch.arange(40.0)[:, None].split(10):
            kept.add(part, None)
        assert kept.sample.shape == (8, 1) and len(kept.sample.unique()) == 8
        drawn[kept.sample[:, 0].long()] += 1
    assert drawn.view(4, 10).mean(1).min() > 12 * 0.5 and drawn.view(4, 10).mean(1).max() < 12 * 1.5


class Narrow(nn.Module):
    """A network on gathered rows: the tokens above 0 in a causal predictor's eyes, here the sign of their first number.
    Filling, rows of zeros, comes after the shorter sequences' tokens."""

    def __init__(self):
        super().__init__()
        self.depth, self.feedforward = MixtureOfDepths(6), Gated()
        self.depth.predictor = nn.Linear(6, 1, bias=False)
        self.depth.predictor.weight.data = torch.eye(1, 6)

    def forward(self, x, attention_mask=None, scale=None, gain=1.0):
        mask = None if attention_mask is None else attention_mask.bool()
        assert scale is None or len(scale) == len(x)
        return self.depth(x, lambda rows, places: rows + gain * self.feedforward(rows), padding_mask=mask)[0]


def narrow_case(side):
    model = Narrow().double().eval()
    x, mask = torch.randn(5, 4, 6).double(), torch.ones(5, 4, dtype=torch.long)
    # as many as the batch is long pass in the first, whose mask's shape is then that of the gathered rows
    x[0, :, 0], x[1, :, 0], x[2, :, 0] = 1.0, -1.0, 1.0
    for sample, padding in ((2, 3), (3, 2), (4, 4)) if side != "none" else ():
        mask[sample, -padding:] = 0
    mask = mask.flip(1) if side == "left" else mask
    real = x[mask.bool()]
    return model, x, mask, real[real[:, 0] > 0]


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_filling_of_gathered_rows_is_not_sampled_and_no_token_is_lost(side):
    model, x, mask, want = narrow_case(side)
    batch = {"x": x} if side == "none" else {"x": x, "attention_mask": mask}
    batch |= {"scale": torch.ones(5), "gain": 2.0}
    rows = feedforward_inputs(model, [batch], rows=1000)["feedforward"]
    assert sorted(rows.tolist()) == sorted(want.tolist())
    for method, values in (("teal", want.abs()), ("cats", parts(model.feedforward, want)[0].abs())):
        limits = calibrate_thresholds(model, [batch], method=method, sparsity=0.5, rows=1000)["feedforward"]
        assert share(values, limits.gate) == round(0.5 * values.numel()) / values.numel()


class Pair(NamedTuple):
    name: str
    ids: torch.Tensor
    labels: torch.Tensor


def test_batches_of_any_kind_are_cut_into_samples():
    ids, labels = torch.arange(6).view(3, 2), torch.arange(3)
    (first, *_, last) = single_sequences(Pair("text", ids, labels))
    assert (first.name, first.ids.tolist(), first.labels.tolist()) == ("text", [[0, 1]], [0])
    assert (last.name, last.ids.tolist(), last.labels.tolist()) == ("text", [[4, 5]], [2])
    assert [one.tolist() for one in single_sequences(ids)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert list(single_sequences("words")) == ["words"]
    parts = list(single_sequences([{"places": torch.zeros(1, 2), "input_ids": ids}, torch.tensor(1.0)]))
    assert [one[0]["input_ids"].tolist() for one in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert all(one[0]["places"].shape == (1, 2) and one[1] == 1.0 for one in parts)
    masked = single_sequences({"input_ids": ids, "attention_mask": torch.tensor([[1, 1], [0, 0], [0, 1]])})
    assert [one["input_ids"].tolist() for one in masked] == [[[0, 1]], [[4, 5]]]
