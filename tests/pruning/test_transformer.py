"""The library's own models, pruned: masked equals shrunk, counts as predicted, saved, loaded and generating."""

import copy

import pytest
import torch

from pruning import (
    count_parameters,
    head_importance,
    leave_one_out,
    masked,
    neuron_importance,
    predict_parameters,
    prune_heads,
    prune_neurons,
    random_importance,
    shrink,
    sparsify,
)
from tests.tolerances import close
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig, generate

KINDS = ["dense", "moe", "untied"]


def build(kind="dense", *, num_kv_heads=2, layers=2, seed=0):
    """4 heads a layer; float64, but for experts, which have none."""
    experts = MoEConfig(hidden=16, num_experts=4, k=2)
    config = TransformerConfig.uniform(
        vocab_size=31, dim=16, num_layers=layers, num_heads=4, num_kv_heads=num_kv_heads, max_length=32,
        feedforward=experts if kind == "moe" else DenseConfig(hidden=24), tied=kind != "untied",
    )  # fmt: skip
    model = Transformer(config, generator=torch.Generator().manual_seed(seed)).eval()
    model = model if kind == "moe" else model.double()
    return model


def ids(batch=3, length=9, seed=0):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


def heads(model):
    return [axis for axis in model.prunable_axes() if axis.kind == "head"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.8])
def test_pruned_model_equals_masked_model_and_survives_a_reload(tmp_path, kind, num_kv_heads, fraction):
    model = build(kind, num_kv_heads=num_kv_heads)
    whole, tokens = copy.deepcopy(model), ids()
    report = prune_heads(model, head_importance(model, [tokens]), fraction=fraction)
    with torch.no_grad():
        with masked(whole, heads(whole), report.kept):
            expected = whole(tokens).logits
        close(model(tokens).logits, expected)
        model.save_pretrained(tmp_path)
        again = Transformer.from_pretrained(tmp_path)
        assert again(tokens).logits.equal(model(tokens).logits)
    assert again.num_parameters() == model.num_parameters() == report.parameters_after
    assert again.config == model.config
    longer = generate(model, tokens, max_new_tokens=5)
    assert longer.equal(generate(again, tokens, max_new_tokens=5)) and longer.shape == (3, 14)


def test_gradients_of_the_pruned_model_are_slices_of_the_masked_models():
    model, tokens = build(), ids()
    whole, kept = copy.deepcopy(model), {"layers.0.attention.heads": [1, 2], "layers.1.attention.heads": [0, 1]}
    with masked(whole, heads(whole), kept):
        whole(tokens, labels=tokens).loss.backward()
    shrink(model, model.prunable_axes(), kept)
    model(tokens, labels=tokens).loss.backward()
    wide = dict(whole.named_parameters())
    rows = {0: torch.arange(4, 12), 1: torch.arange(8)}
    for name, parameter in model.named_parameters():
        gradient = wide[name].grad
        if "attention." in name:
            layer, part = int(name.split(".")[1]), name.split(".")[3]
            if part == "query":
                gradient = gradient[rows[layer]]
            elif part == "output":
                gradient = gradient[:, rows[layer]]
            elif layer == 1:
                gradient = gradient[:4]
        close(parameter.grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_may_lose_all_heads(tmp_path, kind):
    model, tokens = build(kind), ids()
    whole, kept = copy.deepcopy(model), {"layers.0.attention.heads": []}
    shrink(model, model.prunable_axes(), kept)
    assert model.config.layers[0].attention is None
    with torch.no_grad():
        with masked(whole, heads(whole), kept):
            expected = whole(tokens).logits
        close(model(tokens).logits, expected)
        model.save_pretrained(tmp_path)
        assert Transformer.from_pretrained(tmp_path)(tokens).logits.equal(model(tokens).logits)
    assert generate(model, tokens, max_new_tokens=3).shape == (3, 12)
    assert len(heads(model)) == 1
    report = prune_heads(model, head_importance(model, [tokens]), fraction=0.5)
    assert report.parameters_after == report.parameters_predicted


def test_the_prediction_counts_the_norm_that_goes_with_the_last_head():
    model, kept = build(), {"layers.0.attention.heads": []}
    predicted = predict_parameters(model, heads(model), kept)
    shrink(model, model.prunable_axes(), kept)
    assert count_parameters(model) == predicted


def test_a_model_without_any_head_left_says_so():
    model = build()
    shrink(model, model.prunable_axes(), {axis.name: [] for axis in heads(model)})
    assert model(ids()).logits.isfinite().all()
    with pytest.raises(ValueError, match="kind 'head', got kinds \\['layer', 'neuron', 'width'\\]"):
        head_importance(model, [ids()])


def test_the_file_shrinks_by_exactly_the_predicted_bytes(tmp_path):
    model = build().float()
    tensors = (model.save_pretrained(tmp_path / "whole") / "model.safetensors").stat().st_size
    report = prune_heads(model, random_importance(heads(model)), fraction=0.5)
    smaller = (model.save_pretrained(tmp_path / "pruned") / "model.safetensors").stat().st_size
    # the header names shapes and offsets in text, padded to 8 bytes
    assert abs((tensors - smaller) - (report.bytes_before - report.bytes_predicted)) <= 64
    assert report.bytes_after == report.bytes_predicted


@pytest.mark.parametrize("options", [{}, {"attention_mask": torch.ones(3, 9, dtype=torch.long)}])
def test_keyword_batches_and_activation_checkpointing_give_the_same_scores(options):
    model, tokens = build(), ids()
    expected = head_importance(model, [tokens])
    model.gradient_checkpointing(True)
    found = head_importance(model, [{"input_ids": tokens, "labels": tokens, **options}])
    for name in expected:
        close(found[name], expected[name])


def test_importance_finds_the_head_that_does_nothing():
    model, tokens = build("moe"), ids(6)
    with torch.no_grad():
        model.layers[1].attention.output.weight[:, 4:8] = 0
    for scores in (head_importance(model, [tokens]), leave_one_out(model, [tokens])):
        assert scores["layers.1.attention.heads"][1] == 0
    assert head_importance(model, [tokens])["layers.1.attention.heads"].argmin() == 1


def test_neurons_go_and_the_config_follows(tmp_path):
    model, tokens = build(), ids()
    whole = copy.deepcopy(model)
    report = prune_neurons(model, neuron_importance(model, [tokens]), fraction=0.4)
    assert sum(layer.feedforward.hidden for layer in model.config.layers) == 48 - 19
    assert report.parameters_after == report.parameters_predicted
    with torch.no_grad():
        with masked(whole, whole.prunable_axes(), report.kept):
            expected = whole(tokens).logits
        close(model(tokens).logits, expected)
    assert Transformer.from_pretrained(model.save_pretrained(tmp_path)).config == model.config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_weights_are_zeroed_where_they_should_be_and_reload(tmp_path, kind, allocation):
    model = build(kind)
    masks = sparsify(model, sparsity=0.5, allocation=allocation)
    dense = ("embedding", "norm", "router", "head.weight")
    assert not any(part in name for name in masks.kept for part in dense)
    assert masks.zeros == sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in masks.kept)
    assert masks.zeros == masks.total // 2
    again = Transformer.from_pretrained(model.save_pretrained(tmp_path))
    assert again(ids()).logits.equal(model(ids()).logits)


def test_heads_and_weights_prune_in_turn():
    model, tokens = build(), ids()
    sparsify(model, sparsity=0.5, method="gradient", calibration=[tokens])
    prune_heads(model, head_importance(model, [tokens]), fraction=0.5, layerwise=True, min_heads=1)
    assert [layer.attention.num_heads for layer in model.config.layers] == [2, 2]
    masks = sparsify(model, sparsity=0.8)
    assert masks.total == sum(p.numel() for name, p in model.named_parameters() if name in masks.kept)


def test_a_compiled_model_is_refused_before_anything_is_cut():
    model = build()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="prune the module that was compiled"):
        head_importance(compiled, [ids()])
