"""Checkpoints are whole or absent, say what is wrong with them, and give back every bit."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.models import small_model, small_trainer
from training.checkpoint import (
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    optimizer_tensors,
)
from training.durable import replace_durably, write_durably
from training.optim import Optimizers
from training.state import join_tensors, random_state, set_random_state, split_tensors
from training.tokenizer import load_tokenizer
from training.trainer import Trainer
from transformer import Transformer


@pytest.fixture
def trained(tmp_path: Path) -> Trainer:
    trainer = small_trainer(tmp_path, train={"steps": 10, "eval_every": 100})
    trainer.run()
    return trainer


def root_of(trainer: Trainer) -> Path:
    return trainer.out / "checkpoints"


def test_every_tensor_comes_back(trained: Trainer) -> None:
    fresh = small_trainer(trained.out, model=small_model(dropout=0.1))
    fresh.resume(latest_checkpoint(root_of(trained)))
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name
    saved = optimizer_tensors(trained.optimizers, model=trained.model)
    loaded = optimizer_tensors(fresh.optimizers, model=fresh.model)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert len(saved) == 3 * len(list(trained.model.parameters()))
    assert (fresh.step, fresh.tokens, fresh.batches.consumed) == (10, 10 * 64, 40)


def test_a_checkpoint_is_a_model_folder(trained: Trainer) -> None:
    folder = latest_checkpoint(root_of(trained))
    model = Transformer.from_pretrained(folder)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, trained.model.eval()(ids).logits)
    assert load_tokenizer(folder).to_json() == trained.data.tokenizer.to_json()
    assert not [path for path in folder.iterdir() if path.suffix in {".pt", ".pth", ".pkl", ".bin"}]


def test_the_newest_are_kept(trained: Trainer) -> None:
    assert [path.name for path in checkpoints(root_of(trained))] == ["step-00000005", "step-00000010"]
    trained.step = 12
    trained.save()
    assert [path.name for path in checkpoints(root_of(trained))] == ["step-00000010", "step-00000012"]
    trained.step = 11  # gone on from an earlier one: later ones are neither counted nor touched
    trained.save()
    assert latest_checkpoint(root_of(trained)).name == "step-00000011"
    assert [path.name for path in checkpoints(root_of(trained))] == ["step-00000010", "step-00000011", "step-00000012"]
    trained.save()
    assert [path.name for path in checkpoints(root_of(trained))] == ["step-00000010", "step-00000011", "step-00000012"]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_a_truncated_file_is_refused_and_the_previous_checkpoint_named(trained: Trainer, name: str) -> None:
    file = latest_checkpoint(root_of(trained)) / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes of \d+: it was cut short; .*step-00000005"):
        trained.resume(file.parent)


def test_other_damage_is_refused(trained: Trainer) -> None:
    folder = latest_checkpoint(root_of(trained))
    raw = bytearray((folder / MODEL).read_bytes())
    raw[-5] ^= 1
    (folder / MODEL).write_bytes(raw)
    with pytest.raises(ValueError, match="hash differs"):
        trained.resume(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        trained.resume(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"names step-00000010, which is not there: .*step-00000005"):
        latest_checkpoint(root_of(trained))


def test_a_truncated_manifest_is_named(trained: Trainer) -> None:
    manifest = latest_checkpoint(root_of(trained)) / MANIFEST
    manifest.write_text(manifest.read_text()[:50])
    with pytest.raises(ValueError, match=r"manifest\.json was cut short or is not JSON .*--checkpoint .*step-00000005"):
        trained.resume(manifest.parent)


def test_an_empty_latest_falls_back_to_the_newest_whole_checkpoint(trained: Trainer) -> None:
    root = root_of(trained)
    (root / LATEST).write_text("")
    assert latest_checkpoint(root).name == "step-00000010"
    manifest = root / "step-00000010" / MANIFEST
    manifest.write_text(manifest.read_text()[:50])
    assert latest_checkpoint(root).name == "step-00000005"
    (root / "step-00000005" / MANIFEST).unlink()
    assert latest_checkpoint(root) is None


def test_a_checkpoint_of_another_shape_is_refused_and_changes_nothing(trained: Trainer) -> None:
    folder = latest_checkpoint(root_of(trained))
    other = small_model(dim=32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"another shape: embedding.weight is \[257, 16\].* \[257, 32\]"):
        load_checkpoint(folder, model=other, optimizers=Optimizers(torch.optim.AdamW(other.parameters())))
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="is of another shape"):
        small_trainer(trained.out, model=small_model(layers=3)).resume(folder)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    def full_at_ten(path: Path, content: bytes) -> None:
        if "00000010" in path.parent.name and path.name == OPTIMIZER:
            path.write_bytes(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_durably(path, content)

    trainer = small_trainer(tmp_path, write=full_at_ten)
    with pytest.raises(OSError, match=r"disk full .* while writing .*step-00000010; .*step-00000005 is intact"):
        trainer.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step-00000005"]
    again = small_trainer(tmp_path)
    again.resume(latest_checkpoint(tmp_path / "checkpoints"))
    assert again.step == 5


def test_no_room_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="0 MiB free, a checkpoint needs about"):
        small_trainer(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_state_survives_json(value: Any) -> None:
    nested = {"value": value, "tensors": [torch.arange(3), {"mask": torch.tensor([True, False])}]}
    plain, tensors = split_tensors(nested)
    again = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert again["value"] == value
    assert torch.equal(again["tensors"][0], torch.arange(3))
    assert again["tensors"][1]["mask"].tolist() == [True, False]


def test_state_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match="state keys must be text, got 3"):
        split_tensors({"a": {3: 1}})
    with pytest.raises(TypeError, match="'a' must be a tensor, number, text, list or dict, got set"):
        split_tensors({"a": {1}})


def test_all_generators_go_on_where_they_were() -> None:
    import random

    torch.rand(1), random.random(), np.random.rand()  # no longer where the seed of the tests put them
    plain, tensors = split_tensors(random_state())
    drawn = torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()
    set_random_state(join_tensors(json.loads(json.dumps(plain)), tensors))
    again = torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()
    assert drawn == again


def test_a_failed_replacement_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "latest"
    replace_durably(file, b"old")
    with pytest.raises(TypeError):
        replace_durably(file, "not bytes")  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
