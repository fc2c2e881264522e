import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.typecheck import unchecked
from training import compress_gradients
from training.compression import GradientCompressor

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_reduce_what_the_loops_say(world, tmp_path):
    """Every method against loops over ranks and entries, six steps of training: see compression_ranks.py."""
    command = [sys.executable, "-m", "tests.training.compression_ranks"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(world), str(tmp_path / "store")], env=environment, cwd=ROOT)
        for rank in range(world)
    ]
    try:
        assert [process.wait(170) for process in running] == [0] * world
    finally:
        for process in running:
            process.kill()


def compressor(method, **options):
    settings = {"density": 0.5, "threshold": 1.0, "bin_size": 4, "momentum": 0.9, "clip": None, "warmup": 0, "seed": 0}
    return GradientCompressor({}, method, **(settings | options))


def test_the_largest_go_by_size_and_not_by_place():
    sent = compressor("topk").compress("w", torch.tensor([0.1, -5.0, 0.2, 4.0]))
    assert sorted(sent.index.tolist()) == [1, 3]


def test_dgc_falls_to_its_density():
    made = compressor("dgc", density=0.001, warmup=10)
    shares = []
    for made.step in range(12):
        shares.append(made.present_density())
    assert shares == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [0.004] * 2 + [0.001] * 4


def test_every_method_with_a_density_can_warm_up():
    made = compressor("topk", density=0.1, warmup=5)
    counts = []
    for made.step in range(6):
        counts.append(len(made.compress("w", torch.randn(100)).index))
    assert counts == [25, 10, 10, 10, 10, 10]


def test_a_limit_of_infinity_holds_nothing_back():
    assert compressor("topk", clip=math.inf).clip is None and compressor("topk", clip=2.0).clip == 2.0


def test_random_entries_differ_between_steps_and_parameters_but_not_between_processes():
    made = compressor("randomk", density=0.2)
    first = made.compress("a", torch.randn(50)).index
    again = compressor("randomk", density=0.2).compress("a", torch.randn(50)).index
    assert first.equal(again) and not first.equal(made.compress("b", torch.randn(50)).index)
    made.step = 1
    assert not first.equal(made.compress("a", torch.randn(50)).index)


def test_a_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="residuals must be of the model's parameters, got 'w'"):
        compressor("topk").load_state_dict({"step": 1, "residuals": {"w": torch.zeros(1)}, "velocities": {}})


def test_only_data_parallel_models_have_a_hook():
    with unchecked(), pytest.raises(TypeError, match="model must be a DistributedDataParallel, got Linear"):
        compress_gradients(nn.Linear(2, 2))
