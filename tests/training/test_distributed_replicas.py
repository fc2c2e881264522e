"""Methods that need whole matrices: two replicas train to the masks and losses of one process, and resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import close
from tests.training.distributed_cases import SAVED_STEP
from tests.training.replica_cases import METHODS, trainer_of
from tests.training.spawning import spawn
from training.config import RunConfig, from_dict
from training.distributed.agreement import require_methods
from training.trainer import CHECKPOINTS


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn("tests.training.replica_cases", 2, folder, *METHODS)
    return folder


def losses(out: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


@pytest.mark.parametrize("method", METHODS)
def test_two_replicas_are_as_one_process_and_one_goes_on_from_their_checkpoint(
    two: Path, tmp_path: Path, method: str
) -> None:
    alone = trainer_of(method, tmp_path / "alone")
    alone.run()
    close(losses(two / method), losses(alone.out))
    theirs, differing, total = load_file(two / method / "last.safetensors"), 0, 0
    for name, parameter in alone.model.named_parameters():
        differing += int(((parameter == 0) != (theirs[name] == 0)).sum())
        total += parameter.numel()
    assert differing <= 0.005 * total, "all but near ties"
    again = trainer_of(method, tmp_path / "again")
    again.resume(two / method / CHECKPOINTS / f"step-{SAVED_STEP:08d}")
    again.run()
    close(losses(again.out), losses(two / method)[SAVED_STEP:])


@pytest.mark.parametrize("part", [{"shard": "fsdp"}, {"expert_parallel": 2}, {"tensor_parallel": 2}])
def test_what_splits_a_matrix_is_refused(part: dict) -> None:
    config = from_dict(RunConfig, {"sparsify": {"sparsity": 0.5, "method": "feedback"}, "distributed": part}, where="")
    (name,), whole = part, "none" if "shard" in part else 1
    with pytest.raises(ValueError, match=f"distributed.{name} must be {whole!r} with sparsify.method='feedback', got"):
        require_methods(config)


def test_noise_of_single_activations_is_refused() -> None:
    config = from_dict(RunConfig, {"sparsify": {"method": "variational"}}, where="")
    with pytest.raises(ValueError, match="sparsify.method must not be 'variational' with several processes"):
        require_methods(config)


@pytest.mark.parametrize("method", ["rigl", "snfs", "nest"])
def test_growth_by_gradients_that_are_held_back_is_refused(method: str) -> None:
    values = {"sparsify": {"method": method, "sparsity": 0.5}, "distributed": {"compression": "topk"}}
    with pytest.raises(ValueError, match=f"compression must be 'none' with sparsify.method='{method}', got 'topk'"):
        require_methods(from_dict(RunConfig, values, where=""))
