"""A rank that dies under torchrun: a restart to the same losses. NaN or another config on one: a clear error on all."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.tolerances import close
from tests.training.faulty_rank import STEP
from tests.training.models import small_corpus
from tests.training.spawning import PATIENCE, ROOT, launched
from training.checkpoint import latest_checkpoint, verify
from training.config import load_config
from training.run import train
from training.trainer import CHECKPOINTS

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
# what both ranks say in each case of misfit_ranks
MISFITS = {
    "seed": "seed must be the same on every rank: rank 0 has 0, rank 1 has 7",
    "mesh": "distributed.expert_parallel must be the same on every rank: rank 0 has 2, rank 1 has 1",
    "batch on one": "train.batch must be the same on every rank: rank 0 has 4, rank 1 has 5",
    "time-out": "distributed.timeout_s must be the same on every rank: rank 0 has 60.0, rank 1 has 30.0",
    "world": "distributed.expert_parallel must divide the 2 processes, got 3",
    "batch": "train.batch must be a multiple of 2 processes times train.accumulation=1, got 5",
    "experts": r".*num_experts must be a multiple of distributed.expert_parallel=2, got 1",
    "no experts": "distributed.expert_parallel must be 1 for a model without experts, got 2",
    "tensor world": "distributed.tensor_parallel must divide the 2 processes, got 3",
    "both": "distributed.expert_parallel must divide the 2 processes divided by tensor_parallel=2, got 2",
    "heads": "layers.0.attention: num_kv_heads must be a multiple of distributed.tensor_parallel=2, got 1",
    "compiled heads": "train.compile must be false with distributed.tensor_parallel=2",
    "learned": "distributed.tensor_parallel must be 1 with sparsify.method='variational', got 2",
    "penalty": "distributed.expert_parallel must be 1 with sparsify.fisher_penalty and sparsify.method='variational'",
    "masks of the whole": "",
    "none of it": "",
    "nothing to resume": "no checkpoint at .*: leave out --resume",
    "resumed on one": "--resume must be the same on every rank: rank 0 has False, rank 1 has True",
    "started anew on one": "--overwrite must be the same on every rank: rank 0 has False, rank 1 has True",
    "another start": "--checkpoint must be the same on every rank: rank 0 has None, rank 1 has '.*elsewhere'",
    "unread": "model.num_experts in .*unread.toml must be int, got 'four'",
    "unread on one": "rank 1: model.num_experts in .*unread.toml must be int, got 'four'",
    "a wrong flag on one": "rank 1: the arguments of train are refused, see what was said above",
    "another model": ".*is of another shape: ",
    "other heads": "/.* is of another model: layers.0.attention.num_heads is 2 there and 4 in this run: resume with",
    "other k": "/.* is of another model: layers.0.feedforward.k is 2 there and 1 in this run: resume with",
    "other settings of training": "",
    "other experts": ".*is of another shape: ",
    "data": "fingerprint of the data must be the same on every rank: rank 0 has",
}


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


def errors_of(config: Path, out: Path, fault: str, *flags: str, world: int = 2) -> list[str]:
    """What each rank, which fails unless it hangs or dies, says on standard error."""
    command = ["train", str(config), "--out", str(out), "--data.cache", str(out.with_name("cache"))]
    command += flags or ["--expert-parallel", "2"]
    with launched("tests.training.faulty_rank", world, *command, FAULT=fault) as running:
        failing = [process for rank, process in enumerate(running) if rank != 1 or fault in ("nan", "full")]
        said = [process.said() for process in failing]
        assert [process.returncode for process in failing] == [1] * len(said), said
        assert fault not in ("stop", "halt") or running[1].returncode is None
    return [" ".join(line for line in text.splitlines() if line.startswith("error: ")) for text in said]


def test_torchrun_restarts_after_kills_and_the_losses_are_those_of_one_process(config: Path, tmp_path: Path) -> None:
    """Slow in a step, killed in mid-step, killed in mid-checkpoint: three lives, one run, of two nodes on this machine.

    A node's torchrun counts the failures of its own process: where it restarts because of the other, it counts none."""
    # the nodes meet in a store of this process: a port that is free now may be another's once torchrun has started
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{store.port}"]
    command += ["--rdzv-conf", "is_host=false"]
    command += ["-m", "tests.training.faulty_rank", "train", str(config), "--out", str(tmp_path / "two")]
    command += ["--data.cache", str(tmp_path / "cache"), "--expert-parallel", "2"]
    environment = os.environ | {"FAULT": "kill", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=2 * PATIENCE) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    printed, errors = ("".join(texts) for texts in zip(*said, strict=True))
    assert [node.returncode for node in nodes] == [0, 0], errors
    # each time rank 0 says why it stops, unless torchrun is faster and stops it
    stopped = ("rank 0 stops: another of the 2 processes died", "closing signal SIGTERM")
    assert sum(errors.count(text) for text in stopped) >= 2, errors
    # the second life and the third began at the checkpoint before the one that was not finished
    assert " ".join(printed.split()).count("step 5 of 12, into") == 2, printed
    assert not list((tmp_path / "two" / CHECKPOINTS).glob(".writing-*"))
    alone = load_config(config)
    data = dataclasses.replace(alone.data, cache=tmp_path / "cache")
    train(dataclasses.replace(alone, out=tmp_path / "one", data=data))
    close(losses(tmp_path / "two"), losses(tmp_path / "one"))


@pytest.mark.parametrize(
    ("world", "faulty", "flags"), [(3, 0, ()), (4, 3, ("--expert-parallel", "2", "--shard", "fsdp"))]
)
def test_a_rank_of_more_killed_in_a_step_and_in_a_checkpoint_and_the_losses_are_those_of_one_process(
    config: Path, tmp_path: Path, world: int, faulty: int, flags: tuple[str, ...]
) -> None:
    """Three lives as torchrun counts them: in replicas, the rank that completes checkpoints; experts over 2 of 4."""
    config.write_text(config.read_text().replace("batch = 4", "batch = 12"))
    command = ["train", str(config), "--out", str(tmp_path / "many"), "--data.cache", str(tmp_path / "cache"), *flags]
    for life in range(3):
        variables = {"FAULT": "die", "FAULTY": str(faulty), "TORCHELASTIC_RESTART_COUNT": str(life)}
        with launched("tests.training.faulty_rank", world, *command, **variables) as running:
            said = [rank.said() for rank in running]
            ends = [rank.returncode for rank in running]
        assert ends == [0 if life == 2 else -9 if rank == faulty else 1 for rank in range(world)], said
        for rank, text in enumerate(said):
            stopped = f"error: rank {rank} stops: another of the {world} processes died"
            assert text.count("error: ") == text.count(stopped) == (ends[rank] == 1), text
        if life < 2:
            whole_at_step_5(tmp_path / "many")
    alone = load_config(config)
    data = dataclasses.replace(alone.data, cache=tmp_path / "cache")
    train(dataclasses.replace(alone, out=tmp_path / "one", data=data))
    close(losses(tmp_path / "many"), losses(tmp_path / "one"))


def test_nan_on_one_rank_is_named_on_every_rank(config: Path, tmp_path: Path) -> None:
    zero, one = errors_of(config, tmp_path / "run", "nan")
    assert f"step {STEP}: gradient norm is nan, rank 1: every layer's output is finite" in zero
    assert f"step {STEP}: loss is nan, rank 1: every layer's output is finite" in one
    assert "the last good checkpoint is" in zero


@pytest.mark.parametrize(("fault", "world", "kept"), [("stop", 4, "checkpoints in "), ("halt", 2, "no checkpoint")])
def test_a_rank_that_hangs_ends_the_run_on_the_others(
    config: Path, tmp_path: Path, fault: str, world: int, kept: str
) -> None:
    """In a step, among four of which two share out experts; and in the first checkpoint."""
    config.write_text(config.read_text().replace("timeout_s = 60.0", "timeout_s = 15.0"))
    found = errors_of(config, tmp_path / "run", fault, "--expert-parallel", "2", world=world)
    assert len(found) == world - 1
    for rank, text in zip((0, 2, 3), found, strict=False):
        assert f"rank {rank} stops: another of the {world} processes died, or was silent for 15 s; {kept}" in text


def test_a_full_disk_on_one_rank_is_one_error_on_both_and_the_older_checkpoint_is_whole(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for text in errors_of(config, out, "full", "--tensor-parallel", "2"):
        assert text.count("error: ") == 1
        assert re.search(r"disk full \(\d+ MiB free\) while writing .*step-00000010; free some space; ", text), text
        assert f"{out / CHECKPOINTS / 'step-00000005'} is intact: resume from it" in text
    whole_at_step_5(out)


def test_a_rank_killed_while_it_writes_behind_training_leaves_the_older_checkpoint_to_go_on_from(
    config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = "--shard", "fsdp", "--expert-parallel", "2", "--distributed.async-checkpoints"
    (zero,) = errors_of(config, out, "behind", *flags)
    assert zero.count("error: ") == 1 and "rank 0 stops: another of the 2 processes died" in zero
    assert zero.endswith("are whole: start all 2 processes again with --resume")
    whole_at_step_5(out)
    alone = load_config(config)
    data = dataclasses.replace(alone.data, cache=tmp_path / "cache")
    train(dataclasses.replace(alone, out=out, data=data), resume=True)
    train(dataclasses.replace(alone, out=tmp_path / "one", data=data))
    close(losses(out), losses(tmp_path / "one"))
    assert not list((out / CHECKPOINTS).glob(".writing-*"))


def whole_at_step_5(out: Path) -> None:
    """The latest checkpoint is whole, and the first."""
    latest = latest_checkpoint(out / CHECKPOINTS)
    assert latest is not None and latest.name == "step-00000005"
    verify(latest)


def test_what_does_not_fit_is_one_error_on_every_rank(config: Path, tmp_path: Path) -> None:
    for rank, text in enumerate(small_corpus().train[:2]):
        (tmp_path / f"rank-{rank}" / "corpus").mkdir(parents=True)
        (tmp_path / f"rank-{rank}" / "corpus" / "text.txt").write_text(text * 4)
        (tmp_path / f"rank-{rank}" / "corpus" / "held_out.txt").write_text(text)
    config.write_text(config.read_text().replace(str(tmp_path / "corpus"), "corpus"))
    (tmp_path / "unread.toml").write_text('[model]\nnum_experts = "four"\n')
    with launched("tests.training.misfit_ranks", 2, str(tmp_path), str(config)) as running:
        ends = [(process.said(), process.returncode) for process in running]
    assert [code for _, code in ends] == [0, 0], ends
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    for case, error in MISFITS.items():
        assert re.fullmatch(f"error: {error}.*" if error else "", zero.pop(case)), case
    assert not zero
