"""Processes for tests of many ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def spawn(module: str, world: int, folder: Path, *cases: str) -> None:
    """python -m MODULE RANK WORLD FOLDER CASE… for every rank, each of which must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(world):
        command = [sys.executable, "-m", module, str(rank), str(world), str(folder), *cases]
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT))
    try:
        assert [process.wait(170) for process in running] == [0] * world
    finally:
        for process in running:
            process.kill()
