"""Neurons folded into biases that Mistral, Qwen2 and Qwen3 have no place for: the output, the folder, what is said."""

import copy
import warnings

import pytest
import torch

from pruning import (
    fold_constant_neurons,
    load_pruned,
    prune_heads,
    prune_neurons,
    prune_width,
    random_importance,
)
from pruning.model_axes import axes_of
from tests.pruning.adapters.models import answer, ids, peer
from tests.tolerances import close

BARE = ("Mistral", "Qwen2", "Qwen3")
SAID = "config of a .* has no setting for the biases"


@pytest.mark.parametrize("name", BARE)
@pytest.mark.parametrize("task", ["ForCausalLM", "Model"])
def test_the_output_is_that_of_the_means_and_comes_back(name, task, tmp_path):
    model = peer(name, task=task).double()
    whole, seen = copy.deepcopy(model), {}
    base = getattr(whole, "model", whole)
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x, i=index: seen.__setitem__(i, x[0].flatten(0, 1)))
        for index, layer in enumerate(base.layers)
    ]
    answer(whole, ids())
    for hook in hooks:
        hook.remove()
    with pytest.warns(UserWarning, match=SAID):
        report = fold_constant_neurons(model, [ids()], fraction=0.25)
    assert model.config.pruned_biases is True and model.config.pruned_layers == [[4, 2, 18]] * 3
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    for index, layer in enumerate(base.layers):
        (gone,) = (list(units) for name, units in report.gone.items() if f"layers.{index}." in name)
        assert len(gone) == 6
        mean = seen[index].mean(0)

        def fixed(_, x, gone=gone, mean=mean):
            x = x[0].clone()
            x[..., gone] = mean[gone]
            return (x,)

        layer.mlp.down_proj.register_forward_pre_hook(fixed)
    close(answer(model, ids(seed=4)), answer(whole, ids(seed=4)))
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path, dtype=torch.float64)
    assert answer(again, ids()).equal(answer(model, ids()))
    assert type(again) is type(model) and again.config.pruned_biases is True
    assert {layer.mlp.down_proj.in_features for layer in getattr(again, "model", again).layers} == {18}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path)


def test_it_goes_on_with_other_surgery_and_is_said_once(tmp_path):
    model = peer("Qwen2")
    with pytest.warns(UserWarning, match=SAID):
        fold_constant_neurons(model, [ids()], tolerance=10.0)
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SAID)
        fold_constant_neurons(model, [ids()], fraction=0.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the (layers|config)")
            prune_heads(model, random_importance(axes_of(model, "head"), generator=torch.Generator()), fraction=0.4)
            prune_width(model, fraction=0.3)
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path)
    assert answer(again, ids()).equal(answer(model, ids()))
    assert again.model.layers[1].mlp.down_proj.bias.shape == (again.config.hidden_size,)


@pytest.mark.filterwarnings("ignore:the (layers|config)")
@pytest.mark.parametrize("name", BARE)
def test_stock_transformers_never_takes_the_model_without_its_biases(name, tmp_path):
    model = peer(name)
    fold_constant_neurons(model, [ids()], fraction=0.1)
    model.save_pretrained(tmp_path / "folded")
    again = load_pruned(tmp_path / "folded")
    scores = random_importance(axes_of(again, "neuron"), generator=torch.Generator())
    prune_neurons(again, scores, fraction=0.5, layerwise=True)
    fold_constant_neurons(again, [ids()], fraction=0.1)
    again.save_pretrained(tmp_path / "smaller")
    for folder in ("folded", "smaller"):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            type(model).from_pretrained(tmp_path / folder)
    assert answer(load_pruned(tmp_path / "smaller"), ids()).equal(answer(again, ids()))


def test_nothing_that_goes_changes_nothing():
    model = peer("Mistral")
    before = copy.deepcopy(model.state_dict())
    report = fold_constant_neurons(model, [ids()], tolerance=0.0)
    assert not any(report.gone.values()) and not hasattr(model.config, "pruned_biases")
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_mixtures_have_no_neurons_to_fold():
    with pytest.raises(ValueError, match="neuron"):
        fold_constant_neurons(peer("Mixtral"), [ids()], fraction=0.5)
