"""GPT-2 stores its matrices [in, out]: every choice of weights sees them as [out, in], by a twin made of nn.Linear."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pruning import (
    Masks,
    Sparsifier,
    WeightChange,
    choose_execution,
    from_torch_prune,
    one_shot,
    prunable_weights,
    quantize_weights,
    sparsify,
    to_torch_prune,
)
from pruning.weights import matrices, stored_turned

transformers = pytest.importorskip("transformers")
IDS = [torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def gpt2():
    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=53, n_embd=24, n_layer=2, n_head=4, n_positions=32,
                                     initializer_range=0.2, bos_token_id=None, eos_token_id=None)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def with_linears(model):
    """The same function, its Conv1D replaced."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.detach().mT.clone()), module.bias
            model.set_submodule(name, linear)
    return model


def test_its_matrices_are_the_prunable_ones():
    weights = prunable_weights(gpt2())
    assert len(weights) == 8 and weights.keys() == stored_turned(gpt2())
    assert weights.keys() == prunable_weights(with_linears(gpt2())).keys()
    parts = matrices(weights, stored_turned(gpt2()))
    assert parts["transformer.h.0.mlp.c_fc.weight"].shape == (96, 24)
    assert not stored_turned(with_linears(gpt2()))


@pytest.mark.parametrize("options", [
    {"structure": "2:4"}, {"structure": "row", "sparsity": 0.25}, {"structure": "column", "sparsity": 0.5},
    {"structure": "block 4x8", "sparsity": 0.5, "allocation": "global"}, {"sparsity": 0.5, "allocation": "erk"},
    {"structure": "2:4", "method": "snip", "calibration": IDS},
    {"structure": "block 4x8", "sparsity": 0.5, "method": "snip", "rounds": 2, "calibration": IDS},
    {"structure": "row", "sparsity": 0.5, "method": "wanda", "calibration": IDS},
    {"sparsity": 0.5, "method": "wanda", "allocation": "owl", "calibration": IDS},
    {"structure": "2:4", "method": "taylor", "calibration": IDS},
])  # fmt: skip
def test_masks_are_those_of_its_twin_turned(options):
    masks, twins = sparsify(gpt2(), **options), sparsify(with_linears(gpt2()), **options)
    assert masks.zeros and all(mask.mT.equal(twins.kept[name]) for name, mask in masks.kept.items())


@pytest.mark.parametrize("options", [
    {"structure": "2:4"}, {"structure": "row"}, {"saliency": "wanda", "calibration": IDS},
    {"structure": "2:4", "weights": ["transformer.h.0.mlp.c_fc.weight"]},
])  # fmt: skip
def test_a_sparsifier_keeps_the_masks_of_its_twin_turned(options):
    masks = Sparsifier(gpt2(), schedule=one_shot(0.5), **options).masks()
    twins = Sparsifier(with_linears(gpt2()), schedule=one_shot(0.5), **options).masks()
    assert masks.zeros and all(mask.mT.equal(twins.kept[name]) for name, mask in masks.kept.items())


def test_its_matrices_run_sparse_and_in_8_bits_and_what_is_measured_knows_them():
    model = gpt2()
    masks, expected = sparsify(model, sparsity=0.5), model(IDS[0]).logits
    assert all(mask.equal(masks.kept[name]) for name, mask in Masks.of(model).kept.items())
    assert {choice.name for choice in choose_execution(copy.deepcopy(model), rounds=1).choices} == set(masks.kept)
    change = WeightChange(model)
    change.after_step()
    assert change.scores().keys() == masks.kept.keys()
    for execution in ("dequantise", "packed"):
        small = copy.deepcopy(model)
        able = [name for name in masks.kept if execution != "packed" or small.get_parameter(name).shape[0] % 32 == 0]
        report = quantize_weights(small, rounds=1, candidates=(execution,), weights=able)
        assert {row.name for row in report.weights} == set(able) and not report.left
        torch.testing.assert_close(small(IDS[0]).logits, expected, rtol=0.1, atol=0.1)


def test_masks_of_torch_come_in_and_go_out():
    model = gpt2()
    masks = sparsify(model, structure="2:4")
    to_torch_prune(model, masks)
    back = from_torch_prune(model)
    assert back.kept.keys() == masks.kept.keys() and all(back.kept[n].equal(mask) for n, mask in masks.kept.items())
    assert not any("_orig" in name for name, _ in model.named_parameters())
    # a model of convolutions alone holds no prunable weight besides
    other = nn.Sequential(nn.Conv2d(2, 3, 3))
    prune.l1_unstructured(other[0], "weight", amount=0.5)
    assert from_torch_prune(other).zeros == 27
