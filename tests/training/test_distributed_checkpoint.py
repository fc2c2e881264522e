"""What some ranks saved others go on from, to the same losses; damage and other models are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import close
from tests.training.distributed_cases import RESUMED, SAVED, SAVED_STEP, STEPS, make_trainer, without_clock
from tests.training.spawning import spawn
from training.checkpoint import checkpoints, latest_checkpoint, verify
from training.trainer import CHECKPOINTS
from transformer import Transformer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of SAVED by 4 ranks, and those that 2 and 3 ranks went on from."""
    folder = tmp_path_factory.mktemp("saved")
    spawn("tests.training.distributed_ranks", 4, folder, "saves")
    for world in RESUMED:
        (folder / "store").unlink()
        spawn("tests.training.distributed_ranks", world, folder, "resumes")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone")
    make_trainer("moe", out).run()
    return lines(out)


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in read if "loss" in line]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert mine["tokens"] == other["tokens"] and mine["loads"] == other["loads"]
        for key in ("loss", "grad_norm", "aux"):
            close(torch.tensor(mine[key]), torch.tensor(other[key]))


def test_saved_by_four_goes_on_in_one_two_and_three(saved: Path, alone: list[dict[str, Any]], tmp_path: Path) -> None:
    for name, _, shard in SAVED:
        same(lines(saved / f"{name}-{shard}"), alone)
        for world, layouts in RESUMED.items():
            for expert_parallel, other in layouts:
                same(lines(saved / f"{name}-{shard}-{world}-{expert_parallel}-{other}"), alone[SAVED_STEP:])
        trainer = make_trainer(name, tmp_path / shard)
        trainer.resume(saved / f"{name}-{shard}" / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        trainer.run()
        same(lines(tmp_path / shard), alone[SAVED_STEP:])


def test_the_last_checkpoint_is_a_whole_model(saved: Path, tmp_path: Path) -> None:
    trainer = make_trainer("moe", tmp_path)
    trainer.run()
    for name, _, shard in SAVED:
        last = latest_checkpoint(saved / f"{name}-{shard}" / CHECKPOINTS)
        assert last is not None and last.name == f"step-{STEPS:08d}"
        verify(last)
        model = Transformer.from_pretrained(last)
        for key, tensor in trainer.model.state_dict().items():
            close(model.state_dict()[key], tensor)


def test_damage_and_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    name, _, shard = SAVED[0]
    folder = tmp_path / "step-00000003"
    shutil.copytree(saved / f"{name}-{shard}" / CHECKPOINTS / folder.name, folder)
    with pytest.raises(ValueError, match="is of another shape: layers.0.feedforward.gate.weight is absent"):
        make_trainer("dense", tmp_path / "out").resume(folder)
    part = next(folder.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match="it was cut short"):
        make_trainer("moe", tmp_path / "out").resume(folder)


def test_an_unfinished_checkpoint_is_none(saved: Path) -> None:
    name, _, shard = SAVED[0]
    root = saved / f"{name}-{shard}" / CHECKPOINTS
    assert [path.name for path in checkpoints(root)] == [f"step-{SAVED_STEP:08d}", f"step-{STEPS:08d}"]
    assert not list(root.glob(".writing-*"))
