"""What cannot be pruned says so: other architectures, quantised weights, cross-attention, unequal groups."""

import pytest
import torch
from torch import nn

from pruning import (
    Axis,
    Slice,
    head_importance,
    masked,
    prunable_axes,
    prune_heads,
    prune_neurons,
    random_importance,
    shrink,
)
from pruning.adapters import SUPPORTED
from tests.pruning.adapters.models import KNOWN, answer, ids, peer, transformers
from tests.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")


def test_another_architecture_is_told_what_is_supported_and_how_to_declare_axes():
    config = transformers.GPTNeoXConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    for ask in (prunable_axes, lambda model: head_importance(model, [ids()])):
        with pytest.raises(ValueError) as caught:
            ask(model)
        message = str(caught.value)
        assert message.startswith(
            "GPTNeoXForCausalLM declares no axes: give it prunable_axes() -> list[pruning.axes.Axis]"
        )
        assert "or pass axes=" in message and all(name in message for name in SUPPORTED)
    mlp = "gpt_neox.layers.0.mlp"
    parts = ((f"{mlp}.dense_h_to_4h.weight", 0), (f"{mlp}.dense_h_to_4h.bias", 0), (f"{mlp}.dense_4h_to_h.weight", 1))
    axis = Axis("neuron", 0, "neurons", 24, 1, f"{mlp}.dense_4h_to_h", tuple(Slice(n, d, 1) for n, d in parts),
                lambda kept: setattr(model.config, "intermediate_size", len(kept)))  # fmt: skip
    with masked(model, [axis], {"neurons": list(range(12))}):
        expected = answer(model, ids())
    report = prune_neurons(model, {"neurons": torch.arange(24.0).flip(0)}, fraction=0.5, axes=[axis])
    assert report.achieved == 0.5 and model.config.intermediate_size == 12
    close(answer(model, ids()), expected)


def test_every_supported_class_exists():
    assert all(isinstance(getattr(transformers, name), type) for name in SUPPORTED)


def test_a_class_derived_from_a_supported_one_is_supported():
    class Mine(transformers.LlamaForCausalLM):
        pass

    model = Mine(peer("Llama").config).eval()
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    assert prune_heads(model, random_importance(axes), fraction=0.5).achieved == 0.5


@pytest.mark.parametrize("name", ["Llama", "OPT", "Bert"])
def test_weights_that_torch_has_quantised_are_refused(name):
    model = torch.ao.quantization.quantize_dynamic(peer(name), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"must be a plain parameter in float16, .* before it is quantised"):
        prunable_axes(model)


@pytest.mark.parametrize(("name", "weight"), [("Llama", "model.layers.1.self_attn.v_proj"), ("Llama", "lm_head"),
                                              ("GPT2", "transformer.h.0.mlp.c_fc"),
                                              ("Bert", "bert.encoder.layer.2.output.dense")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_parameters_are_refused_by_name(name, weight, dtype):
    model = peer(name)
    module = model.get_submodule(weight)
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    message = f"{weight.rpartition('.')[2]}.weight must be a plain parameter in .*, got {dtype}: prune the model before"
    with pytest.raises(ValueError, match=message):
        prunable_axes(model)


def test_stacked_experts_of_eight_bits_are_refused():
    model = peer("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp.experts.down_proj must be a plain parameter in .*, got torch.int8"):
        prunable_axes(model)


def test_reparametrised_weights_are_refused():
    model = peer("Llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    with pytest.raises(
        ValueError, match="mlp.down_proj.weight must be a plain parameter .* got Tensor: prune the model"
    ):
        prunable_axes(model)


def test_heads_of_a_model_that_torch_has_pruned_are_refused_with_the_way_out():
    model = peer("Llama")
    nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.2)
    with pytest.raises(ValueError, match="reparametrised: torch.nn.utils.prune holds it, call .*from_torch_prune"):
        prune_heads(model, {}, fraction=0.5)


@pytest.mark.parametrize("name", ["GPT2", "Bert"])
def test_cross_attention_is_refused(name):
    model = peer(name, task=None if name == "GPT2" else "LMHeadModel", is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="add_cross_attention must be False: no axis covers cross-attention, got True"):
        prunable_axes(model)


def test_a_decoder_bert_writes_with_its_cache():
    model = peer("Bert", task="LMHeadModel", is_decoder=True)
    axes = [axis for axis in prunable_axes(model) if axis.kind == "head"]
    shrink(model, axes, {axes[0].name: [], axes[1].name: [2]})
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    assert model.generate(ids(), **options).equal(model.generate(ids(), use_cache=False, **options))
    assert prune_heads(model, head_importance(model, [ids()]), fraction=0.5).achieved == 0.4


def test_scores_of_before_a_removal_do_not_fit_after_it():
    model = peer("OPT")
    scores = random_importance([axis for axis in prunable_axes(model) if axis.kind == "head"])
    prune_heads(model, scores, fraction=0.25, layerwise=True)
    with pytest.raises(ValueError, match=r"must have shape \[3\], got \[4\]; score the model again"):
        prune_heads(model, scores, fraction=0.25)


def test_layers_that_share_a_feedforward_must_lose_the_same_neurons():
    model = peer("Llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    axes = [axis for axis in prunable_axes(model) if axis.kind == "neuron"]
    with pytest.raises(ValueError, match="must keep the same indices of .* as the axis it is shared with"):
        shrink(model, axes, {axes[0].name: [0, 1], axes[1].name: [2, 3]})
    assert model.model.layers[0].mlp.up_proj.out_features == 24
    shrink(model, axes, {axes[0].name: [0, 1], axes[1].name: [0, 1]})
    assert model.config.pruned_layers[:2] == [[4, 2, 2]] * 2 and answer(model, ids()).isfinite().all()


def test_half_precision_is_cut_in_half_precision():
    model = peer("Llama").to(torch.bfloat16)
    rows = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    axes = [axis for axis in prunable_axes(model) if axis.kind == "neuron"]
    shrink(model, axes, {axes[0].name: [2, 9]})
    cut = model.model.layers[0].mlp.up_proj.weight
    assert cut.equal(rows[[2, 9]]) and cut.dtype == torch.bfloat16 and cut.requires_grad


@pytest.mark.parametrize("kind", ["layer", "width"])
def test_what_has_no_gate_cannot_be_masked(kind):
    model = peer("Llama")
    axes = [axis for axis in prunable_axes(model) if axis.kind == kind]
    with pytest.raises(ValueError, match=f"axis '{axes[0].name}' must have a gate module that runs, got a list"):
        with masked(model, axes, {axes[0].name: [0, 1]}):
            pass


@pytest.mark.parametrize("name", KNOWN)
def test_what_can_be_removed_is_what_the_readme_says(name):
    kinds = {axis.kind for axis in prunable_axes(peer(name))}
    inside = {"expert", "expert_neuron", "layer", "width"}
    mixtures = {"Mixtral": {"head", *inside}, "Olmoe": inside}
    assert kinds == mixtures.get(name, {"head", "neuron", "layer", "width"})
