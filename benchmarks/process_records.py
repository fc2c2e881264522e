"""Records of the benchmarks of many processes: one JSON line each, appended where it was made."""

import json
import os
import platform
from pathlib import Path

import torch

from benchmarks.harness import commit
from benchmarks.readme_tables import RECORDS, Line

EQUAL = RECORDS / "equal-losses.jsonl"
GRADIENTS = RECORDS / "sparse-gradients.jsonl"
NETWORKS = RECORDS / "slow-networks.jsonl"
PLANS = RECORDS / "plan-check.jsonl"
SPEED = RECORDS / "expert-parallel.jsonl"


def append(path: Path, line: Line) -> Line:
    """Write a record with the conditions under which it was made; returns it whole."""
    conditions = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }
    whole = line | conditions
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole, ensure_ascii=False) + "\n")
    return whole


def newest(lines: list[Line], *keys: str) -> list[Line]:
    """The last record of each combination of the values of ``keys``, in the order in which they first came."""
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())
