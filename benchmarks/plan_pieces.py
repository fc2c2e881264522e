"""What the plan is made of, measured a piece at a time beside plan_check, which measures whole steps.

python -m benchmarks.plan_pieces [--only memory | host] [--rounds 5]

memory: the highest resident size of a rank over three steps, less what it was before the model was made, in each layout
of plan_check. glibc is told to return every freed tensor to the system (``MALLOC_MMAP_THRESHOLD_``): by default it
keeps freed blocks of up to 32 MiB in its heap, where tensors of other sizes leave holes, so that a process has more
than it uses. What a step loads (the code of both libraries, threads of exchanges) is loaded by small steps in the same
layout before, and the text is read once: reading leaves 10 MB free in the heap.

host: seconds of a step that a layer takes on 2 processes when it computes next to nothing (width 16, two sequences of
16 tokens a rank), from models of 2 and of 8 layers in turns, in each way of sharing it out. Records go to
benchmarks/records/plan-pieces.jsonl.
"""

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.plan_check import CERTAIN, LAYOUTS, calibrate, mean, resident, run_config
from benchmarks.process_records import append
from benchmarks.readme_tables import RECORDS
from training.config import RunConfig
from training.distributed import Ranks, World, joined, torchrun_environment
from training.parallel import Alone
from training.run import load_data, make_trainer

PIECES = RECORDS / "plan-pieces.jsonl"
# bytes from which glibc maps a block of its own, and unmaps it when it is freed
RETURNED = 2**16
SHARDS = ((2, 1, "none"), (2, 1, "fsdp"), (2, 2, "none"))
FEW, MANY = 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "host"), default=None)
    parser.add_argument("--rounds", type=int, default=5, help="models of each size, in turns")
    parser.add_argument("--layout", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layout is not None:
        what, experts, shard, k = arguments.layout
        measure(what, int(experts), shard, k=int(k), rounds=arguments.rounds)
        return
    for what, layouts in (("memory", LAYOUTS), ("host", SHARDS)):
        if arguments.only in (None, what):
            for processes, experts, shard in layouts:
                start(what, processes, experts, shard, k=2, rounds=arguments.rounds)
            if what != "host":
                start(what, 2, 2, "none", k=CERTAIN, rounds=arguments.rounds)


def start(what: str, processes: int, experts: int, shard: str, *, k: int, rounds: int) -> None:
    """One layout in processes of its own. Raises: subprocess.CalledProcessError if a rank fails."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    flags = ["--rounds", str(rounds), "--layout", what, str(experts), shard, str(k)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if what == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(RETURNED)
    subprocess.run([*launch, "benchmarks.plan_pieces", *flags], env=environment, check=True, timeout=600)


def measure(what: str, experts: int, shard: str, *, k: int, rounds: int) -> None:
    """What one rank does; rank 0 writes the record."""
    environment = torchrun_environment()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(Path(folder), k=k)
        if environment is None:
            found = held_at_most(config, None, shard)
        else:
            with joined(environment, device="cpu", expert_parallel=experts) as world:
                if what == "host":
                    found = seconds_of_a_layer(config, world, shard, rounds=rounds)
                else:
                    found = held_at_most(config, world, shard)
    if environment is None or environment.rank == 0:
        ranks = 1 if environment is None else environment.ranks
        tokens = config.train.batch * config.data.length
        line = {"name": what, "expert_parallel": experts, "shard": shard, "k": k, "ranks": ranks, "tokens": tokens}
        print(append(PIECES, line | found), flush=True)


def parallel_in(world: World | None, shard: str) -> Alone | Ranks:
    """The processes of a layout, for one model."""
    return Alone() if world is None else Ranks(world, shard="fsdp" if shard == "fsdp" else "none")


def held_at_most(config: RunConfig, world: World | None, shard: str) -> dict[str, float]:
    """Bytes, the mean over the ranks."""
    steps(small(config, layers=1), parallel_in(world, shard), 2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    load_data(config.data)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest size counts from here
    steps(config, parallel_in(world, shard), 3)
    return {"memory": mean(resident("VmHWM") - before, 1 if world is None else world.ranks)}


def seconds_of_a_layer(config: RunConfig, world: World, shard: str, *, rounds: int) -> dict[str, float]:
    """The median over rounds of what steps of MANY layers take longer than steps of FEW, a layer; mean over ranks."""
    found = []
    for _ in range(rounds):
        few, many = (
            min(steps(small(config, layers=layers), parallel_in(world, shard), 8)[2:]) for layers in (FEW, MANY)
        )
        found.append((many - few) / (MANY - FEW))
    latency = mean(calibrate(world.ranks)["latency"], world.ranks)
    return {"layer_s": mean(statistics.median(found), world.ranks), "latency": latency}


def small(config: RunConfig, *, layers: int) -> RunConfig:
    """The same kind of model at a width at which products take no time."""
    model = replace(config.model, dim=16, hidden=16, layers=layers)
    return replace(
        config,
        model=model,
        data=replace(config.data, length=16),
        train=replace(config.train, batch=4),
    )


def steps(config: RunConfig, parallel: Alone | Ranks, count: int) -> list[float]:
    """Seconds of each of so many steps of a new model."""
    trainer = make_trainer(config, parallel=parallel)
    trainer.model.train()
    found = []
    for _ in range(count):
        started = time.perf_counter()
        trainer.train_step()
        found.append(time.perf_counter() - started)
    return found


if __name__ == "__main__":
    main()
