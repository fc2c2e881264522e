"""Stretched rotary positions, biases of queries, keys and values, and unequal layers of a pruned Llama."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning import head_importance, prunable_axes, prune_heads, prune_neurons, shrink
from tests.tolerances import close
from tests.transformer.test_hf import ids, ours, peer, rewrite, theirs
from transformer import MoEConfig, Transformer, TransformerConfig, generate
from transformer.hf import from_hugging_face, to_hugging_face
from transformer.rope import RopeScaling, frequencies

transformers = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}
# wavelengths of the 4 channel pairs at theta 50: 6, 17, 44, 118 positions; turns over 40: 6.4, 2.4, 0.9, 0.3
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 40}  # fmt: skip


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_positions_both_ways(rope, family, tmp_path):
    model = peer(family, rope_parameters=rope, rope_theta=None)
    model.save_pretrained(tmp_path / "in")
    read = from_hugging_face(tmp_path / "in")
    assert read.config.rope_scaling.kind == rope["rope_type"]
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)
    folder = to_hugging_face(read, tmp_path / "out", family=family)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(again), theirs(model), rtol=0, atol=0)
    assert from_hugging_face(folder).config == read.config
    read.save_pretrained(tmp_path / "own")
    own = Transformer.from_pretrained(tmp_path / "own")
    assert own.config == read.config and ours(own).equal(ours(read))
    rewrite(tmp_path / "in", rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    assert (ours(from_hugging_face(tmp_path / "in")) - theirs(model)).abs().max() > 1e-2, "the scaling matters"


def test_stored_frequencies_may_be_those_before_scaling(tmp_path):
    model = peer("llama", rope_parameters=LINEAR, rope_theta=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, plain = load_file(path), 50.0 ** -(torch.arange(0, 8, 2) / 8)
    for stored in (plain, plain / LINEAR["factor"]):
        save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": stored}, path)
        torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)


def test_configs_before_version_5_and_the_lengths_they_leave_out(tmp_path):
    model = peer("llama", rope_parameters=LLAMA3, rope_theta=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    scaling = {key: value for key, value in record.pop("rope_parameters").items() if key != "rope_theta"}
    path.write_text(json.dumps({**record, "rope_theta": 50.0, "rope_scaling": scaling}))
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)
    del scaling["original_max_position_embeddings"]
    path.write_text(json.dumps({**record, "rope_theta": 50.0, "rope_scaling": scaling}))
    assert from_hugging_face(tmp_path).config.rope_scaling.original_length == 64


def test_llama3_frequencies_are_kept_mixed_and_divided():
    plain = frequencies(8, theta=50.0)
    scaling = RopeScaling("llama3", 4.0, low_freq_factor=0.5, high_freq_factor=3.0, original_length=40)
    found = (frequencies(8, theta=50.0, scaling=scaling) / plain).tolist()
    assert found[0] == 1 and found[3] == 0.25 and 0.25 < found[2] < found[1] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "yarn"}, "kind must be one of linear, llama3, got 'yarn'"),
        ({"factor": 0.5}, "factor must be a finite number >= 1, got 0.5"),
        ({"low_freq_factor": 4.0}, "low_freq_factor < high_freq_factor must hold, got 4.0 and 4.0"),
        ({"original_length": 0}, "original_length must be >= 1, got 0"),
    ],
)
def test_bad_scaling_names_the_bound_and_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 2.0, **options})
    record = TransformerConfig.uniform(vocab_size=5, dim=8, num_layers=1, num_heads=2).to_dict()
    with pytest.raises(ValueError, match="unknown key 'facto' in config.rope_scaling; did you mean 'factor'"):
        TransformerConfig.from_dict({**record, "rope_scaling": {"kind": "linear", "facto": 2.0}})


def test_biases_learn_and_go_with_their_heads(tmp_path):
    model = peer("qwen2")
    model.save_pretrained(tmp_path)
    read = from_hugging_face(tmp_path)
    weight = torch.randn(3, 11, 53)
    (model(ids()).logits * weight).sum().backward()
    (read(ids()).logits * weight).sum().backward()
    for name in ("query", "key", "value"):
        linear = getattr(model.model.layers[1].self_attn, f"{name[0]}_proj")
        close(getattr(read.layers[1].attention, name).bias.grad, linear.bias.grad)
    with torch.no_grad():  # heads whose output is not read: their removal changes nothing
        for head in (3, 4, 5):
            read.layers[0].attention.output.weight[:, 4 * head : 4 * head + 4] = 0
    before = ours(read)
    shrink(read, prunable_axes(read), {"layers.0.attention.heads": [0, 1, 2]})
    assert read.layers[0].attention.query.bias.shape == (12,) and read.layers[0].attention.key.bias.shape == (4,)
    close(ours(read), before)


def pruned_peer(kept):
    model = peer("llama")
    with pytest.warns(UserWarning, match=r"differ in size .*from_hugging_face.*layerwise=True") as caught:
        shrink(model, prunable_axes(model), kept)
    assert len(caught) == 1, "one warning a pruning"
    return model


@pytest.mark.parametrize(
    "kept",
    [
        {"model.layers.1.self_attn.heads": [0, 4]},
        {"model.layers.0.self_attn.heads": [], "model.layers.2.mlp.neurons": [3, 4, 9]},
        {"model.layers.0.self_attn.heads": [3, 4, 5], "model.layers.1.mlp.neurons": []},
    ],
)
def test_unequal_layers_of_a_pruned_llama_are_read_here(kept, tmp_path):
    model = pruned_peer(kept)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    read = from_hugging_face(tmp_path)
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)
    close(generate(read, ids(2, 5), max_new_tokens=4), model.generate(ids(2, 5), max_new_tokens=4, do_sample=False))
    read.save_pretrained(tmp_path / "own")
    assert ours(Transformer.from_pretrained(tmp_path / "own")).equal(ours(read))
    with pytest.raises(ValueError, match="no family of transformers fits this model"):
        to_hugging_face(read, tmp_path / "back")


@pytest.mark.parametrize(("width", "recorded"), [(18, False), (17, True)])
def test_a_llama_of_another_width_is_read_here(width, recorded, tmp_path):
    model = peer("llama")
    axes = [axis for axis in prunable_axes(model) if axis.kind == "width"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if recorded else "error")
        shrink(model, axes, {axes[0].name: list(range(width))})
    assert hasattr(model.config, "pruned_width") is recorded
    model.save_pretrained(tmp_path)
    read = from_hugging_face(tmp_path)
    assert read.config.dim == width
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)


def test_layers_that_are_alike_again_lose_the_record_and_load_anywhere(tmp_path):
    model = pruned_peer({"model.layers.1.self_attn.heads": [0, 1, 2]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = {f"model.layers.{index}.self_attn.heads": [3, 4, 5] for index in (0, 2)}
        shrink(model, prunable_axes(model), kept)
        assert not hasattr(model.config, "pruned_layers") and model.config.num_attention_heads == 3
        prune_neurons(model, fraction=0.5, layerwise=True)
        scores = head_importance(model, [ids()])
        prune_heads(model, scores, fraction=0.34, layerwise=True)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(again), theirs(model), rtol=0, atol=0)
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)


def test_every_second_layer_has_experts(tmp_path):
    model = peer("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[], num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    read = from_hugging_face(tmp_path)
    kinds = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert [isinstance(layer.feedforward, MoEConfig) for layer in read.config.layers] == kinds == [False, True] * 2
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)


def test_a_matrix_of_a_part_that_was_pruned_away_is_not_dropped(tmp_path):
    """Only its norm and matrices without an entry may stay in the file."""
    pruned_peer({"model.layers.0.self_attn.heads": []}).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = {**load_file(path), name: torch.ones(0, 24)}
    assert "model.layers.0.input_layernorm.weight" in tensors
    save_file(tensors, path)
    assert from_hugging_face(tmp_path).config.layers[0].attention is None
    save_file({**tensors, name: torch.ones(8, 24)}, path)
    with pytest.raises(ValueError, match=f"unused: {name}"):
        from_hugging_face(tmp_path)
