"""Channels of the residual stream leave this library's own model."""

import copy
from dataclasses import replace

import pytest
import torch

from pruning import count_parameters, predict_parameters, prune_heads, prune_width, random_importance, shrink
from tests.tolerances import close
from tests.transformer.test_model import MIXTURE, model_of, uniform
from transformer import MoEConfig, SoftMoEConfig, Transformer, generate

NOISY = MoEConfig(hidden=12, num_experts=4, k=2, router="noisy_top_k", shared_hidden=6)
BIASED = MoEConfig(hidden=12, num_experts=4, k=2, shared_hidden=6, activation="relu", expert_bias=True)
CONFIGS = {
    "dense": uniform(),
    "untied": replace(uniform(), tied=False),
    "experts": uniform(feedforward=MIXTURE),
    "noisy and shared": uniform(feedforward=NOISY),
    "biased experts": uniform(feedforward=BIASED),
    "normed heads": replace(uniform(), layers=tuple(
        replace(layer, attention=replace(layer.attention, qk_norm="full")) for layer in uniform().layers)),
}  # fmt: skip


def width_axis(model):
    return next(axis for axis in model.prunable_axes() if axis.kind == "width")


def narrow(model, kept):
    """Zeros wherever the stream is written, and norms over it that average over `kept`."""
    gone = [channel for channel in range(model.config.dim) if channel not in kept]
    with torch.no_grad():
        model.embedding.weight[:, gone] = 0
        for block in model.layers:
            if block.attention is not None:
                block.attention.output.weight[gone] = 0
            if hasattr(block.feedforward, "experts"):
                for stack in (block.feedforward.experts, block.feedforward.shared):
                    if stack is not None:
                        stack.down[:, gone] = 0
                        if stack.down_bias is not None:
                            stack.down_bias[:, gone] = 0
            else:
                block.feedforward.down.weight[gone] = 0
    for name, module in model.named_modules():
        if name.endswith(("norm", "attention_norm", "feedforward_norm")) and "attention." not in name:
            module.forward = lambda x, norm=module: (
                norm.weight * x * (x[..., kept].square().mean(-1, keepdim=True) + norm.eps).rsqrt()
            )
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_fewer_channels_equal_zeroed_channels_under_renormalised_norms(config, tmp_path):
    torch.manual_seed(0)
    model = model_of(config, torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("up_bias", "down_bias")):
                parameter.uniform_(0.5, 1.5)
    dense, dim = copy.deepcopy(model), config.dim
    kept = [channel for channel in range(dim) if channel % 4 != 1]
    ids = torch.randint(13, (2, 9))
    axis = width_axis(model)
    predicted = predict_parameters(model, [axis], {axis.name: kept})
    shrink(model, [axis], {axis.name: kept})
    expected = narrow(copy.deepcopy(dense), kept)(ids).logits
    close(model(ids).logits, expected)
    assert (expected - dense(ids).logits).abs().max() > 1e-4
    assert count_parameters(model) == predicted and model.config.dim == len(kept)
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config == model.config and torch.equal(again(ids).logits, model(ids).logits)
    assert generate(again, ids, max_new_tokens=4).equal(generate(model, ids, max_new_tokens=4))


def test_width_and_heads_by_scores():
    model = model_of(uniform())
    dim = model.config.dim
    report = prune_width(model, fraction=0.3, multiple=1)
    assert report.parameters_after == report.parameters_predicted == model.num_parameters()
    assert model.config.dim == dim - int(0.3 * dim) and "channels" in str(report)
    heads = [axis for axis in model.prunable_axes() if axis.kind == "head"]
    prune_heads(model, random_importance(heads), fraction=0.25)
    assert model(torch.randint(13, (1, 5))).logits.isfinite().all()


def test_parts_that_choose_by_the_stream_have_no_width_axis():
    model = model_of(uniform(feedforward=SoftMoEConfig(hidden=8, num_experts=2, allow_future=True)))
    assert "width" not in {axis.kind for axis in model.prunable_axes()}
