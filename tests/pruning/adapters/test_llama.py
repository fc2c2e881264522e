"""A random Llama of transformers: its heads and neurons go, and what remains runs there."""

import copy

import pytest
import torch

from pruning import (
    head_importance,
    masked,
    neuron_importance,
    prunable_axes,
    prune_heads,
    prune_neurons,
    shrink,
    sparsify,
)
from tests.tolerances import close

transformers = pytest.importorskip("transformers")


def llama(**options):
    """4 heads on 2 key-value heads, in float64, with weights large enough that every head matters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
        **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def ids(batch=3, length=7):
    return torch.randint(1, 31, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("empty", [[], [0], [1, 2], [0, 1, 2]])
@torch.no_grad()
def test_shrunk_equals_masked_and_generates_the_same(options, empty):
    model = llama(**options)
    axes, whole = prunable_axes(model), copy.deepcopy(model)
    kept = {f"model.layers.{i}.self_attn.heads": [] if i in empty else [1, 3] for i in range(3)}
    kept |= {"model.layers.0.mlp.neurons": [1, 5, 7]}
    shrink(model, axes, kept)
    with masked(whole, prunable_axes(whole), kept):
        expected = whole(ids()).logits
        longer = whole.generate(ids(), max_new_tokens=6, do_sample=False)
    close(model(ids()).logits, expected)
    assert model.generate(ids(), max_new_tokens=6, do_sample=False).equal(longer)
    assert model.generate(ids(), max_new_tokens=6, do_sample=False, use_cache=False).equal(longer)
    assert len([axis for axis in prunable_axes(model) if axis.kind == "head"]) == 3 - len(empty)


def test_a_uniform_result_loads_through_stock_transformers(tmp_path):
    model = llama()
    heads = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    # one head of each group is the cheaper half: every layer ends with 2 heads on 2 key-value heads
    scores = {axis.name: torch.tensor([1.0, 3.0, 3.0, 1.0]) for axis in heads}
    report = prune_heads(model, scores, fraction=0.5)
    assert report.achieved == 0.5 and report.parameters_after == report.parameters_predicted
    batch = {"input_ids": ids(), "attention_mask": torch.ones(3, 7)}
    prune_neurons(model, neuron_importance(model, [batch]), fraction=0.25, layerwise=True)
    assert model.config.num_attention_heads == 2 and model.config.intermediate_size == 18
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    close(again(ids()).logits, model(ids()).logits)


def test_unequal_layers_leave_the_config_alone_and_can_be_pruned_again():
    model = llama()
    shrink(model, prunable_axes(model), {"model.layers.1.self_attn.heads": [0, 1]})
    assert model.config.num_attention_heads == 4
    report = prune_heads(model, head_importance(model, [ids()]), fraction=0.3)
    assert sum(map(len, report.removed.values())) == 3
    assert model(ids()).logits.isfinite().all()


def test_weights_are_pruned_but_for_embeddings_norms_and_head():
    masks = sparsify(llama(), sparsity=0.5)
    assert len(masks.kept) == 3 * 7 and all("proj" in name for name in masks.kept)
    assert masks.sparsity == 0.5
