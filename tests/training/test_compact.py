"""Own models through compact folders: equal in every tensor, smaller, tied once, and read back without being given."""

import pytest
import torch

from pruning import sparsify
from pruning.formats import load_compact, save_compact
from training.compact import load_compact_transformer
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig


def build(kind, seed=0):
    feedforward = MoEConfig(hidden=16, num_experts=4, router="sigmoid") if kind == "moe" else DenseConfig(hidden=24)
    config = TransformerConfig.uniform(
        vocab_size=31, dim=16, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32, feedforward=feedforward,
        tied=kind != "untied",
    )  # fmt: skip
    return Transformer(config, generator=torch.Generator().manual_seed(seed)).eval()


@pytest.mark.parametrize("kind", ["dense", "moe", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_comes_back_in_fewer_bytes(tmp_path, kind, dtype):
    model = build(kind).to(dtype)
    sparsify(model, sparsity=0.9)
    report = save_compact(model, tmp_path)
    again = load_compact_transformer(tmp_path)
    assert again.config == model.config and not again.training
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items())
    ids = torch.arange(12).view(2, 6)
    assert again(ids).logits.equal(model(ids).logits)
    sparse = [row for row in report.tensors if row.format != "dense"]
    assert sparse and all(row.bytes < row.dense_bytes / 3 for row in sparse)
    if kind == "moe":
        assert {row.name for row in sparse} >= {f"layers.0.feedforward.experts.{name}" for name in ("up", "down")}
    tied = sum("embedding" in row.name or "head" in row.name for row in report.tensors)
    assert tied == (2 if kind == "untied" else 1)
    assert list(tmp_path.iterdir()) and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_to_four_experts_use_the_pattern_of_their_inputs(tmp_path):
    model = build("moe")
    sparsify(model, structure="1:4")
    report = save_compact(model, tmp_path)
    assert {row.format for row in report.tensors if ".experts." in row.name} == {"1:4"}
    assert load_compact_transformer(tmp_path)(torch.arange(6)[None]).logits.equal(model(torch.arange(6)[None]).logits)


def test_another_model_is_refused_and_stays_as_it_was(tmp_path):
    save_compact(build("dense"), tmp_path)
    other = build("moe")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the model: layers.0.feedforward.down.weight is unknown"):
        load_compact(tmp_path, other)
    assert all(tensor.equal(before[name]) for name, tensor in other.state_dict().items())


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_compact_transformer(tmp_path)
