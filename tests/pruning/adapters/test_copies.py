"""Axes of one model given for another: a copy shrinks by its own, the original stays, misfits are refused."""

import copy
import dataclasses

import pytest
import torch

from pruning import load_pruned, prunable_axes, shrink
from tests.pruning.adapters.models import KNOWN, answer, ids, peer
from tests.pruning.toy import tokens, toy
from tests.tolerances import close
from transformer import Transformer, TransformerConfig

KEPT = {"head": [0, 2], "neuron": [*range(3, 11)], "expert": [0, 2, 3]}


def half(axes):
    return {axis.name: KEPT[axis.kind] for axis in axes if axis.kind in KEPT}


@pytest.mark.filterwarnings("ignore:the config of a")
@pytest.mark.parametrize("name", KNOWN)
def test_a_copy_shrinks_by_the_axes_of_the_original(name, tmp_path):
    model = peer(name)
    other, known = copy.deepcopy(model), copy.deepcopy(model)
    own, before, said = prunable_axes(known), answer(model, ids()), model.config.to_dict()
    shrink(known, own, half(own))
    axes = prunable_axes(model)
    shrink(other, axes, half(axes))
    assert answer(other, ids()).equal(answer(known, ids()))
    assert other.config.to_dict() == known.config.to_dict()
    other.save_pretrained(tmp_path)
    assert answer(load_pruned(tmp_path), ids()).equal(answer(known, ids()))
    assert model.config.to_dict() == said and answer(model, ids()).equal(before)


def test_so_does_a_copy_of_this_librarys_model_and_of_one_that_declares_axes_itself():
    torch.manual_seed(0)
    config = TransformerConfig.uniform(vocab_size=13, dim=8, num_layers=2, num_heads=4, num_kv_heads=2, max_length=16)
    for model, axes_of in ((Transformer(config), Transformer.prunable_axes), (toy((4, 2, 12)), prunable_axes)):
        other = copy.deepcopy(model)
        axes = axes_of(model)
        own = {axis.name: axis.size for axis in axes}
        shrink(other, axes, half(axes))
        shrink(model, axes, half(axes))
        outputs = [getattr(output, "logits", output) for output in (model(tokens()), other(tokens()))]
        close(outputs[1], outputs[0])
        assert {axis.name: axis.size for axis in axes_of(other)} == {axis.name: axis.size for axis in axes_of(model)}
        assert own != {axis.name: axis.size for axis in axes_of(other)}


def test_axes_that_the_model_has_no_equal_of_are_refused_before_anything_changes():
    model, other = peer("Llama"), peer("Llama", intermediate_size=20)
    axes, before = prunable_axes(model), copy.deepcopy(other.state_dict())
    neurons = [axis for axis in axes if axis.kind == "neuron"]
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.neurons' must be of the model that shrinks, or equal"):
        shrink(other, axes, {axis.name: [0, 1] for axis in neurons})
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())
    assert other.config.intermediate_size == 20
    shrink(other, axes, {axis.name: [0, 2] for axis in axes if axis.kind == "head"})  # heads are alike in both
    assert other.config.num_attention_heads == 2 and model.config.num_attention_heads == 4


def test_axes_made_by_hand_are_taken_as_they_are():
    model = toy((4, 2, 5))
    called = []
    axes = [dataclasses.replace(axis, resize=called.append) for axis in model.prunable_axes()]
    shrink(model, axes, {"feedforward.0.neurons": [1, 4]})
    assert called == [[1, 4]]


def test_a_model_inside_shrinks_by_the_axes_that_it_gave():
    model = toy((4, 2, 5))
    outer = torch.nn.ModuleDict({"inner": model})
    axes = [
        dataclasses.replace(
            axis,
            slices=tuple(dataclasses.replace(piece, parameter=f"inner.{piece.parameter}") for piece in axis.slices),
        )
        for axis in prunable_axes(model)
    ]
    shrink(outer, axes, {"attention.0.heads": [0, 2]})
    assert model.attention[0].heads == 2 and model(tokens()).isfinite().all()
