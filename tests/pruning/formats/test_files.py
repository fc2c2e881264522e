"""Any module through a compact file: ties, dtypes and values stay; what is damaged or of another model is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pruning import sparsify
from pruning.formats import load_compact, read_compact, save_compact
from pruning.formats.files import FILE
from tests.pruning.toy import tokens, toy


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, *, tensors=None, **changes):
    held = {name: tensor.clone() for name, tensor in load_file(path).items()} if tensors is None else tensors
    save_file(held, path, metadata=metadata(path) | changes)


def saved(folder, sparsity=0.8):
    model = toy((2, 1, 6))
    sparsify(model, sparsity=sparsity)
    return model, save_compact(model, folder)


def test_a_module_comes_back_with_its_ties(tmp_path):
    model, report = saved(tmp_path)
    again = load_compact(tmp_path, toy((2, 1, 6), seed=1))
    assert again.head.weight is again.embedding.weight
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again(tokens()).equal(model(tokens()))
    assert [row.name for row in report.tensors if "embedding" in row.name or "head" in row.name] == ["embedding.weight"]
    assert report.dense_bytes == sum(p.numel() * 8 for p in model.parameters())
    assert report.file_bytes == (tmp_path / FILE).stat().st_size


def test_the_table_says_format_density_and_bytes(tmp_path):
    _, report = saved(tmp_path)
    lines = str(report).splitlines()
    row = next(row for row in report.tensors if row.name == "feedforward.0.down.weight")
    assert row.density == pytest.approx(0.2, abs=0.02) and row.bytes < row.dense_bytes / 3
    line = next(line for line in lines if line.startswith(row.name))
    assert row.format in line and f"{row.density:.2%}" in line and f"{row.bytes:,}" in line
    assert lines[-1].startswith(f"{report.dense_bytes:,} bytes dense, {report.file_bytes:,} in the file")


def test_a_builder_gets_the_folder_and_dtypes_come_from_the_file(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)).bfloat16()
    model.register_buffer("steps", torch.tensor(7))
    save_compact(model, tmp_path)
    asked = []

    def build(folder):
        asked.append(folder)
        fresh = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        fresh.register_buffer("steps", torch.tensor(0))
        return fresh

    again = load_compact(tmp_path, build)
    assert asked == [tmp_path] and again.steps == 7 and again[0].weight.dtype == torch.bfloat16
    assert again[0].weight.equal(model[0].weight) and isinstance(again[0].weight, nn.Parameter)
    assert again[0].weight.requires_grad


def test_hugging_face_models_through_their_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    sparsify(model, sparsity=0.9)
    report = save_compact(model, tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    again = load_compact(tmp_path, transformers.AutoModelForCausalLM.from_config(read)).eval()
    ids = torch.arange(8)[None]
    assert again(ids).logits.equal(model(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert sum(row.shape == (32, 16) for row in report.tensors) == 1


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    saved(tmp_path)
    model, _ = saved(tmp_path, sparsity=0.5)
    assert load_compact(tmp_path, toy((2, 1, 6))).head.weight.equal(model.head.weight)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    model, _ = saved(tmp_path)
    before = (tmp_path / FILE).read_bytes()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("pruning.formats.files.save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        save_compact(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_cut_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder that save_compact wrote"):
        read_compact(tmp_path)
    saved(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for cut in (3, 200, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            read_compact(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="must be 'sparse-transformers compact 1', got None"):
        read_compact(tmp_path)


def test_a_flipped_bit_is_found(tmp_path):
    saved(tmp_path)
    whole = bytearray((tmp_path / FILE).read_bytes())
    whole[-3] ^= 1
    (tmp_path / FILE).write_bytes(whole)
    with pytest.raises(ValueError, match="checksum of .* does not match"):
        read_compact(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"tensors": None}, {"tensors": "[]"}, {"tensors": "{"}, {"aliases": "{"}, {"dtype": "complex"}]
)
def test_headers_that_make_no_sense_are_refused(tmp_path, changes):
    saved(tmp_path)
    path = tmp_path / FILE
    described = json.loads(metadata(path)["tensors"])
    held = {name: tensor.clone() for name, tensor in load_file(path).items()}
    if changes.get("tensors", "") is None:
        del held["embedding.weight/values"]
    elif "dtype" in changes:
        described["embedding.weight"]["dtype"] = "no_such_type"
        changes = {"tensors": json.dumps(described)}
    save_file(held, path, metadata=metadata(path) | {k: v for k, v in changes.items() if v is not None})
    with pytest.raises(ValueError, match="is damaged"):
        read_compact(tmp_path)


def test_shapes_and_ties_of_another_model_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the model: feedforward.0.down.weight must be \[8, 7\], got"):
        load_compact(tmp_path, toy((2, 1, 7)))
    pair = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    save_compact(pair, tmp_path)
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="ties tensors that differ in the file"):
        load_compact(tmp_path, tied)
    save_compact(tied, tmp_path)
    loaded = load_compact(tmp_path, pair)
    assert loaded[1].weight.equal(tied[0].weight) and loaded[0].weight.data_ptr() != loaded[1].weight.data_ptr()
