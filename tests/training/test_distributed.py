"""One process equals many: losses, gradient norms, loads and weights of short runs in every layout."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tolerances import close
from tests.training.distributed_cases import (
    LAYOUTS,
    ROUTED,
    RUNS,
    STEPS,
    keep_gradients,
    make_trainer,
    sampled,
    without_clock,
)
from tests.training.same_weights import same_weights
from tests.training.spawning import spawn

CASES = {1: ["runs"], 2: ["runs", "holds", "fails_behind", "fails"], 3: ["runs", "fails"], 4: ["runs", "doubles"]}
EXACT = ("step", "tokens", "lr", "loads")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]:
    """Metrics, held-out loss and a sample before the last step, first gradients and last weights in one process.

    parts: into how many runs of rows ranks split a batch whose tokens are routed apart."""

    @cache
    def run(name: str, parts: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        trainer = make_trainer(
            name, tmp_path_factory.mktemp(name), **({} if parts is None else {"accumulation": parts})
        )
        gradients = keep_gradients(trainer)
        lines = [without_clock(trainer.train_step()) for _ in range(STEPS - 1)]
        record = {"lines": lines, "held_out": trainer.evaluate().loss, "sample": sampled(trainer)}
        lines.append(without_clock(trainer.train_step()))
        assert name != "epochs" or trainer.batches.epoch > 2
        return record, trainer.model.state_dict() | {f"gradient of {key}": g for key, g in gradients.items()}

    return run


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_train_as_one_process(world: int, tmp_path: Path, alone: Any) -> None:
    spawn("tests.training.distributed_ranks", world, tmp_path, *CASES[world])
    for layout in LAYOUTS[world]:
        # load balance in two micro-batches is over other halves of the batch
        averaged = ["loss", "grad_norm", "z", "entropy", "dropped"]
        averaged += ["aux"] * ("accumulation" not in RUNS[layout.run].train)
        record, tensors = alone(layout.run, world if layout.run in ROUTED else None)
        compare(tmp_path / f"{layout}.json", record, tensors, averaged=averaged)


def compare(file: Path, record: dict[str, Any], tensors: dict[str, Tensor], *, averaged: list[str]) -> None:
    """As close as the type of the weights allows, loads to the token."""
    found = json.loads(file.read_text())
    number = partial(torch.tensor, dtype=next(iter(tensors.values())).dtype)
    close(number(found["held_out"]), number(record["held_out"]))
    assert found["sample"] == record["sample"]
    assert len(found["lines"]) == len(record["lines"])
    for mine, wanted in zip(found["lines"], record["lines"], strict=True):
        assert mine.keys() == wanted.keys()
        assert {key: mine[key] for key in EXACT} == {key: wanted[key] for key in EXACT}, file.name
        for key in averaged:
            close(number(mine[key]), number(wanted[key]))
    saved = load_file(file.with_suffix(".safetensors"))
    assert saved.keys() == tensors.keys()
    for key, tensor in tensors.items():
        same_weights(key, saved[key], tensor)
