"""One process equals many: losses, gradient norms, loads and weights of short runs in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tolerances import close
from tests.training.distributed_cases import LAYOUTS, ROUTED, RUNS, STEPS, make_trainer, without_clock
from tests.training.spawning import spawn

EXACT = ("step", "tokens", "lr", "loads", "dropped")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Any]], float, dict[str, Tensor]]]:
    """Metrics, held-out loss before the last step, and last weights of every run in one process."""
    found = {}
    for name in RUNS:
        apart = {"accumulation": 2} if name in ROUTED else {}
        trainer = make_trainer(name, tmp_path_factory.mktemp(name), **apart)
        lines = [without_clock(trainer.train_step()) for _ in range(STEPS - 1)]
        held_out = trainer.evaluate().loss
        lines.append(without_clock(trainer.train_step()))
        found[name] = lines, held_out, trainer.model.state_dict()
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_train_as_one_process(world: int, tmp_path: Path, alone: Any) -> None:
    spawn("tests.training.distributed_ranks", world, tmp_path, "runs")
    for name, expert_parallel, shard in LAYOUTS[world]:
        compare(tmp_path / f"{name}-{world}-{expert_parallel}-{shard}.json", *alone[name])


def compare(file: Path, lines: list[dict[str, Any]], held_out: float, weights: dict[str, Tensor]) -> None:
    found = json.loads(file.read_text())
    close(torch.tensor(found["held_out"]), torch.tensor(held_out))
    assert len(found["lines"]) == len(lines)
    for mine, wanted in zip(found["lines"], lines, strict=True):
        assert mine.keys() == wanted.keys()
        assert {key: mine[key] for key in EXACT} == {key: wanted[key] for key in EXACT}, file.name
        # load balance in two micro-batches is over other halves of the batch
        for key in ("loss", "grad_norm", "z", "entropy", *(() if "sigmoid" in file.name else ("aux",))):
            close(torch.tensor(mine[key]), torch.tensor(wanted[key]))
    saved = load_file(file.with_suffix(".safetensors"))
    assert saved.keys() == weights.keys()
    for key, tensor in weights.items():
        close(saved[key], tensor)
