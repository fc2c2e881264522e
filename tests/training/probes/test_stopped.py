"""A probe that is killed, or stopped by Ctrl-C, leaves no process behind, and says what it keeps."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.probes.lab import load_state, save_state
from training.study.pool import cores

ROOT = Path(__file__).resolve().parents[3]
processes = pytest.mark.skipif(cores() < 2 or not Path("/proc/self/stat").exists(), reason="two processes, and /proc")


def in_session(session):
    """Processes of a session that have not ended, by id."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = place.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(own) == session and state != "Z":
            found.append(int(place.parent.name))
    return found


def wait(until, *, seconds=240.0):
    begun = time.monotonic()
    while not until() and time.monotonic() - begun < seconds:
        time.sleep(0.05)
    return until()


@pytest.fixture
def started(toy, tmp_path, request):
    """A probe of long cells with two rates, of which 1e30 diverges at once, two cells at a time; all ends with the
    test."""
    toy("topology")
    path = tmp_path / "toy.toml"
    path.write_text(path.read_text().replace("steps = 4", "steps = 1000000").replace("1e-3, 1e-2", request.param))
    command = [sys.executable, "-m", "training", "study", str(path), "--jobs", "2", "--records", "records.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True, start_new_session=True) as process:  # fmt: skip
        yield process
        for left in in_session(process.pid):
            os.kill(left, signal.SIGKILL)


@processes
@pytest.mark.parametrize("started", ["1e-3, 1e30"], indirect=True)
def test_a_killed_probe_leaves_no_process_behind(started, tmp_path):
    records = tmp_path / "records.jsonl"
    assert wait(lambda: records.is_file() and records.read_text().count("\n") == 1)
    assert len(in_session(started.pid)) == 4, "itself, two workers, one of them still training, and their tracker"
    started.kill()
    assert started.wait() == -signal.SIGKILL
    assert wait(lambda: not in_session(started.pid), seconds=60)


@processes
@pytest.mark.parametrize("started", ["1e-4, 1e-3"], indirect=True)  # no record, however late the interrupt is
def test_ctrl_c_ends_a_probe_at_once_without_tracebacks_and_says_what_is_kept(started):
    assert wait(lambda: len(in_session(started.pid)) == 4)
    # as a terminal does: to every process of the group, while the workers import
    os.killpg(started.pid, signal.SIGINT)
    _, words = started.communicate(timeout=300)
    assert started.returncode == 128 + signal.SIGINT
    assert words == (
        "interrupted: 0 records are in records.jsonl, cells that were training are lost, as they have no checkpoints; "
        "the same command goes on with what has no record\n"
    )
    assert wait(lambda: not in_session(started.pid), seconds=60), "the tracker of what they shared ends after them"


def test_a_state_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    save_state(tmp_path, "a", {"w": torch.ones(3)})

    def torn(path, content):
        path.write_bytes(content[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr("training.durable.write_durably", torn)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, "a", {"w": torch.zeros(3)})
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, "b", {"w": torch.zeros(3)})
    assert load_state(tmp_path, "a")["w"].equal(torch.ones(3)) and load_state(tmp_path, "b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
