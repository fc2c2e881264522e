"""When sparse gradients pay: the time of a training step over a wire of limited bandwidth.

python -m benchmarks.slow_networks [--rounds 3] [--mbit 10 30 100 300 1000 3000]      (Linux, with ip, tc and unshare)

Two processes, each in a network namespace of its own, joined by a virtual Ethernet pair whose ends let through so many
Mbit/s (tc's token bucket filter), and without a filter. Steps of data parallel training by gloo: dense, and with the
hooks of ``compress_gradients``; all of them take turns in each round. The bytes are those that the interface counts.
Records go to benchmarks/records/slow-networks.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.process_records import NETWORKS, append
from benchmarks.sparse_gradients import Loss
from training import compress_gradients, keep_freed_memory
from training.compression import Method
from training.data import Batch
from training.optim import adamw
from transformer import DenseConfig, Transformer, TransformerConfig

ADDRESSES, PORT = ("10.77.0.1", "10.77.0.2"), 29511
LIMITS = (10, 30, 100, 300, 1000, 3000)
LENGTH, ROWS, VOCABULARY = 64, 8, 2048
# name: method (None: dense), density
CONTENDERS: dict[str, tuple[Method | None, float]] = {
    "dense": (None, 1.0),
    "top-k 1%": ("topk", 0.01),
    "DGC 1%": ("dgc", 0.01),
    "top-k 0.1%": ("topk", 0.001),
    "DGC 0.1%": ("dgc", 0.001),
}
UNSHARED = "SLOW_NETWORKS_UNSHARED"


def run(*command: str) -> str:
    """Standard output. Raises: subprocess.CalledProcessError if the command fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=int, nargs="+", default=LIMITS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if UNSHARED not in os.environ:
        os.environ[UNSHARED] = "1"
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--net", *_again()])
    if arguments.rank == 0:
        with subprocess.Popen(["unshare", "--net", *_again(), "--rank", "1"]) as other:
            with ExitStack() as unless_done:
                unless_done.callback(other.kill)
                _join_namespaces(other.pid)
                measure(0, arguments.mbit, arguments.rounds)
                unless_done.pop_all()
    else:
        measure(1, arguments.mbit, arguments.rounds)


def _again() -> list[str]:
    return [sys.executable, "-m", "benchmarks.slow_networks", *sys.argv[1:]]


def _join_namespaces(pid: int) -> None:
    mine, other = Path("/proc/self/ns/net"), Path(f"/proc/{pid}/ns/net")
    while other.readlink() == mine.readlink():
        time.sleep(0.01)
    run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1", "netns", str(pid))


def connect(rank: int) -> None:
    """Bring this end of the wire up, and gloo over it."""
    wire = f"wire{rank}"
    while subprocess.run(["ip", "link", "show", wire], capture_output=True, check=False).returncode:
        time.sleep(0.05)
    run("ip", "address", "add", f"{ADDRESSES[rank]}/24", "dev", wire)
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "set", wire, "up")
    os.environ["GLOO_SOCKET_IFNAME"] = wire
    dist.init_process_group("gloo", init_method=f"tcp://{ADDRESSES[0]}:{PORT}", rank=rank, world_size=2)


def limit(rank: int, mbit: int | None) -> None:
    """Let this end send so many Mbit/s (2 ms of it at once, and nothing is dropped); None: no filter."""
    wire = f"wire{rank}"
    if mbit is None:
        subprocess.run(["tc", "qdisc", "del", "dev", wire, "root"], capture_output=True, check=False)
        return
    burst = max(16 * 1024, mbit * 1000 // 8 * 2)
    filtered = ["tbf", "rate", f"{mbit}mbit", "burst", str(burst), "limit", str(32 * 2**20)]
    run("tc", "qdisc", "replace", "dev", wire, "root", *filtered)


def sent_bytes(rank: int) -> int:
    """Bytes that this end of the wire has sent, headers included."""
    return int(json.loads(run("ip", "-s", "-j", "link", "show", f"wire{rank}"))[0]["stats64"]["tx"]["bytes"])


class Contender:
    """One way to train one model: a step, and what it should send."""

    def __init__(self, method: Method | None, density: float, *, rank: int) -> None:
        torch.manual_seed(0)
        self.parallel = DistributedDataParallel(Loss(make_model()), broadcast_buffers=False)
        self.optimizer = adamw(self.parallel.module, lr=1e-3)
        self.compressor = None
        if method is not None:
            self.compressor = compress_gradients(self.parallel, method, density=density)
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
        self.batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step(self) -> None:
        """Forward, backward with the exchange, and the optimiser."""
        self.parallel(self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def alone(self) -> None:
        """The same without any exchange."""
        with self.parallel.no_sync():
            self.step()

    def payload(self) -> int:
        """Bytes that a rank should send in a step."""
        if self.compressor is not None:
            return self.compressor.traffic.sent // max(1, self.compressor.traffic.steps)
        return sum(4 * p.numel() for p in self.parallel.parameters())


def make_model() -> Transformer:
    """Width 192, 3 layers of 4 heads, SwiGLU of 512 neurons: 1.7 million parameters."""
    config = TransformerConfig.uniform(
        vocab_size=VOCABULARY, dim=192, num_layers=3, num_heads=4, feedforward=DenseConfig(hidden=512),
        max_length=LENGTH,
    )  # fmt: skip
    return Transformer(config)


def measure(rank: int, limits: list[int], rounds: int) -> None:
    """Every bandwidth, from none to the lowest; rank 0 writes the records."""
    torch.set_num_threads(1)
    keep_freed_memory()
    connect(rank)
    contenders = {name: Contender(method, density, rank=rank) for name, (method, density) in CONTENDERS.items()}
    for one in contenders.values():
        for _ in range(2):  # buckets are rebuilt after the first step
            one.step()
    parameters = sum(p.numel() for p in contenders["dense"].parallel.parameters())
    runs = {"alone": contenders["dense"].alone} | {name: one.step for name, one in contenders.items()}
    for mbit in [None, *sorted(limits, reverse=True)]:
        limit(rank, mbit)
        times, wire = _turns(runs, rounds, rank)
        for name in runs if rank == 0 else ():
            payload = contenders[name].payload() if name in contenders else 0
            line = {
                "name": "slow network", "mbit": mbit, "contender": name, "seconds": times[name], "payload": payload,
                "wire_bytes": wire[name], "median_s": statistics.median(times[name]), "parameters": parameters,
                "tokens": ROWS * LENGTH, "rounds": rounds,
            }  # fmt: skip
            append(NETWORKS, line)
            print(f"{mbit} Mbit/s {name}: {line['median_s']:.3f} s, {wire[name]:,.0f} bytes", flush=True)
    dist.destroy_process_group()


def _turns(
    runs: dict[str, Callable[[], None]], rounds: int, rank: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step (of the slower rank), and bytes a step that this rank sent."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    wire = dict.fromkeys(runs, 0.0)
    for turn in range(rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            before, started = sent_bytes(rank), time.perf_counter()
            runs[name]()
            seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
            wire[name] += (sent_bytes(rank) - before) / rounds
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            times[name].append(seconds.item())
    return times, wire


if __name__ == "__main__":
    main()
