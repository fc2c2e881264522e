"""kill -9 of a real process, in mid-training and in mid-checkpoint: the run goes on as if nothing had happened."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.killed_run import STEPS
from tests.training.spawning import PATIENCE
from training.checkpoint import OPTIMIZER, checkpoints, latest_checkpoint, verify

ROOT = Path(__file__).parents[2]


def start(out: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.training.killed_run", str(out), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(out: Path, mode: str) -> list[dict[str, Any]]:
    assert start(out, mode).wait(PATIENCE) == 0
    return numbers(out)


def numbers(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in {"time", "tokens_per_s"}} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    lines = finish(tmp_path_factory.mktemp("undisturbed"), "go")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    return lines


def test_killed_in_mid_training(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    # it does not come to its end, however late the kill is
    process, metrics = start(tmp_path, str(STEPS)), tmp_path / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < 13:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    whole = latest_checkpoint(tmp_path / "checkpoints")
    assert whole is not None
    verify(whole)
    with metrics.open("a") as file:
        file.write('{"step": 99, "lo')  # what a kill in mid-write leaves
    assert finish(tmp_path, "resume") == undisturbed


def test_killed_while_a_checkpoint_is_written(tmp_path: Path, undisturbed: list[dict[str, Any]]) -> None:
    process = start(tmp_path, "10")
    assert process.stdout is not None
    assert process.stdout.readline() == "stalled\n"
    process.kill()
    assert process.wait() == -9
    root = tmp_path / "checkpoints"
    torn = root / ".writing-00000010" / OPTIMIZER
    assert torn.stat().st_size > 0
    assert [path.name for path in checkpoints(root)] == ["step-00000005"]
    assert latest_checkpoint(root) == root / "step-00000005"
    assert finish(tmp_path, "resume") == undisturbed
    assert not torn.exists()
