"""A rank that dies under torchrun: a restart to the same losses. NaN or another config on one: a clear error on all."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tolerances import close
from tests.training.faulty_rank import STEP
from tests.training.models import small_corpus
from tests.training.spawning import ROOT
from training.config import load_config
from training.run import train

CONFIG = """
[data]
corpus = "{corpus}"
tokenizer = "bytes"
length = 16
held_out = 0.2
[model]
dim = 16
layers = 1
heads = 2
hidden = 8
num_experts = 4
k = 2
[optim]
warmup = 3
[train]
steps = 12
batch = 4
dtype = "float32"
device = "cpu"
aux_scope = "global"
save_every = 5
eval_every = 100
eval_batches = 1
[distributed]
timeout_s = 60.0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config file; its corpus is a folder of texts."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, text in enumerate(small_corpus().train):
        (corpus / f"{number}.txt").write_text(text)
    file = tmp_path / "run.toml"
    file.write_text(CONFIG.format(corpus=corpus))
    return file


def losses(out: Path) -> torch.Tensor:
    """Loss of each step, every step once."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def two_ranks(config: Path, out: Path, fault: str) -> list[str]:
    """What the ranks say on standard error; both fail."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "FAULT": fault,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.training.faulty_rank", "train", str(config), "--out", str(out)]
    running = [
        subprocess.Popen(
            [*command, "--data.cache", str(out.with_name("cache")), "--expert-parallel", "2"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=160)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [1, 1], said
    return [" ".join(line for line in text.splitlines() if line.startswith("error: ")) for text in said]


def test_torchrun_restarts_after_a_kill_and_the_losses_are_those_of_one_process(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "tests.training.faulty_rank", "train", str(config), "--out", str(tmp_path / "two")]
    command += ["--data.cache", str(tmp_path / "cache"), "--expert-parallel", "2"]
    environment = os.environ | {"FAULT": "kill", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=160)
    assert run.returncode == 0, run.stderr
    assert "rank 0 stops: another of the 2 processes died" in run.stderr
    assert "step 5 of 12, into" in " ".join(run.stdout.split())  # the second life began at the checkpoint
    alone = load_config(config)
    data = dataclasses.replace(alone.data, cache=tmp_path / "cache")
    train(dataclasses.replace(alone, out=tmp_path / "one", data=data))
    close(losses(tmp_path / "two"), losses(tmp_path / "one"))


@pytest.mark.parametrize("fault", ["nan", "seed"])
def test_a_fault_of_one_rank_is_one_clear_error_on_every_rank(fault: str, config: Path, tmp_path: Path) -> None:
    zero, one = two_ranks(config, tmp_path / "run", fault)
    if fault == "nan":
        assert f"step {STEP}: gradient norm is nan, rank 1: every layer's output is finite" in zero
        assert f"step {STEP}: loss is nan, rank 1: every layer's output is finite" in one
        assert "the last good checkpoint is" in zero
    if fault == "seed":
        assert zero == one == "error: seed must be the same on every rank: rank 0 has 0, rank 1 has 7"
