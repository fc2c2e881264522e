"""Attention confidence against the probabilities that transformers gives out, and against ours written out."""

import pytest
import torch

from pruning.saliency import attention_confidence
from tests.pruning.adapters.models import peer
from tests.pruning.saliency.models import MODELS, axes_of_kind, bert, llama, padded_batch
from tests.tolerances import close
from transformer.attention import rotary_angles, rotate


def gpt2(**options):
    return peer("GPT2", attention=options["attn_implementation"])


@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=["llama", "bert", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_probabilities(make, padded):
    model = make(attn_implementation="eager")
    batch = padded_batch()
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        every = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    for implementation in ("eager", "sdpa"):
        found = attention_confidence(make(attn_implementation=implementation), [batch])
        for axis, probabilities in zip(axes_of_kind(model, "head"), every, strict=True):
            close(found[axis.name], probabilities.amax(-1).transpose(1, 2)[real].mean(0), torch.float32)


@pytest.mark.parametrize("pattern", ["causal()", "causal() & sliding_window(3)"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_our_own_attention_under_a_pattern(pattern, kind):
    from sparse_attn import parse_pattern

    model = MODELS["own"](kind)
    for layer in model.layers:
        layer.attention.pattern = parse_pattern(pattern)
    batch = padded_batch()["input_ids"]
    inputs = []
    hooks = [layer.attention.register_forward_pre_hook(lambda _, a: inputs.append(a[0])) for layer in model.layers]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    found = attention_confidence(model, [batch])
    places = torch.arange(6)
    seen = parse_pattern(pattern).visible(places[:, None], places[None])
    angles = rotary_angles(places, 4)
    for axis, layer, x in zip(axes_of_kind(model, "head"), model.layers, inputs, strict=True):
        q, k = (linear(x).detach().unflatten(-1, (-1, 4)).transpose(1, 2).double()
                for linear in (layer.attention.query, layer.attention.key))  # fmt: skip
        q, k = rotate(q, angles), rotate(k, angles).repeat_interleave(2, 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        close(found[axis.name], probabilities.amax(-1).transpose(1, 2).flatten(0, 1).mean(0), torch.float32)


@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=["llama", "bert", "gpt2"])
def test_keys_on_which_heads_rest_are_left_out(make):
    model, batch = (
        make(attn_implementation="eager"),
        {"input_ids": torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])},
    )
    skipped = {(0, 0), (1, 0), (0, 4), (1, 2), (1, 4)}
    with torch.no_grad():
        every = model(**batch, output_attentions=True).attentions
    found = attention_confidence(model, [batch], skip_first=1, skip_ids=(5,))
    for axis, probabilities in zip(axes_of_kind(model, "head"), every, strict=True):
        for row, key in skipped:
            probabilities[row, :, :, key] = 0
        close(found[axis.name], probabilities.amax(-1).mean((0, 2)), torch.float32)
    with pytest.raises(ValueError, match="skip_first must be >= 0, got -1"):
        attention_confidence(model, [batch], skip_first=-1)


def test_the_model_is_as_before_and_runs_again():
    model, batch = MODELS["own"](), padded_batch()
    with torch.no_grad():
        before = model(**batch).logits
        attention_confidence(model, [batch], normalize="l2")
        assert model(**batch).logits.equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_head_that_looks_nowhere_in_particular_is_least_sure():
    model = MODELS["own"]()
    with torch.no_grad():
        model.layers[0].attention.query.weight[:4] = 0
    found = attention_confidence(model, [padded_batch()["input_ids"]])["layers.0.attention.heads"]
    assert found.argmin() == 0
    assert found[0].item() == pytest.approx(sum(1 / n for n in range(1, 7)) / 6)


def test_attention_without_a_value_projection_is_named():
    from dataclasses import replace

    model = MODELS["own"]()
    (axis, *_) = axes_of_kind(model, "head")
    axis = replace(axis, gate="norm")
    model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="must have a Linear named value, .* near .norm., got none"):
        attention_confidence(model, [padded_batch()], axes=[axis])
