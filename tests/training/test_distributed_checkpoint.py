"""What some ranks saved others go on from, to the same losses; damage and other models are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import close
from tests.training.distributed_cases import (
    RESUMED,
    SAVED,
    SAVED_STEP,
    STEPS,
    make_trainer,
    resumed,
    without_clock,
)
from tests.training.same_weights import same_weights
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
        (folder / "store").unlink(missing_ok=True)
        spawn("tests.training.distributed_ranks", world, folder, "resumes")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    """Metrics and last weights of the runs in SAVED, in one process."""
    found = {}
    for name in {layout.run for layout in SAVED}:
        trainer = make_trainer(name, tmp_path_factory.mktemp(name))
        trainer.run()
        found[name] = lines(trainer.out), trainer.model.state_dict()
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [without_clock(line) for line in read if "loss" in line]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for mine, other in zip(found, wanted, strict=True):
        assert mine["tokens"] == other["tokens"] and mine["loads"] == other["loads"]
        for key in ("loss", "grad_norm", "aux"):
            close(torch.tensor(mine[key]), torch.tensor(other[key]))


def test_saved_by_four_goes_on_in_one_two_and_three(saved: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    for layout in SAVED:
        wanted, _ = alone[layout.run]
        same(lines(saved / str(layout)), wanted)
        for world in RESUMED:
            for other in resumed(layout, world):
                same(lines(saved / f"{layout}-to-{world}-{other}"), wanted[SAVED_STEP:])
        trainer = make_trainer(layout.run, tmp_path / str(layout))
        trainer.resume(saved / str(layout) / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
        trainer.run()
        same(lines(trainer.out), wanted[SAVED_STEP:])


def test_the_last_checkpoint_is_a_whole_model(saved: Path, alone: dict[str, Any]) -> None:
    for layout in SAVED:
        last = latest_checkpoint(saved / str(layout) / CHECKPOINTS)
        assert last is not None and last.name == f"step-{STEPS:08d}"
        verify(last)
        model = Transformer.from_pretrained(last)
        for key, tensor in alone[layout.run][1].items():
            same_weights(key, model.state_dict()[key], tensor)


def test_damage_and_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    shutil.copytree(saved / str(SAVED[0]) / CHECKPOINTS / folder.name, folder)
    with pytest.raises(ValueError, match="is of another shape: layers.0.feedforward.gate.weight is absent"):
        make_trainer("dense", tmp_path / "out").resume(folder)
    part = next(folder.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match="it was cut short"):
        make_trainer("moe", tmp_path / "out").resume(folder)


def test_an_unfinished_checkpoint_is_none(saved: Path) -> None:
    root = saved / str(SAVED[0]) / CHECKPOINTS
    assert [path.name for path in checkpoints(root)] == [f"step-{SAVED_STEP:08d}", f"step-{STEPS:08d}"]
    assert not list(root.glob(".writing-*"))
