"""Models pruned with torch come in as weights and masks, go out again, and are pruned further."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moe.product_key import ProductKeys
from pruning import Masks, Sparsifier, linear, prune_neurons, random_importance, sparsify
from pruning.model_axes import axes_of
from pruning.recovery import add_adapters, merge_adapters
from pruning.torch_prune import from_torch_prune, to_torch_prune
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import MoEConfig, Transformer, TransformerConfig


def test_a_pruned_model_comes_in():
    model = toy((2, 1, 6))
    prune.l1_unstructured(model.feedforward[0].down, "weight", amount=0.5)
    prune.l1_unstructured(model.feedforward[0].down, "weight", amount=0.5)
    prune.random_unstructured(model.attention[0].q, "bias", amount=3)
    expected, names = model(tokens()), toy((2, 1, 6)).state_dict().keys()
    original = model.feedforward[0].down.weight_orig
    masks = from_torch_prune(model)
    assert model.state_dict().keys() == names
    close(model(tokens()), expected)
    assert masks.kept["feedforward.0.down.weight"].sum() == 12 and masks.kept["attention.0.q.bias"].sum() == 5
    assert masks.kept["feedforward.0.gate_up.weight"].all() and len(masks.kept) == 7
    assert model.feedforward[0].down.weight is original and original.is_leaf and original.requires_grad
    assert not model.feedforward[0].down._forward_pre_hooks
    zeros = model.feedforward[0].down.weight[~masks.kept["feedforward.0.down.weight"]]
    assert not zeros.any() and not zeros.signbit().any()


def test_there_and_back_for_own_experts_and_linears():
    config = TransformerConfig.uniform(vocab_size=16, dim=16, num_layers=1, num_heads=2, max_length=8,
                                       feedforward=MoEConfig(hidden=16, num_experts=2, k=1))  # fmt: skip
    model = Transformer(config).eval()
    masks = sparsify(model, sparsity=0.6)
    before, ids = {name: p.clone() for name, p in model.named_parameters()}, torch.arange(6)[None]
    expected = model(ids).logits
    to_torch_prune(model, masks)
    assert prune.is_pruned(model) and "layers.0.feedforward.experts.up_orig" in dict(model.named_parameters())
    close(model(ids).logits, expected)
    back = from_torch_prune(model)
    assert back.kept.keys() == masks.kept.keys()
    assert all(back.kept[name].equal(mask) for name, mask in masks.kept.items())
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(before)


def test_training_under_torch_then_here_keeps_the_zeros():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    to_torch_prune(model, sparsify(model, sparsity=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
    masks = from_torch_prune(model)
    sparsifier = Sparsifier(model, schedule=linear(0.8, begin=0, end=4, every=1))
    sparsifier.load_state_dict({"step": 0, "sparsity": masks.sparsity, "masks": masks.state_dict()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().mean().backward()
        optimizer.step()
        sparsifier.after_step(optimizer)
        now = sparsifier.masks()
        assert all(not (now.kept[name] & ~mask).any() for name, mask in masks.kept.items())
        assert Masks.of(model).zeros >= masks.zeros
    assert sparsifier.masks().zeros == int(0.8 * 64) + int(0.8 * 32)


def test_what_cannot_come_in_or_go_out_is_refused():
    model = toy((2, 1, 6))
    with pytest.raises(ValueError, match="Toy must be pruned with torch.nn.utils.prune, got no weight_orig"):
        from_torch_prune(model)
    tied = Masks({"head.weight": torch.zeros(13, 8, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'head.weight' must not be tied .* got embedding.weight, head.weight"):
        to_torch_prune(model, tied)
    with pytest.raises(ValueError, match="which the model does not have"):
        to_torch_prune(model, Masks({"nothing": torch.zeros(2, dtype=torch.bool)}))
    masks = sparsify(model, sparsity=0.5)
    to_torch_prune(model, masks)
    with pytest.raises(ValueError, match="is held by torch.nn.utils.prune already"):
        to_torch_prune(model, masks)
    model.feedforward[0].down.weight_mask = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"mask of 'feedforward.0.down.weight' must have shape \[8, 6\], got \[2, 2\]"):
        from_torch_prune(model)
    assert "weight_orig" in dict(model.feedforward[0].down.named_parameters())


def test_masks_that_keep_all_change_nothing():
    model = toy((2, 1, 6))
    to_torch_prune(model, Masks.of(model))
    assert not prune.is_pruned(model)


def test_what_torch_holds_is_refused_not_left_out():
    model = toy((2, 1, 6))
    prune.l1_unstructured(model.feedforward[0].down, "weight", amount=0.5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    message = "got 'feedforward.0.down.weight': torch.nn.utils.prune holds it, call pruning.torch_prune.from_torch_prun"
    for refused in (
        lambda: sparsify(model, sparsity=0.5),
        lambda: sparsify(model, sparsity=0.5, weights=["feedforward.0.down.weight"]),
        lambda: Sparsifier(model, schedule=linear(0.8, begin=0, end=4)),
        lambda: Masks.of(model),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(ValueError, match="which the model does not have: torch.nn.utils.prune holds it"):
        prune_neurons(model, random_importance(axes_of(model, "neuron")), fraction=0.5)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    from_torch_prune(model)
    sparsify(model, sparsity=0.5)


def test_what_adapters_hold_and_stacks_that_torch_holds_are_refused():
    model = toy((2, 1, 6))
    add_adapters(model, rank=1, weights=["feedforward.0.down.weight"])
    message = "got 'feedforward.0.down.weight': it is parametrised, call pruning.recovery.merge_adapters"
    with pytest.raises(ValueError, match=message):
        sparsify(model, sparsity=0.5)
    merge_adapters(model)
    assert Masks.of(model).total
    config = TransformerConfig.uniform(vocab_size=16, dim=16, num_layers=1, num_heads=2, max_length=8,
                                       feedforward=MoEConfig(hidden=16, num_experts=2, k=1))  # fmt: skip
    mixture = Transformer(config)
    prune.random_unstructured(mixture.layers[0].feedforward.experts, "up", amount=0.5)
    with pytest.raises(ValueError, match="got 'layers.0.feedforward.experts.up': torch.nn.utils.prune holds it"):
        Masks.of(mixture)
    prune.random_unstructured(keys := ProductKeys(8, num_keys=4, heads=2, k=2, key_dim=4), "weight", amount=0.5)
    with pytest.raises(ValueError, match="got 'weight': torch.nn.utils.prune holds it"):
        Masks.of(keys)


def test_biases_and_heads_of_the_vocabulary_that_torch_holds_stay_out_as_ever():
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8), head=nn.Linear(8, 4)))
    prune.random_unstructured(model.up, "bias", amount=0.5)
    prune.random_unstructured(model.head, "weight", amount=0.5)
    assert list(Masks.of(model).kept) == ["up.weight"]
