"""Pruned models in folders: stock transformers reads what its config can say, load_pruned reads everything."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning import load_pruned, prunable_axes, prune_heads, prune_neurons, prune_width, random_importance, shrink
from tests.pruning.adapters.models import DENSE, KNOWN, answer, ids, peer, transformers
from tests.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:the (config of|layers of this model)")
HEADS, NEURONS, EXPERTS = ([], [1, 3], [0, 1]), ([0, 5, 23], [7], range(24)), ([0, 2, 4], [1, 3], range(5))


def unequal(model):
    kinds = {"head": HEADS, "neuron": NEURONS, "expert": EXPERTS}
    axes = prunable_axes(model)
    shrink(model, axes, {axis.name: list(kinds[axis.kind][axis.layer]) for axis in axes if axis.kind in kinds})
    return model


def same(again, model):
    assert type(again) is type(model) and not again.training
    aside = {"dtype": None, "_name_or_path": None}
    assert again.config.to_dict() | aside == model.config.to_dict() | aside
    for (name, one), (other, two) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and one.equal(two)
    close(answer(again, ids()), answer(model, ids()))


def stock(model, folder):
    return type(model).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", KNOWN)
def test_unequal_layers_load_here_and_can_be_pruned_on(name, tmp_path):
    model = unequal(peer(name))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        stock(model, tmp_path)
    again = load_pruned(tmp_path)
    same(again, model)
    (layer,) = (axis for axis in prunable_axes(again) if axis.kind == "layer")
    shrink(again, [layer], {layer.name: [1, 2]})
    again.save_pretrained(tmp_path / "on")
    same(load_pruned(tmp_path / "on"), again)
    if name != "Bert":
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(3, 7, dtype=torch.long)}
        assert load_pruned(tmp_path).generate(ids(), **options).equal(model.generate(ids(), **options))


@pytest.mark.parametrize("name", KNOWN)
def test_a_uniform_result_needs_no_record(name, tmp_path):
    model = peer(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = prunable_axes(model)
        kept = {axis.name: list(range(0, 24, 2)) for axis in axes if axis.kind == "neuron"}
        kept |= {axis.name: [0, 3, 4] for axis in axes if axis.kind == "expert"}
        kept |= {axis.name: [0, 2] for axis in axes if axis.kind == "layer"}
        if name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral"):
            kept |= {axis.name: [0, 3] for axis in axes if axis.kind == "head"}
            kept |= {axis.name: [*range(3), *range(7, 24)] for axis in axes if axis.kind == "width"}
        shrink(model, axes, kept)
    assert not hasattr(model.config, "pruned_layers") and not hasattr(model.config, "pruned_width")
    model.save_pretrained(tmp_path)
    same(stock(model, tmp_path), model)
    same(load_pruned(tmp_path), model)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral"])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_heads_taken_from_every_layer_alike_leave_a_model_for_stock_transformers(name, fraction, tmp_path):
    """4 heads on 2 key-value heads: layers left to themselves would choose groups here and single heads there."""
    model = peer(name)
    scores = random_importance([axis for axis in prunable_axes(model) if axis.kind == "head"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = prune_heads(model, scores, fraction=fraction, layerwise=True)
    assert [str(one.message)[:19] for one in said] == ["nothing was removed"] * (fraction < 0.5)
    assert report.achieved == (0 if fraction < 0.5 else 0.5)  # one of four goes from no layer
    model.save_pretrained(tmp_path)
    same(stock(model, tmp_path), model)


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Bert"])
def test_fewer_heads_in_every_layer_are_recorded_where_the_config_cannot_say_so(name, tmp_path):
    model = peer(name)
    scores = random_importance([axis for axis in prunable_axes(model) if axis.kind == "head"])
    with pytest.warns(UserWarning, match=r"has no setting for its new sizes \(heads/.*2/2/24.*load_pruned"):
        prune_heads(model, scores, fraction=0.5, layerwise=True)
    assert model.config.pruned_layers == [[2, 2, 24]] * 3 and model.config.num_attention_heads == 4
    model.save_pretrained(tmp_path)
    same(load_pruned(tmp_path), model)


@pytest.mark.parametrize(
    ("name", "removed", "said"),
    [
        ("Llama", 1 / 6, (20, None)),
        ("Llama", 1 / 24, (24, 23)),
        ("Qwen2", 1 / 24, (23, None)),
        ("Olmoe", 1 / 6, (24, 20)),
        ("GPT2", 1 / 6, (24, 20)),
        ("OPT", 1 / 6, (24, 20)),
        ("Bert", 1 / 6, (24, 20)),
    ],
)
def test_the_width_is_recorded_where_the_config_refuses_it(name, removed, said, tmp_path):
    model = unequal(peer(name))
    prune_width(model, fraction=removed, multiple=1)
    assert (model.config.hidden_size, getattr(model.config, "pruned_width", None)) == said
    model.save_pretrained(tmp_path)
    same(load_pruned(tmp_path), model)


TOGETHER = [
    ("GPT2", None, {}), ("GPT2", None, {"n_inner": None}), ("GPT2", "ForSequenceClassification", {}), ("OPT", None, {}),
    ("OPT", None, {"word_embed_proj_dim": 24}), ("OPT", None, {"layer_norm_elementwise_affine": False}),
    ("Bert", None, {}), ("Bert", "Model", {}), ("Bert", "ForSequenceClassification", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "options"), TOGETHER)
@pytest.mark.parametrize("heads_first", [True, False])
def test_heads_and_width_that_shrink_alike_need_no_record(name, task, options, heads_first, tmp_path):
    model = peer(name, task=task, **options)
    steps = {"head": [0, 2, 3], "width": [*range(5), *range(11, 24)]}
    for kind in steps if heads_first else reversed(steps):
        axes = [axis for axis in prunable_axes(model) if axis.kind == kind]
        shrink(model, axes, {axis.name: steps[kind] for axis in axes})
    assert not hasattr(model.config, "pruned_layers") and not hasattr(model.config, "pruned_width")
    assert (model.config.num_attention_heads, model.config.hidden_size) == (3, 18)
    model.save_pretrained(tmp_path)
    same_outputs(stock(model, tmp_path), model)
    same_outputs(load_pruned(tmp_path), model)


def same_outputs(again, model):
    with torch.no_grad():
        close(again(ids())[0], model(ids())[0])
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_a_width_that_stock_opt_would_take_for_another_model_is_recorded(tmp_path):
    """Words of 12 channels are projected onto the stream, unless the config says that it is 12 wide itself."""
    model = peer("OPT")
    axes = prunable_axes(model)
    kept = {axis.name: [1, 2] for axis in axes if axis.kind == "head"}
    shrink(model, axes, kept | {axis.name: list(range(12)) for axis in axes if axis.kind == "width"})
    assert model.config.hidden_size == 24 and model.config.pruned_width == 12
    model.save_pretrained(tmp_path)
    same(load_pruned(tmp_path), model)


def test_unequal_neurons_keep_their_room_when_the_width_changes(tmp_path):
    """GPT-2's n_inner of None means four times the width, of which the record counts down."""
    model = peer("GPT2", n_inner=None)
    neurons = [axis for axis in prunable_axes(model) if axis.kind == "neuron"]
    shrink(model, neurons, {neurons[0].name: list(range(90))})
    steps = {"head": [0, 2, 3], "width": list(range(18))}
    axes = prunable_axes(model)
    shrink(model, axes, {axis.name: steps[axis.kind] for axis in axes if axis.kind in steps})
    assert model.config.hidden_size == 18 and [sizes[2] for sizes in model.config.pruned_layers] == [90, 96, 96]
    model.save_pretrained(tmp_path)
    same(load_pruned(tmp_path), model)


@pytest.mark.parametrize(
    ("name", "task"), [("Bert", "Model"), ("Llama", "ForSequenceClassification"), ("GPT2", "Model")]
)
def test_bare_models_and_other_tasks_load(name, task, tmp_path):
    model = unequal(peer(name, task=task))
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path)
    with torch.no_grad():
        close(again(ids())[0], model(ids())[0])


def test_options_of_loading(tmp_path):
    model = unequal(peer("Llama"))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_pruned(tmp_path, dtype=torch.float64, device="cpu", attention="eager")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float64}
    assert again.config._attn_implementation == "eager"
    close(answer(again, ids()), answer(model, ids()))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_pruned(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", DENSE)
def test_a_tensor_too_many_or_too_few_is_refused(name, tmp_path):
    model = unequal(peer(name))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = f"{KNOWN[name].layer(1)}.{KNOWN[name].hidden}.weight"
    save_file({key: value for key, value in tensors.items() if key != gone}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=f"missing_keys of .* must be none, got {gone}"):
        load_pruned(tmp_path)
    save_file({**tensors, "surplus.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="unexpected_keys of .* must be none, got surplus.weight"):
        load_pruned(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"architectures": ["T5Model"]}, "architectures must name one of LlamaModel, .*, got 'T5Model'"),
        ({"architectures": None}, "architectures must name one of LlamaModel, .*, got None"),
        ({"pruned_layers": [[2, 1, 4]]}, "pruned_layers must give 3 sizes of each of 3 layers"),
        ({"pruned_layers": [[2, 1, 4, 1]] * 3}, "pruned_layers must give 3 sizes of each of 3 layers"),
        ({"pruned_layers": [[3, 2, 4]] * 3}, "at most 4 heads on 2 key-value heads, got 3 on 2"),
        ({"pruned_layers": [[2, 1, 25]] * 3}, r"neurons must be in \[0, 24\], got 25"),
        ({"pruned_width": 0}, r"width must be in \[1, 24\], got 0"),
    ],
)
def test_a_bad_record_is_refused(record, message, tmp_path):
    peer("Llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | record))
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path)


def test_sizes_that_are_not_those_of_the_tensors_are_refused(tmp_path):
    unequal(peer("Llama")).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pruned_layers": [[2, 1, 5], *config["pruned_layers"][1:]]}))
    with pytest.raises((ValueError, RuntimeError)):
        load_pruned(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError):
        load_pruned(tmp_path)


def test_a_record_goes_when_the_layers_are_alike_again(tmp_path):
    model = peer("OPT")
    neurons = [axis for axis in prunable_axes(model) if axis.kind == "neuron"]
    shrink(model, neurons, {neurons[0].name: list(range(12))})
    assert model.config.pruned_layers[0] == [4, 4, 12]
    shrink(model, prunable_axes(model), {axis.name: list(range(12)) for axis in neurons[1:]})
    assert not hasattr(model.config, "pruned_layers") and model.config.ffn_dim == 12
    model.save_pretrained(tmp_path)
    same(transformers.OPTForCausalLM.from_pretrained(tmp_path).eval(), model)
    prune_neurons(model, fraction=1 / 36)
    assert hasattr(model.config, "pruned_layers")
