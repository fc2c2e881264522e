"""Channels of the residual stream: what remains equals the model whose channels are zero and whose norms average over
the channels that stay."""

import copy

import pytest
import torch

from pruning import (
    count_parameters,
    magnitude_importance,
    predict_parameters,
    prunable_axes,
    prune_heads,
    prune_width,
    shrink,
)
from tests.pruning.adapters.models import KNOWN, answer, ids, peer
from tests.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")
NAMES = [name for name, known in KNOWN.items() if known.output == "self_attn.o_proj"]
KEPT = [*range(4), 6, *range(9, 24)]
STREAM_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


def width_axis(model):
    return next(axis for axis in prunable_axes(model) if axis.kind == "width")


def narrow(model, kept):
    """Zeros wherever the stream is written, and norms over it that average over `kept`; every tensor keeps its size."""
    gone = [channel for channel in range(24) if channel not in kept]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter[:, gone] = 0
            elif name.endswith(("o_proj.weight", "mlp.down_proj.weight", "o_proj.bias", "mlp.down_proj.bias")):
                parameter[gone] = 0
            elif name.endswith("experts.down_proj"):
                parameter[:, gone] = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in STREAM_NORMS:
            module.forward = lambda x, norm=module: (
                norm.weight * x * (x[..., kept].square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            )
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_channels_equal_zeroed_channels_under_renormalised_norms(name, attention):
    dense = peer(name, attention=attention)
    model = copy.deepcopy(dense)
    axis = width_axis(model)
    predicted = predict_parameters(model, [axis], {axis.name: KEPT})
    shrink(model, [axis], {axis.name: KEPT})
    assert count_parameters(model) == predicted and model.config.hidden_size == (24 if name == "Olmoe" else 20)
    expected = answer(narrow(copy.deepcopy(dense), KEPT), ids())
    assert not torch.allclose(expected, answer(dense, ids()), atol=1e-2)
    close(answer(model, ids()), expected)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    assert model.generate(ids(), **options).equal(model.generate(ids(), use_cache=False, **options))
    assert width_axis(model).size == 20


def test_gradients_are_those_of_the_narrow_model():
    dense = peer("Llama")
    model, whole = copy.deepcopy(dense), narrow(copy.deepcopy(dense), KEPT)
    shrink(model, [width_axis(model)], {width_axis(model).name: KEPT})
    for one in (model, whole):
        one(ids()).logits.square().mean().backward()
    kept = torch.tensor(KEPT)
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in model.named_parameters():
        wanted = expected[name]
        for dim, size in enumerate(parameter.shape):
            wanted = wanted if size == wanted.shape[dim] else wanted.index_select(dim, kept)
        close(parameter.grad, wanted, torch.float32)


@pytest.mark.parametrize(
    "task", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_bare_models_and_other_heads(task):
    dense = peer("Llama", task=task)
    model = copy.deepcopy(dense)
    shrink(model, prunable_axes(model), {width_axis(model).name: KEPT})
    with torch.no_grad():
        close(
            model(ids())[0],
            narrow(dense, KEPT)(ids())[0][..., KEPT] if task == "Model" else narrow(dense, KEPT)(ids())[0],
        )


def test_the_smallest_channels_go_by_default_and_tied_heads_stay_tied():
    model = peer("Qwen3")
    squares = torch.zeros(24, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        dims = [dim for dim, size in enumerate(parameter.shape) if size == 24 and ("mlp" not in name)]
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            dims = [1] if "q_proj" in name else [0]
        if "mlp" in name:
            dims = [0] if "down" in name else [1]
        for dim in dims:
            squares += (
                parameter.detach().double().movedim(dim, 0).flatten(1).square().sum(1)
                if parameter.ndim > 1
                else (parameter.detach().double().square())
            )
    axis = width_axis(model)
    close(magnitude_importance(model, [axis])[axis.name], squares.sqrt())
    report = prune_width(model, fraction=0.25, multiple=1)
    assert set(report.removed[axis.name]) == set(squares.argsort()[:6].tolist())
    assert str(report).startswith("removed 6 of 24 channels (25.0%; asked 25.0%)")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.in_features == 18
    assert report.parameters_after == report.parameters_predicted == sum(p.numel() for p in model.parameters())


def test_width_and_heads_in_either_order():
    dense = peer("Llama")
    heads = {axis.name: torch.full((4,), float(axis.layer)) for axis in prunable_axes(dense) if axis.kind == "head"}
    channels = magnitude_importance(dense, [width_axis(dense)])
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    prune_heads(first, heads, fraction=0.6)
    prune_width(first, channels, fraction=0.3, multiple=1)
    prune_width(second, channels, fraction=0.3, multiple=1)
    prune_heads(second, heads, fraction=0.6)
    assert any(0 in sizes for sizes in first.config.pruned_layers)
    assert first.config.pruned_layers == second.config.pruned_layers and first.config.pruned_width == 17
    close(answer(first, ids()), answer(second, ids()))


def test_bad_input():
    model = peer("Llama")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got 1.0"):
        prune_width(model, fraction=1.0)
    with pytest.raises(ValueError, match=r"scores of 'model.width' must have shape \[24\], got \[3\]"):
        prune_width(model, {"model.width": torch.ones(3)}, fraction=0.5)
    with pytest.raises(ValueError, match="must keep at least 1 units, got 0"):
        shrink(model, prunable_axes(model), {"model.width": []})
    with pytest.raises(ValueError, match="must have axes of kind 'width', got kinds"):
        prune_width(peer("GPT2"), fraction=0.5)
    with pytest.raises(ValueError, match="multiple must be >= 1, got 0"):
        prune_width(model, fraction=0.5, multiple=0)


@pytest.mark.parametrize(
    ("fraction", "options", "left"),
    [(0.3, {}, 24), (1 / 3, {}, 16), (0.5, {}, 16), (0.7, {}, 8), (0.99, {}, 8), (0.99, {"multiple": 1}, 1),
     (0.99, {"multiple": 1, "min_width": 3}, 3), (0.5, {"multiple": 7}, 14), (0.1, {"multiple": 25}, 24)],
)  # fmt: skip
def test_the_width_that_stays_is_a_multiple(fraction, options, left):
    report = prune_width(peer("Llama"), fraction=fraction, **options)
    assert report.asked == fraction and round(24 * (1 - report.achieved)) == left
