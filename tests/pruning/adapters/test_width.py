"""Channels of the residual stream: what remains equals the model whose channels are zero and whose norms average over
the channels that stay."""

import copy

import pytest
import torch

from pruning import (
    count_parameters,
    load_pruned,
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
KEPT = [*range(4), 6, *range(9, 24)]
STREAM_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
WRITES = ("o_proj", "mlp.down_proj", "out_proj", "fc2", "project_in", "attention.output.dense", "output.dense",
          "pooler.dense", "transform.dense")  # fmt: skip
TABLES = ("embed_tokens", "embed_positions", "wte", "wpe", "embeddings")
TASKS = [
    ("GPT2", "Model", {}), ("GPT2", "ForSequenceClassification", {}), ("GPT2", "ForTokenClassification", {}),
    ("GPT2", "ForQuestionAnswering", {}), ("GPT2", "LMHeadModel", {"tie_word_embeddings": False}),
    ("OPT", "ForCausalLM", {"word_embed_proj_dim": 24}), ("OPT", "ForCausalLM", {"do_layer_norm_before": False}),
    ("OPT", "ForCausalLM", {"layer_norm_elementwise_affine": False, "enable_bias": False}),
    ("OPT", "ForSequenceClassification", {"word_embed_proj_dim": 24}), ("OPT", "ForQuestionAnswering", {}),
    ("Bert", "Model", {}), ("Bert", "ForPreTraining", {}), ("Bert", "ForNextSentencePrediction", {}),
    ("Bert", "ForSequenceClassification", {}), ("Bert", "ForTokenClassification", {}),
    ("Bert", "ForQuestionAnswering", {}), ("Bert", "ForMaskedLM", {"tie_word_embeddings": False}),
    ("Llama", "Model", {}), ("Llama", "ForSequenceClassification", {}), ("Llama", "ForTokenClassification", {}),
    ("Llama", "ForQuestionAnswering", {}),
]  # fmt: skip


def width_axis(model):
    return next(axis for axis in prunable_axes(model) if axis.kind == "width")


def narrow(model, kept):
    """Zeros wherever the stream is written, and norms over it that average over `kept`; every tensor keeps its size."""
    gone = [channel for channel in range(24) if channel not in kept]
    conv = "GPT2" in type(model).__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            table = any(table in owner for table in TABLES) and parameter.shape[-1] == 24 and parameter.ndim == 2
            if table or name.endswith("experts.down_proj") or (conv and name.endswith("c_proj.weight")):
                parameter[:, gone] = 0
            elif owner.endswith("c_proj") or owner.endswith(WRITES):
                parameter[gone] = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = lambda x, norm=module: centred(x, norm, kept)
        elif name.rpartition(".")[2] in STREAM_NORMS:
            module.forward = lambda x, norm=module: (
                norm.weight * x * (x[..., kept].square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            )
    return model


def centred(x, norm, kept):
    """LayerNorm over the channels that stay; 0 for the others."""
    part = x[..., kept]
    deviation = part - part.mean(-1, keepdim=True)
    out = deviation / (deviation.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    scale, shift = (1, 0) if norm.weight is None else (norm.weight[kept], norm.bias[kept])
    return torch.zeros_like(x).index_copy(-1, torch.tensor(kept), out * scale + shift)


def outputs(model):
    """Every tensor of floats that the model puts out but its cache."""
    with torch.no_grad():
        found = model(ids())
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", KNOWN)
def test_fewer_channels_equal_zeroed_channels_under_renormalised_norms(name, attention):
    dense = peer(name, attention=attention)
    model = copy.deepcopy(dense)
    axis = width_axis(model)
    predicted = predict_parameters(model, [axis], {axis.name: KEPT})
    shrink(model, [axis], {axis.name: KEPT})
    unsaid = name in ("Olmoe", "GPT2", "OPT", "Bert")
    assert count_parameters(model) == predicted and model.config.hidden_size == (24 if unsaid else 20)
    expected = answer(narrow(copy.deepcopy(dense), KEPT), ids())
    assert not torch.allclose(expected, answer(dense, ids()), atol=1e-2)
    close(answer(model, ids()), expected)
    if name != "Bert":
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
        assert model.generate(ids(), **options).equal(model.generate(ids(), use_cache=False, **options))
    assert width_axis(model).size == 20


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Bert"])
def test_gradients_are_those_of_the_narrow_model(name):
    dense = peer(name)
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


@pytest.mark.parametrize(("name", "task", "options"), TASKS)
def test_bare_models_and_other_heads(name, task, options):
    dense = peer(name, task=task, **options)
    model = copy.deepcopy(dense)
    shrink(model, prunable_axes(model), {width_axis(model).name: KEPT})
    expected = outputs(narrow(dense, KEPT))
    for key, value in outputs(model).items():
        close(value, expected[key] if value.shape == expected[key].shape else expected[key][..., KEPT])


def test_two_heads_of_gpt2():
    dense = peer("GPT2", task="DoubleHeadsModel", num_labels=1)
    model, choices = copy.deepcopy(dense), ids(6).view(3, 2, 7)
    shrink(model, prunable_axes(model), {width_axis(model).name: KEPT})
    with torch.no_grad():
        one, two = model(choices), narrow(dense, KEPT)(choices)
    close(one.logits, two.logits)
    close(one.mc_logits, two.mc_logits)


def test_a_head_that_is_no_linear_layer_leaves_no_width():
    model = peer("Bert", task="ForSequenceClassification")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 2))
    assert {axis.kind for axis in prunable_axes(model)} == {"head", "neuron", "layer"}
    with pytest.raises(ValueError, match=r"must have axes of kind 'width', got kinds \['head', 'layer', 'neuron'\]"):
        prune_width(model, fraction=0.5)


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


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Bert"])
def test_width_and_heads_in_either_order(name):
    dense = peer(name)
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


@pytest.mark.parametrize(("dtype", "needed"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_a_width_that_grouped_products_refuse_is_refused_before(dtype, needed):
    model = peer("Mixtral").to(dtype)
    with pytest.raises(ValueError, match=rf"'model.width' must keep a multiple of {needed} units, got 22: grouped pro"):
        prune_width(model, fraction=0.1, multiple=2)
    assert model.config.hidden_size == 24 and answer(model, ids()).isfinite().all()
    prune_width(model, fraction=0.3, multiple=needed)
    assert answer(model, ids()).isfinite().all()


def test_experts_run_one_by_one_take_any_width(tmp_path):
    model = peer("Olmoe")
    model.set_experts_implementation("eager")
    prune_width(model, fraction=0.1, multiple=2)
    expected = answer(model, ids())
    assert model.get_input_embeddings().weight.shape[1] == 22 and expected.isfinite().all()
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path)
    again.set_experts_implementation("eager")
    assert answer(again, ids()).equal(expected)
