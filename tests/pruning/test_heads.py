"""Head importance against finite differences, loops over samples, and leave-one-out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning import (
    Axis,
    gate_importance,
    gated,
    head_importance,
    leave_one_out,
    neuron_importance,
    random_importance,
    sparsify,
)
from tests.pruning.test_merge import ids, own
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import MoEConfig


def per_sample_loss(model, ids, gates, axis):
    """Mean next-token loss of one sequence with `gates` on one axis, by plain indexing."""
    with gated(model, [axis], {axis.name: gates}):
        logits = model(ids[None])[0]
    steps = [F.cross_entropy(logits[t], ids[t + 1]) for t in range(len(ids) - 1)]
    return sum(steps) / len(steps)


@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_importance_is_the_mean_over_samples_of_the_absolute_finite_difference(kind):
    model, ids, step = toy((4, 2, 5), (2, 2, 3)), tokens(5), 1e-6
    score = head_importance if kind == "head" else neuron_importance
    scores = score(model, [ids[:2], ids[2:]], normalize=None)
    for axis in (axis for axis in model.prunable_axes() if axis.kind == kind):
        for unit in range(axis.size):
            bump = torch.zeros(axis.size, dtype=torch.float64)
            bump[unit] = step
            with torch.no_grad():
                slopes = [
                    (per_sample_loss(model, row, 1 + bump, axis) - per_sample_loss(model, row, 1 - bump, axis))
                    / (2 * step)
                    for row in ids
                ]
            expected = sum(abs(slope) for slope in slopes) / len(slopes)
            assert scores[axis.name][unit].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-8)
    assert scores.samples == 5


def test_a_batch_mean_gradient_cancels_where_ours_does_not():
    """Two samples pull in opposite directions: the mean gradient is 0, and the head matters all the same."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(model[0].weight)
    axis = Axis("head", 0, "heads", 2, 1, "0", (), lambda kept: None)
    x = torch.tensor([[3.0, 0.5], [-3.0, 0.5]])

    def loss(model, batch):
        return model(batch).sum()

    ones = torch.ones(2, requires_grad=True)
    with gated(model, [axis], {"heads": ones}):
        (mean,) = torch.autograd.grad(loss(model, x) / 2, ones)
    assert mean[0] == 0 and mean[1] == 0.5
    scores = gate_importance(model, [x], axes=[axis], loss=loss)
    close(scores["heads"], torch.tensor([3.0, 0.5], dtype=torch.float64))
    assert scores["heads"].argmax() != mean.abs().argmax()


def test_batching_does_not_change_the_scores():
    model, ids = toy((4, 2, 5), (3, 3, 3)), tokens(6)
    whole = head_importance(model, [ids])
    for sizes in ([1] * 6, [4, 2], [5, 1]):
        split = head_importance(model, iter(ids.split(sizes)))
        for name in whole:
            close(split[name], whole[name])


def test_padding_counts_for_nothing():
    """Sequences of 6 and 4 tokens: each sample's loss is the mean over its own targets."""
    model, ids = toy((4, 2, 5)), tokens(2, 6)
    mask = torch.tensor([[1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    padded = F.pad(ids, (0, 3))
    labels = padded.masked_fill(mask == 0, -100)
    plain = head_importance(model, [ids[:1], ids[1:, :4]], normalize=None)
    for batch in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": padded, "labels": labels}):
        close(head_importance(model, [batch], normalize=None)["attention.0.heads"], plain["attention.0.heads"])


def test_left_padding_does_not_ask_a_pad_for_the_first_token():
    model, ids = toy((4, 2, 5)), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    left = head_importance(model, [{"input_ids": ids, "attention_mask": mask}], normalize=None)
    named = head_importance(model, [{"input_ids": ids, "labels": labels}], normalize=None)
    close(left["attention.0.heads"], named["attention.0.heads"])


def test_l2_divides_each_layer_by_its_norm_and_leaves_a_silent_layer():
    model, ids = toy((4, 4, 5), (2, 2, 3)), tokens()
    nn.init.zeros_(model.attention[1].o.weight)
    raw, scaled = head_importance(model, [ids], normalize=None), head_importance(model, [ids], normalize="l2")
    close(scaled["attention.0.heads"], raw["attention.0.heads"] / raw["attention.0.heads"].norm())
    assert scaled["attention.1.heads"].tolist() == [0, 0]
    assert scaled.matrix().shape == (2, 4) and scaled.matrix()[1, 2:].isnan().all()


def test_leave_one_out_is_the_loss_without_the_head():
    model, ids = toy((4, 2, 5), (2, 2, 3)), tokens(4)
    scores = leave_one_out(model, [ids[:3], ids[3:]])
    for axis in model.prunable_axes()[:2]:
        for unit in range(axis.size):
            gate, ones = torch.ones(axis.size), torch.ones(axis.size)
            gate[unit] = 0
            with torch.no_grad():
                without, whole = (sum(per_sample_loss(model, row, g, axis) for row in ids) / 4 for g in (gate, ones))
            close(scores[axis.name][unit], without - whole)


def test_importance_agrees_with_leave_one_out_for_small_heads():
    """First order: with outputs scaled down, abs(loss change) of one sample is abs(gate gradient) up to O(scale²)."""
    model, ids = toy((4, 4, 5)), tokens(1)
    nn.init.normal_(model.attention[0].o.weight, std=1e-4)
    first = head_importance(model, [ids], normalize=None)["attention.0.heads"]
    exact = leave_one_out(model, [ids])["attention.0.heads"].abs()
    torch.testing.assert_close(first, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, ids = toy((4, 2, 5)), tokens()
    model.train()
    model.attention[0].eval()
    model.attention[0].q.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, 2.0)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def loss(model, batch):
        assert not model.dropout.training
        if fails:
            model(batch)
            raise RuntimeError("on purpose")
        return model(batch).square().sum()

    for score in (head_importance, leave_one_out):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                score(model, [ids], loss=loss)
        else:
            score(model, [ids], loss=loss)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert (model.head.weight.grad == 2).all() and model.attention[0].k.weight.grad is None
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_scores_come_out_under_no_grad():
    model, ids = toy((4, 2, 5)), tokens()
    expected = head_importance(model, [ids])
    with torch.no_grad():
        close(head_importance(model, [ids])["attention.0.heads"], expected["attention.0.heads"])


def test_progress_wraps_the_batches():
    seen = []
    head_importance(toy((2, 2, 3)), [tokens(), tokens()], progress=lambda items: (seen.append(i) or i for i in items))
    assert len(seen) == 2


def test_random_scores_are_seeded():
    axes = toy((4, 2, 5), (2, 2, 3)).prunable_axes()
    first, again, other = (random_importance(axes, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    for name in first:
        assert first[name].equal(again[name]) and not first[name].equal(other[name])


def mute(model, batch):
    return torch.tensor(1.0)


@pytest.mark.parametrize(
    "batches, loss, message",
    [
        ([], None, "at least one batch, got none"),
        (tokens(), None, "pass \\[batch\\]"),
        ([tokens(2, 1)], None, "L >= 2, got \\[2, 1\\]"),
        ([{"pixels": tokens()}], None, "input_ids"),
        ([{"name": "x"}], None, "got keys \\['name'\\]"),
        ([tokens()], lambda model, batch: model(batch), "scalar tensor, got \\[3, 7, 13\\]"),
        ([tokens()], lambda model, batch: model(batch).sum() * torch.nan, "finite, got nan"),
        ([tokens()], mute, "did not run"),
        ([tokens()], lambda model, batch: model(batch).detach().sum(), "without gradient"),
        ([tokens()], lambda model, batch: model(batch[:2]).sum(), "lead with the batch size 3"),
    ],
)
def test_bad_calibration_is_one_clear_line(batches, loss, message):
    with pytest.raises(ValueError, match=message):
        head_importance(toy((4, 2, 5)), batches, loss=loss)


def test_bad_options_and_models_are_named():
    model = toy((4, 2, 5))
    with pytest.raises(ValueError, match="normalize must be None or 'l2', got 'l1'"):
        gate_importance(model, [tokens()], axes=model.prunable_axes(), normalize="l1")
    with pytest.raises(ValueError, match="Linear declares no axes"):
        head_importance(nn.Linear(2, 2), [tokens()])
    model.prunable_axes = lambda: [axis for axis in toy((4, 2, 5)).prunable_axes() if axis.kind == "neuron"]
    with pytest.raises(ValueError, match="kind 'head', got kinds \\['neuron'\\]"):
        head_importance(model, [tokens()])


def test_gradient_beats_random_against_leave_one_out():
    """Over several models the gate gradient orders heads more like the oracle than chance does."""
    agreements = []
    for seed in range(6):
        model, ids = toy((4, 4, 5), (4, 4, 5), seed=seed), tokens(8, seed=seed)
        exact, ours = leave_one_out(model, [ids]), head_importance(model, [ids], normalize=None)
        for name in exact:
            pairs = itertools.combinations(range(4), 2)
            agreements += [(exact[name][a].abs() > exact[name][b].abs()) == (ours[name][a] > ours[name][b])
                           for a, b in pairs]  # fmt: skip
    assert sum(agreements) / len(agreements) > 0.6


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_batch_of_nothing_is_refused(shape, keyword):
    model, nothing = toy((2, 1, 6)), torch.zeros(shape, dtype=torch.long)
    batches = [tokens(), {"input_ids": nothing} if keyword else nothing]
    message = rf"a batch must hold at least one sample of one token, got shape \[{shape[0]}, {shape[1]}\]"
    with pytest.raises(ValueError, match=message):
        head_importance(model, batches)
    for method in ("snip", "wanda", "sparsegpt"):
        with pytest.raises(ValueError, match=message):
            sparsify(model, sparsity=0.5, method=method, calibration=batches)


def test_experts_have_no_gates():
    model = own(MoEConfig(hidden=8, num_experts=4, k=2))
    axes = [axis for axis in model.prunable_axes() if axis.kind == "expert"]
    for score in (leave_one_out, gate_importance):
        with pytest.raises(ValueError, match="of experts has no gates: .*; shrink a copy, or score with expert_import"):
            score(model, [ids()], axes=axes)
