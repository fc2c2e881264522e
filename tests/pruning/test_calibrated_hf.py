"""Calibrated pruning of small random Hugging Face models."""

import copy

import pytest
import torch

from pruning import prunable_weights, sparsify
from pruning.calibrated import layer_hessian, prune_calibrated, sparsegpt
from tests.tolerances import close

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
IDS = [torch.randint(53, (2, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def peer(family, **options):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**options)
    return getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()


def rows_of(model, name):
    rows = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: rows.append(args[0]))
    with torch.no_grad():
        for ids in IDS:
            model(ids)
    handle.remove()
    return torch.cat([row.flatten(0, -2) for row in rows]).double()


def test_llama_layer_by_layer_on_the_pruned_prefix():
    dense = peer("Llama", **SIZES)
    model = copy.deepcopy(dense)
    report = prune_calibrated(model, IDS, method="sparsegpt", sparsity=0.5, dtype=torch.float64)
    assert report.sequential and model.config.use_cache and report.masks.sparsity == 0.5
    half = copy.deepcopy(dense)
    half.model.layers[0].load_state_dict(model.model.layers[0].state_dict())
    for start, name in ((dense, "model.layers.0.mlp.down_proj"), (half, "model.layers.1.self_attn.q_proj")):
        x, weight = rows_of(start, name), dense.get_submodule(name).weight.detach().double()
        expected = sparsegpt(weight, layer_hessian(x.mT @ x, len(x)), weight.numel() // 2)[0]
        close(model.get_submodule(name).weight, expected, torch.float32)
    changed = {name for name, value in model.state_dict().items() if not value.equal(dense.state_dict()[name])}
    assert changed == set(prunable_weights(dense))


def test_padding_and_masks_are_replayed():
    mask = torch.ones_like(IDS[0])
    mask[1, :4] = 0
    report = prune_calibrated(peer("Llama", **SIZES), [{"input_ids": IDS[0], "attention_mask": mask}], sparsity=0.5)
    assert {matrix.rows for matrix in report.matrices} == {18}


def test_mixtral_expert_by_expert():
    model = peer("Mixtral", **SIZES, num_local_experts=3, num_experts_per_tok=2)
    report = prune_calibrated(model, IDS, method="wanda", structure="2:4")
    rows = {matrix.name: matrix.rows for matrix in report.matrices}
    stacks = [name for name, weight in prunable_weights(model).items() if weight.ndim == 3]
    assert len(stacks) == 4
    for name in stacks:
        assert sum(rows[f"{name}[{expert}]"] for expert in range(3)) == 66 * 2
        assert (report.masks.kept[name].unflatten(2, (-1, 4)).sum(-1) == 2).all()


def test_gpt2_weights_are_stored_transposed():
    model = peer("GPT2", vocab_size=53, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2,
                 bos_token_id=None, eos_token_id=None)  # fmt: skip
    dense = copy.deepcopy(model)
    names = [name for name, p in model.named_parameters() if name.startswith("transformer.h") and p.ndim == 2]
    report = prune_calibrated(model, IDS, method="sparsegpt", structure="2:4", dtype=torch.float64)
    assert report.sequential and len(names) == 8 and report.masks.kept.keys() == set(names)
    kept = report.masks.kept["transformer.h.1.mlp.c_fc.weight"]
    assert kept.shape == (24, 96) and (kept.unflatten(0, (-1, 4)).sum(1) == 2).all()
    name = "transformer.h.0.mlp.c_proj"
    x, weight = rows_of(dense, name), dense.get_submodule(name).weight.detach().double().mT
    expected = sparsegpt(weight, layer_hessian(x.mT @ x, len(x)), weight.numel() // 2, groups=(2, 4))[0]
    close(model.get_submodule(name).weight.mT, expected, torch.float32)
    other = copy.deepcopy(dense)
    assert sparsify(other, sparsity=0.25).zeros == sum(dense.get_parameter(name).numel() // 4 for name in names)
    assert sparsify(dense, structure="2:4").kept[f"{name}.weight"].unflatten(0, (-1, 4)).sum(1).eq(2).all()
