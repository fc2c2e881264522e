"""Loss against sparsity, sensitivity, and the line between two solutions."""

import copy

import pytest
import torch
from torch import nn

from pruning import Masks, select_masks
from pruning.diagnostics import (
    LossPath,
    SparsityCurve,
    layer_sensitivity,
    loss_path,
    mean_loss,
    sparsity_loss_curve,
)
from tests.pruning.test_transformer import build, ids


def data(seed, count=12):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def squared(model, x):
    return (model(x) - x.sum(1, keepdim=True)).pow(2).sum()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def by_loop(model, batches):
    values = [float((model(row[None]) - row.sum()).pow(2)) for batch in batches for row in batch]
    return sum(values) / len(values)


def test_the_mean_is_over_samples_of_batches_of_any_size():
    model, batches = net(), [data(0, 5), data(1, 2)]
    assert mean_loss(model, batches, loss=squared) == pytest.approx(by_loop(model, batches))


def test_each_point_is_a_pruned_copy():
    model, batches = net(), [data(0), data(1)]
    before = copy.deepcopy(model.state_dict())
    curve = sparsity_loss_curve(model, batches, sparsities=(0.25, 0.5), train_batches=[data(2)], loss=squared)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for n, sparsity in enumerate((0.25, 0.5)):
        other = net()
        order = sorted((abs(float(w)), k, i) for k in (0, 2) for i, w in enumerate(other[k].weight.flatten()))
        with torch.no_grad():
            for _, k, i in order[: int(sparsity * 30)]:
                other[k].weight.view(-1)[i] = 0
        assert curve.losses[n] == pytest.approx(by_loop(other, batches))
        assert curve.train_losses[n] == pytest.approx(by_loop(other, [data(2)]))
    assert curve.dense == pytest.approx(by_loop(model, batches))


def test_points_are_retrained_under_their_masks():
    seen = []

    def train(model, masks, first, last):
        seen.append((masks.sparsity, first, last))
        with torch.no_grad():
            model[2].bias += 100

    curve = sparsity_loss_curve(net(), [data(0)], sparsities=(0.2, 0.6), train_fn=train, loss=squared)
    assert seen == [(pytest.approx(0.2), 0, None), (pytest.approx(0.6), 0, None)] and min(curve.losses) > 5000


def test_a_hill_by_hand():
    hill = SparsityCurve((0.2, 0.5, 0.9), (2.0, 1.8, 3.0), dense=1.9)
    assert hill.best() == (0.5, 1.8) and hill.is_hill()
    assert not SparsityCurve((0.2, 0.5), (2.0, 2.5), dense=1.9).is_hill()
    assert not SparsityCurve((0.2, 0.5), (1.8, 1.7), dense=1.9).is_hill()
    assert SparsityCurve((0.5,), (1.0,), dense=1.0).best() == (0.5, 1.0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_sensitivity_prunes_one_matrix_at_a_time(kind):
    model, batches = build(kind), [ids()]
    before = copy.deepcopy(model.state_dict())
    found = layer_sensitivity(model, batches, sparsities=(0.5, 0.9))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for name in list(found.losses)[::3]:
        other = copy.deepcopy(model)
        weight = dict(other.named_parameters())[name]
        select_masks({name: weight.detach().abs()}, sparsity=0.9).apply(other)
        assert found.losses[name][1] == pytest.approx(mean_loss(other, batches))
    assert set(found.losses) == set(Masks.of(model).kept)
    worst = found.ranking()
    assert found.losses[worst[0]][1] == max(losses[1] for losses in found.losses.values())


def test_a_model_comes_back_when_its_loss_fails():
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="loss must be finite"):
        layer_sensitivity(model, [data(0)], loss=lambda m, x: torch.tensor(torch.nan))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_path_is_the_plain_loop_and_its_barrier_by_hand():
    torch.manual_seed(1)
    model, one, two = net(), dict(net().named_parameters()), {}
    for name, parameter in model.named_parameters():
        two[name] = torch.randn(parameter.shape)
    path = loss_path(model, one, two, [data(0)], points=5, loss=squared)
    for alpha, loss in zip(path.alphas, path.losses, strict=True):
        other = net()
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(one[name] * (1 - alpha) + two[name] * alpha)
        assert loss == pytest.approx(by_loop(other, [data(0)]), rel=1e-5)
    assert path.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert all(a.equal(b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    assert LossPath((0.0, 0.5, 1.0), (1.0, 4.0, 3.0)).barrier == 2.0
    assert LossPath((0.0, 0.5, 1.0), (3.0, 1.5, 1.0)).barrier == 0.0
    assert LossPath((0.0, 0.5, 1.0), (3.0, 1.5, 1.0)).is_monotone
    assert not LossPath((0.0, 0.5, 1.0), (1.0, 4.0, 3.0)).is_monotone


def test_the_ends_may_be_the_model_itself():
    model = net()
    other = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    path = loss_path(model, model.state_dict(), other, [data(0)], points=3, loss=squared)
    back = loss_path(model, other, model.state_dict(), [data(0)], points=3, loss=squared)
    assert path.losses == pytest.approx(back.losses[::-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsity_loss_curve(net(), [data(0)], sparsities=()), "sparsities must hold at least one value"),
        (lambda: layer_sensitivity(net(), [data(0)], sparsities=()), "sparsities must hold at least one value"),
        (lambda: loss_path(net(), {}, {}, [data(0)], points=1), "points must be >= 2, got 1"),
        (lambda: loss_path(net(), {}, {}, [data(0)]), r"start must have '0.weight' of shape \[6, 4\], got none"),
        (lambda: mean_loss(net(), [], loss=squared), "batches must hold at least one batch"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
