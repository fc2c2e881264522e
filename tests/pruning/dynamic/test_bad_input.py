"""What growth cannot do, refused by name: frozen and shared weights, empty matrices, updates that never come."""

import pytest
import torch
from torch import nn

from pruning import global_ranking, min_density, one_shot, uniform
from pruning.dynamic import (
    DSR,
    SET,
    SNFS,
    DeepR,
    DynamicSparsity,
    NeST,
    PreferentialAttachment,
    RigL,
    RobustRewiring,
    StaticSparsity,
    TopKAST,
)
from pruning.learned import Movement
from pruning.retraining import (
    DenseSparseDense,
    EarlyBirdPruning,
    Feedback,
    HardThresholding,
    LearningCompression,
    NeuralWirings,
    Rewinding,
)
from training.sparsify_config import SparsifyConfig, check_sparsify

METHODS = [DSR, SET, SNFS, DeepR, NeST, PreferentialAttachment, RigL, RobustRewiring, StaticSparsity, TopKAST]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_are_named(method):
    model = net()
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="got '1.weight' with requires_grad=False: leave it out"):
        method(model, sparsity=0.5)
    made = method(model, sparsity=0.5, weights=["0.weight", "2.weight"])
    assert set(made.masks().kept) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("method", METHODS)
def test_shared_weights_are_named(method):
    model = net()
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"shared by \['0.weight', '2.weight'\]: leave it out"):
        method(model, sparsity=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_without_connections_is_named_and_a_guard_keeps_one(method):
    def empty_first(scores, sparsity):
        return {name: s.numel() if name == "0.weight" else 0 for name, s in scores.items()}

    options = {"seed_sparsity": 0.5, "peak_sparsity": 0.2} if method is NeST else {}
    with pytest.raises(ValueError, match=r"leaves '0.weight' \[4, 8\] without a connection"):
        method(net(), sparsity=0.5, allocation=empty_first, **options)
    made = method(net(), sparsity=0.5, allocation=min_density(uniform, 0.1), **options)
    assert all(mask.any() for mask in made.masks().kept.values())


def test_one_ranking_that_empties_a_matrix_is_refused():
    model = net()
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    with pytest.raises(ValueError, match="leaves '1.weight'"):
        TopKAST(model, sparsity=0.5, allocation=global_ranking)


@pytest.mark.parametrize("method", [DSR, SET, SNFS, PreferentialAttachment, RigL])
def test_updates_that_would_never_come(method):
    with pytest.raises(ValueError, match="every must be < stop=50, or no update would come, got 50"):
        method(net(), sparsity=0.5, every=50, stop=50)
    with pytest.raises(ValueError, match="every must be < stop=1, or no update would come, got 1"):
        method(net(), sparsity=0.5, every=1, stop=1)
    assert not method(net(), sparsity=0.5, every=49, stop=50).due()


@pytest.mark.parametrize("method", [DeepR, RobustRewiring, StaticSparsity])
def test_what_walks_or_rests_needs_no_updates(method):
    assert method(net(), sparsity=0.5, stop=1).masks().zeros > 0


RETRAINED = {
    "iht": lambda m, **o: HardThresholding(m, sparsity=0.5, sparse_steps=1, dense_steps=1, **o),
    "dsd": lambda m, **o: DenseSparseDense(m, sparsity=0.5, begin=1, end=2, **o),
    "feedback": lambda m, **o: Feedback(m, schedule=one_shot(0.5), **o),
    "wirings": lambda m, **o: NeuralWirings(m, sparsity=0.5, **o),
    "movement": lambda m, **o: Movement(m, schedule=one_shot(0.5), **o),
    "lc": lambda m, **o: LearningCompression(m, sparsity=0.5, **o),
    "early bird": lambda m, **o: EarlyBirdPruning(m, sparsity=0.5, every=1, end=6, **o),
    "lottery": lambda m, **o: Rewinding(m, sparsity=0.5, every=2, **o),
}


@pytest.mark.parametrize("name", RETRAINED)
def test_frozen_and_shared_weights_of_masks_that_come_and_go_are_named(name):
    model = net()
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"shared by \['0.weight', '2.weight'\]: leave it out"):
        RETRAINED[name](model)
    model = net()
    model[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="got '1.weight' with requires_grad=False: leave it out"):
        RETRAINED[name](model)
    RETRAINED[name](model, weights=["0.weight", "2.weight"])


def test_an_early_bird_that_could_never_settle():
    with pytest.raises(ValueError, match=r"every must be <= end / \(window \+ 1\) = 8, so that .* end=50, got 9"):
        EarlyBirdPruning(net(), sparsity=0.5, every=9, end=50)
    with pytest.raises(ValueError, match="every must be <= .* = 3, .* got 4"):
        EarlyBirdPruning(net(), sparsity=0.5, every=4, end=9, window=2)


@pytest.mark.parametrize("name", ["early bird", "lottery"])
def test_tickets_of_other_weights(name):
    method = RETRAINED[name](net())
    for _ in range(6):
        method.after_step(torch.optim.SGD(net().parameters()))
    state = method.state_dict()
    other = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"mask of '0.weight' must have shape \[5, 8\], got \[4, 8\]"):
        RETRAINED[name](other).load_state_dict(state)
    with pytest.raises(ValueError, match="masks must be those of the model's 2 weights, got '2.weight' besides"):
        RETRAINED[name](nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))).load_state_dict(state)


def test_a_training_that_is_shorter_than_the_interval():
    config = SparsifyConfig(sparsity=0.5, method="rigl", every=50)
    message = "sparsify.every must be < 45, the step at which method='rigl' rests in a training of 60 steps, got 50"
    with pytest.raises(ValueError, match=message):
        check_sparsify(config, steps=60)
    check_sparsify(config, steps=68)
    check_sparsify(SparsifyConfig(sparsity=0.5, method="deep_r", end=50), steps=60)
    with pytest.raises(ValueError, match="sparsify.every must be < 40"):
        check_sparsify(SparsifyConfig(sparsity=0.5, method="set", every=50, end=40), steps=600)


@pytest.mark.parametrize("method", [SET, TopKAST, DeepR])
def test_masks_of_another_shape(method):
    state = method(net(), sparsity=0.5).state_dict()
    other = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"mask of '0.weight' must have shape \[5, 8\], got \[4, 8\]"):
        method(other, sparsity=0.5).load_state_dict(state)


def test_a_method_of_ones_own_is_checked_too():
    class Rest(DynamicSparsity):
        def update(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
            """Nothing."""
            return {}

    model = net().requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        Rest(model, sparsity=0.5)
