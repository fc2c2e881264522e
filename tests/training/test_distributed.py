"""One process equals many: losses, gradient norms, loads and weights of short runs in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tolerances import close
from tests.training.distributed_cases import LAYOUTS, ROUTED, RUNS, STEPS, keep_gradients, make_trainer, without_clock
from tests.training.same_weights import same_weights
from tests.training.spawning import spawn

CASES = {1: ["runs"], 2: ["runs", "holds", "fails"], 3: ["runs", "fails"], 4: ["runs"]}
EXACT = ("step", "tokens", "lr", "loads", "dropped")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Metrics, held-out loss and a sample before the last step, first gradients and last weights in one process."""
    found = {}
    for name in RUNS:
        apart = {"accumulation": 2} if name in ROUTED else {}
        trainer = make_trainer(name, tmp_path_factory.mktemp(name), **apart)
        gradients = keep_gradients(trainer)
        lines = [without_clock(trainer.train_step()) for _ in range(STEPS - 1)]
        record = {"lines": lines, "held_out": trainer.evaluate().loss, "sample": trainer.sample()}
        lines.append(without_clock(trainer.train_step()))
        assert name != "epochs" or trainer.batches.epoch > 2
        found[name] = record, trainer.model.state_dict() | {f"gradient of {key}": g for key, g in gradients.items()}
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_train_as_one_process(world: int, tmp_path: Path, alone: Any) -> None:
    spawn("tests.training.distributed_ranks", world, tmp_path, *CASES[world])
    for layout in LAYOUTS[world]:
        # load balance in two micro-batches is over other halves of the batch
        averaged = ("loss", "grad_norm", "z", "entropy", *(["aux"] * ("accumulation" not in RUNS[layout.run].train)))
        compare(tmp_path / f"{layout}.json", *alone[layout.run], averaged=averaged)


def compare(file: Path, record: dict[str, Any], tensors: dict[str, Tensor], *, averaged: tuple[str, ...]) -> None:
    found = json.loads(file.read_text())
    close(torch.tensor(found["held_out"]), torch.tensor(record["held_out"]))
    assert found["sample"] == record["sample"]
    assert len(found["lines"]) == len(record["lines"])
    for mine, wanted in zip(found["lines"], record["lines"], strict=True):
        assert mine.keys() == wanted.keys()
        assert {key: mine[key] for key in EXACT} == {key: wanted[key] for key in EXACT}, file.name
        for key in averaged:
            close(torch.tensor(mine[key]), torch.tensor(wanted[key]))
    saved = load_file(file.with_suffix(".safetensors"))
    assert saved.keys() == tensors.keys()
    for key, tensor in tensors.items():
        same_weights(key, saved[key], tensor)
