"""Methods that learn while they prune: two processes, in replicas or with a part of the weights each, train to the
masks and weights of one, and others go on from their checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import close
from tests.training.distributed_cases import Layout
from tests.training.replica_cases import BOTH, CASES, MOVED, REPLICAS, SAVED, found, name_of, saved, trainer_of
from tests.training.spawning import spawn
from training.config import RunConfig, from_dict
from training.distributed.agreement import require_methods


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    spawn("tests.training.replica_cases", 2, folder, *(name_of(*case) for case in CASES))
    return folder


def losses(out: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def same(theirs: dict[str, torch.Tensor], mine: dict[str, torch.Tensor]) -> None:
    """Masks equal, weights within 1e-5."""
    assert theirs.keys() == mine.keys()
    for name, tensor in mine.items():
        if tensor.dtype == torch.bool:
            assert theirs[name].equal(tensor), name
        else:
            torch.testing.assert_close(theirs[name], tensor.detach(), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("method", "layout"), CASES, ids=str)
def test_two_processes_are_as_one_and_one_goes_on_from_their_checkpoint(
    two: Path, tmp_path: Path, method: str, layout: Layout
) -> None:
    out = two / name_of(method, layout)
    alone = trainer_of(method, layout.run, tmp_path / "alone", save_every=100)
    alone.run()
    close(losses(out), losses(alone.out))
    mine = found(alone)
    zeros = sum(int((~mask).sum()) for name, mask in mine.items() if name.startswith("mask of"))
    assert (zeros > 0) == (method != "dsd"), "the method prunes"
    same(load_file(out / "last.safetensors"), mine)
    if layout == BOTH and method in MOVED:
        same(load_file(out / "moved.safetensors"), mine)
    if layout == REPLICAS:
        return
    again = trainer_of(method, layout.run, tmp_path / "again", save_every=100)
    again.resume(saved(out))
    again.run()
    close(losses(again.out), losses(out)[SAVED:])
    same(found(again), mine)


@pytest.mark.parametrize("method", ["rigl", "snfs", "nest"])
def test_growth_by_gradients_that_are_held_back_is_refused(method: str) -> None:
    values = {"sparsify": {"method": method, "sparsity": 0.5}, "distributed": {"compression": "topk"}}
    with pytest.raises(ValueError, match=f"compression must be 'none' with sparsify.method='{method}', got 'topk'"):
        require_methods(from_dict(RunConfig, values, where=""))
