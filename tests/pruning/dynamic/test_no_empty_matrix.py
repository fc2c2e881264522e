"""No method leaves a matrix without a connection while it trains: it keeps one, or says so."""

import pytest
import torch
from torch import nn

from pruning import Sparsifier, global_ranking, one_shot
from pruning.allocation import guarded_ranking
from pruning.dynamic import DSR, RobustRewiring
from pruning.retraining import GeneralizationDriven, LearningCompression, NeuralWirings, Rewinding
from tests.pruning.test_transformer import build
from training.config import SparsifyConfig
from training.sparsity import make_sparsifiers


def net(scale: float = 1e-4) -> nn.Sequential:
    """Two matrices, of which the first is so small that a ranking over both takes all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def counts(masks):
    return [int(mask.sum()) for mask in masks.kept.values()]


def step(model, method, optimizer, gradient):
    for parameter in model.parameters():
        parameter.grad = gradient(parameter)
    if method.before_step(optimizer):
        optimizer.step()
    method.after_step(optimizer)


def test_dsr_keeps_the_largest_weight_of_a_matrix_that_is_all_below_the_threshold():
    model = net()
    method = DSR(model, sparsity=0.5, every=1, fraction=0.3, threshold=0.01)
    first = model[0].weight.detach().abs()
    largest, optimizer = first.argmax(), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(6):
        step(model, method, optimizer, torch.randn_like)
        assert sum(counts(method.masks())) == 64 and min(counts(method.masks())) >= 1
        assert method.masks().kept["0.weight"].view(-1)[largest]


@pytest.mark.parametrize("seed", range(5))
def test_robust_rewiring_wakes_one_in_a_matrix_that_lost_all(seed):
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(40, 40, bias=False))
    method = RobustRewiring(model, sparsity=0.5, noise=0.0, generator=torch.Generator().manual_seed(seed))
    total, optimizer = sum(counts(method.masks())), torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):
        step(model, method, optimizer, lambda p: 10 * p.detach() if p.shape == (1, 4) else torch.zeros_like(p))
        now = counts(method.masks())
        assert sum(now) == total and min(now) >= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda m: NeuralWirings(m, sparsity=0.9),
        lambda m: LearningCompression(m, sparsity=0.9),
        lambda m: Sparsifier(m, schedule=one_shot(0.9), allocation=guarded_ranking),
    ],
)
def test_one_ranking_keeps_one_weight_of_each_matrix_and_the_total(make):
    model = net()
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(9):
        step(model, method, optimizer, torch.zeros_like)
    kept = counts(method.finish() if hasattr(method, "finish") else method.masks())
    assert min(kept) >= 1 and sum(kept) == 128 - int(0.9 * 128)


@pytest.mark.parametrize("method", ["magnitude", "feedback", "l1", "iht"])
def test_the_word_global_of_a_config_keeps_one_weight_of_each_matrix(method):
    model = build("dense").float()
    with torch.no_grad():
        model.layers[0].attention.query.weight.mul_(1e-4)
    config = SparsifyConfig(sparsity=0.9, scope="global", method=method, end=2, every=1)
    made = make_sparsifiers(config, model, steps=10)[0]
    for _ in range(3):
        step(model, made, torch.optim.SGD(model.parameters(), lr=0.0), torch.zeros_like)
    kept = counts(made.finish() if hasattr(made, "finish") else made.masks())
    assert min(kept) == 1


def test_generalization_driven_pruning_keeps_one_too():
    model = net()
    method = GeneralizationDriven(model, sparsity=0.9, when="low", most=0.9)
    method.observe(1.0)
    assert min(counts(method.masks())) >= 1 and sum(counts(method.masks())) == 128 - int(0.9 * 128)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Sparsifier(m, schedule=one_shot(0.9), allocation="global"),
        lambda m: Sparsifier(m, schedule=one_shot(0.9), allocation=global_ranking),
        lambda m: Rewinding(m, sparsity=0.9, every=1, rounds=1, allocation=global_ranking),
    ],
)
def test_a_ranking_of_ones_own_that_empties_a_matrix_is_refused_when_it_does(make):
    model = net()
    message = r"a sparsity of 0.9 leaves nothing of '0.weight' \[8, 8\]: lower it, or pass allocation=min_density\("
    with pytest.raises(ValueError, match=message):
        step(model, make(model), torch.optim.SGD(model.parameters(), lr=0.0), torch.zeros_like)
