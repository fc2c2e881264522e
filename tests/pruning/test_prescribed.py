"""Masks that stand before the first step: found, shuffled, under other values, or another model's."""

import pytest
import torch
from torch import nn

from pruning import Masks, Prescribed, masks_before_training, masks_from, sparsify
from tests.pruning.test_transformer import build, ids


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "random"])
def test_masks_are_those_of_sparsify_on_the_initial_weights(method):
    batches = [ids()] if method in ("snip", "grasp") else None
    drawn = torch.Generator().manual_seed(3)
    masks = masks_before_training(build(), method=method, sparsity=0.6, calibration=batches, generator=drawn)
    drawn = torch.Generator().manual_seed(3) if method == "random" else None
    wanted = sparsify(build(), method=method, sparsity=0.6, calibration=batches, generator=drawn)
    assert all(masks.kept[name].equal(mask) for name, mask in wanted.kept.items())


def test_a_shuffle_keeps_counts_and_the_values_of_its_own_places():
    before, model = values(build()), build()
    masks = masks_before_training(model, method="synflow", sparsity=0.6, shuffle=True)
    wanted = masks_before_training(build(), method="synflow", sparsity=0.6)
    for name, mask in masks.kept.items():
        assert int(mask.sum()) == int(wanted.kept[name].sum())
        assert model.get_parameter(name).equal(before[name] * mask)
    assert any(not mask.equal(wanted.kept[name]) for name, mask in masks.kept.items())


def test_other_initial_values_come_under_the_same_mask():
    model = build()
    masks = masks_before_training(model, method="synflow", sparsity=0.6, build=lambda: build(seed=7))
    other, wanted = values(build(seed=7)), masks_before_training(build(), method="synflow", sparsity=0.6)
    for name, mask in masks.kept.items():
        assert mask.equal(wanted.kept[name]) and model.get_parameter(name).equal(other[name] * mask)
    assert model.embedding.weight.equal(build().embedding.weight)


def test_zeros_and_their_gradients_are_held_through_decay_and_momentum_and_a_checkpoint():
    model = build()
    method = Prescribed(model, masks_before_training(model, method="random", sparsity=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        assert method.before_step(optimizer)
        for name, mask in method.masks().kept.items():
            assert not model.get_parameter(name).grad[~mask].any()
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()
    assert Masks.of(model).sparsity >= 0.5
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in method.masks().kept.items())
    other = build(seed=5)
    again = Prescribed(other, masks_before_training(other, method="synflow", sparsity=0.5))
    again.load_state_dict(method.state_dict())
    assert all(again.masks().kept[name].equal(mask) for name, mask in method.masks().kept.items())
    assert all(not other.get_parameter(name)[~mask].any() for name, mask in method.masks().kept.items())


def test_a_mask_is_handed_to_the_same_shape_and_stretched_to_a_deeper_model():
    source = masks_before_training(build(), method="random", sparsity=0.5)
    same = masks_from(source, build(seed=2))
    assert all(same.kept[name].equal(mask) for name, mask in source.kept.items())
    deep = masks_from(source, build(layers=4))
    for layer in range(4):
        name = "layers.{}.attention.query.weight"
        assert deep.kept[name.format(layer)].equal(source.kept[name.format(layer // 2)])


def test_bad_masks_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="method must be one of snip, grasp, synflow, random, got 'magnitude'"):
        masks_before_training(model, method="magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"0\.weight"):
        Prescribed(model, Masks({"0.weight": torch.ones(3, 4, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"0\.weight"):
        Prescribed(model, Masks({"0.weight": torch.zeros(4, 4, dtype=torch.bool)}))
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight"):
        Prescribed(model, Masks({"0.weight": torch.eye(4, dtype=torch.bool)}))
