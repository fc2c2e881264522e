"""The shrunk model against the masked model: outputs, every gradient, shapes, counts, ties."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning import (
    Axis,
    Slice,
    head_importance,
    magnitude_importance,
    masked,
    neuron_importance,
    prune_heads,
    prune_neurons,
    random_importance,
    shrink,
)
from tests.pruning.toy import tokens, toy
from tests.tolerances import close


def masked_run(model, axes, kept, ids):
    """Output and gradients of the masked model."""
    with masked(model, axes, kept):
        output = model(ids)
        output.square().sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def sliced(tensor, pieces, kept, groups):
    """What should remain of a tensor, one boolean mask a dimension, built apart from the surgery."""
    for dim in {piece.dim for piece in pieces}:
        stay = torch.zeros(tensor.shape[dim], dtype=torch.bool)
        for piece in (piece for piece in pieces if piece.dim == dim):
            for unit in sorted({unit // groups for unit in kept}) if piece.grouped else kept:
                start = piece.offset + unit * piece.width
                stay[start : start + piece.width] = True
        tensor = torch.stack([row for row, keep in zip(tensor.unbind(dim), stay, strict=True) if keep], dim) \
            if stay.any() else tensor.narrow(dim, 0, 0)  # fmt: skip
    return tensor


FEASIBLE = [[0, 2], [1, 3], [2, 3], [0, 1, 2, 3], [1], []]  # of 4 heads in 2 groups


@pytest.mark.parametrize("heads", FEASIBLE)
@pytest.mark.parametrize("neurons", [[0, 1, 2, 3, 4], [1, 4], []])
def test_shrunk_equals_masked_in_output_and_every_gradient(heads, neurons):
    model = toy((4, 2, 5), (2, 2, 3))
    axes, ids = model.prunable_axes(), tokens()
    kept = {"attention.0.heads": heads, "feedforward.0.neurons": neurons, "attention.1.heads": [1]}
    whole = copy.deepcopy(model)
    expected, gradients = masked_run(whole, axes, kept, ids)
    shrink(model, axes, kept)
    output = model(ids)
    close(output, expected)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        for axis in (axis for axis in axes if axis.name in kept):
            pieces = [piece for piece in axis.slices if piece.parameter == name]
            gradient = sliced(gradient, pieces, kept[axis.name], axis.group_size)
        close(parameter.grad, gradient)


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(0, 50), st.booleans(), st.integers(0, 2))
def test_pruned_heads_equal_masked_heads_and_the_prediction(percent, seed, layerwise, least):
    model = toy((6, 3, 4), (4, 4, 3), (4, 1, 2), seed=seed)
    axes, ids = [axis for axis in model.prunable_axes() if axis.kind == "head"], tokens()
    scores = random_importance(axes, generator=torch.Generator().manual_seed(seed))
    whole = copy.deepcopy(model)
    report = prune_heads(model, scores, fraction=percent / 100, layerwise=layerwise, min_heads=least)
    with torch.no_grad(), masked(whole, axes, report.kept):
        expected = whole(ids)
    with torch.no_grad():
        close(model(ids), expected)
    assert report.parameters_after == report.parameters_predicted == sum(p.numel() for p in model.parameters())
    assert report.bytes_after == report.bytes_predicted == 8 * report.parameters_after
    assert report.achieved <= report.asked + 1e-12
    assert all(len(kept) >= least for kept in report.kept.values())
    for axis in axes:
        assert sorted(report.kept[axis.name] + report.removed[axis.name]) == list(range(axis.size))


def test_every_kind_of_score_prunes_and_the_model_can_be_pruned_again():
    model, ids = toy((4, 4, 6), (4, 2, 4)), tokens()
    heads = [axis for axis in model.prunable_axes() if axis.kind == "head"]
    first = prune_heads(model, head_importance(model, [ids]), fraction=0.25)
    second = prune_heads(model, magnitude_importance(model, model.prunable_axes()), fraction=0.5)
    assert first.achieved == 0.25 and first.parameters_after == second.parameters_before
    assert sum(axis.size for axis in model.prunable_axes() if axis.kind == "head") == 3
    neurons = prune_neurons(model, neuron_importance(model, [ids]), fraction=0.5)
    assert neurons.achieved == 0.5 and [m.down.in_features for m in model.feedforward] != [6, 4]
    assert prune_neurons(model, fraction=0.9, layerwise=True).achieved < 0.9
    assert sum(axis.size for axis in heads) == 8
    assert model(ids).isfinite().all()


def test_a_stale_score_is_refused():
    model = toy((4, 4, 6), (4, 4, 4))
    scores = head_importance(model, [tokens()])
    prune_heads(model, scores, fraction=0.3)
    with pytest.raises(ValueError, match="score the model again after it was pruned"):
        prune_heads(model, scores, fraction=0.3)


def test_the_report_reads_well():
    model = toy((4, 4, 6), (4, 2, 4))
    report = prune_heads(model, magnitude_importance(model, model.prunable_axes()), fraction=0.4)
    lines = str(report).splitlines()
    assert lines[0] == "removed 3 of 8 heads (37.5%; asked 40.0%)"
    assert "-> " in lines[1] and "without" in lines[1] and "parameters" in lines[-1] and "MB" in lines[-1]


def test_parameters_are_new_and_keep_type_and_flags():
    model = toy((4, 2, 5)).to(torch.bfloat16)
    model.attention[0].q.weight.requires_grad_(False)
    old, untouched = model.attention[0].q.weight, model.embedding.weight
    shrink(model, model.prunable_axes(), {"attention.0.heads": [1, 3], "feedforward.0.neurons": range(5)})
    new = model.attention[0].q.weight
    assert new is not old and isinstance(new, nn.Parameter) and not new.requires_grad and new.is_contiguous()
    assert new.dtype == torch.bfloat16 and new.shape == (8, 8) and model.attention[0].k.weight.shape == (8, 8)
    assert new.untyped_storage().nbytes() == 8 * 8 * 2
    assert model.attention[0].q.out_features == 8 and model.attention[0].o.in_features == 8
    assert model.attention[0].k.weight.requires_grad and model.embedding.weight is untouched


def test_a_tied_parameter_is_cut_once_and_stays_tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False)})
    model["b"].weight = model["a"].weight
    weight = model["a"].weight.detach().clone()
    slices = (Slice("a.weight", 0, 2), Slice("b.weight", 0, 2))
    axes = [Axis("head", i, f"h{i}", 2, 2, "a", (piece,), lambda kept: None) for i, piece in enumerate(slices)]
    shrink(model, axes, {"h0": [1], "h1": [1]})
    assert model["a"].weight is model["b"].weight and model["b"].weight.equal(weight[2:])
    assert model["b"].out_features == 2


def test_shared_parameters_that_would_be_cut_differently_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(3, 4)})
    axes = [Axis("head", i, f"h{i}", 2, 2, "a", (Slice("a.weight", 0, 2),), lambda kept: None) for i in range(2)]
    with pytest.raises(ValueError, match="same indices of 'a.weight'"):
        shrink(model, axes, {"h0": [1], "h1": [0]})
    assert model["a"].weight.shape == (4, 3)


def test_orphans_count_as_gone_only_when_the_axis_is_empty():
    from pruning import predict_parameters

    model = nn.ModuleDict({"norm": nn.LayerNorm(3), "a": nn.Linear(3, 4, bias=False)})
    axes = [Axis("head", 0, "h", 2, 2, "a", (Slice("a.weight", 0, 2),), lambda kept: None,
                 orphans=("norm.weight", "norm.bias"))]  # fmt: skip
    assert predict_parameters(model, axes, {"h": [0]})[0] == 12
    assert predict_parameters(model, axes, {"h": []})[0] == 0


@pytest.mark.parametrize("kept, slices, message", [
    ({"x": [0]}, (Slice("weight", 0, 2),), "axis 'x', which is not among \\['h'\\]"),
    ({"h": [2]}, (Slice("weight", 0, 2),), "in \\[0, 2\\), got \\[2\\]"),
    ({"h": [1, 1]}, (Slice("weight", 0, 2),), "distinct"),
    ({"h": [0]}, (Slice("weight", 0, 1),), "cover dimension 0 of 'weight', 4 long, got 2"),
    ({"h": [0]}, (Slice("wait", 0, 2),), "'wait', which the model does not have"),
    ({"h": [0]}, (Slice("weight", 2, 2),), "dim of 'weight' must be in \\[-2, 2\\), got 2"),
])  # fmt: skip
def test_bad_axes_and_units_change_nothing(kept, slices, message):
    model = nn.Linear(3, 4)
    axis = Axis("head", 0, "h", 2, 2, "", slices, lambda kept: None)
    with pytest.raises(ValueError, match=message):
        shrink(model, [axis], kept)
    assert model.weight.shape == (4, 3)


def test_unequal_groups_are_refused_before_anything_changes():
    model = toy((4, 2, 5))
    with pytest.raises(ValueError, match="equally many units, got \\[2, 1\\]"):
        shrink(model, model.prunable_axes(), {"attention.0.heads": [0, 1, 2]})
    assert model.attention[0].q.weight.shape == (16, 8)


def test_masks_leave_no_hook_behind_and_unnamed_axes_stay_whole():
    model, ids = toy((4, 2, 5)), tokens()
    with torch.no_grad():
        before = model(ids)
        with masked(model, model.prunable_axes(), {"attention.0.heads": [0, 2]}):
            assert not model(ids).equal(before)
        assert model(ids).equal(before)
        with masked(model, model.prunable_axes(), {}):
            assert model(ids).equal(before)


def test_a_share_that_no_layer_can_give_up_is_said():
    """9 heads on 3 key-value heads, one of 9 asked: a group of 3 must go, or one head of each group."""
    model = toy((9, 3, 6), (9, 3, 6))
    scores = random_importance([axis for axis in model.prunable_axes() if axis.kind == "head"])
    message = ("nothing was removed from .* 1 axes like it, of each of which 1 heads were asked: 3 groups must stay "
               "alike, and the least that can go is 3 of 9, fraction=0.3333")  # fmt: skip
    with pytest.warns(UserWarning, match=message):
        assert prune_heads(model, scores, fraction=1 / 9, layerwise=True).achieved == 0
    with pytest.warns(UserWarning, match="and none of its 9 can go"):
        prune_heads(model, scores, fraction=1 / 9, layerwise=True, min_heads=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune_heads(model, scores, fraction=0.05, layerwise=True).achieved == 0
        assert prune_heads(model, scores, fraction=1 / 3 + 1e-9, layerwise=True).achieved == pytest.approx(1 / 3)
