"""Processes for tests of many ranks."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds that a loaded machine may take


def spawn(module: str, world: int, folder: Path, *cases: str) -> None:
    """python -m MODULE RANK WORLD FOLDER CASE… for every rank, each of which must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = [[module, str(rank), str(world), str(folder), *cases] for rank in range(world)]
    with started(commands, [{}] * world) as running:
        assert [process.wait(PATIENCE) for process in running] == [0] * world


@contextmanager
def launched(module: str, world: int, *arguments: str, **variables: str) -> Iterator[list[subprocess.Popen[str]]]:
    """python -m MODULE ARGUMENTS… for every rank as torchrun starts them, with a store that outlives them; no agent
    that stops the others once one has failed."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE))
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world), **variables,
    }  # fmt: skip
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    with started([[module, *arguments]] * world, ranks) as running:
        yield running


@contextmanager
def started(commands: list[list[str]], environments: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """python -m COMMAND… each; killed at the end. Standard error is kept, standard output is not."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *command], env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if environment else None, text=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
