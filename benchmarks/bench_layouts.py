"""How long the block layout of every static pattern takes to build, how many blocks it visits, and in what memory.

python -m benchmarks.bench_layouts [--lengths 100000 1000000] [--blocks 64 128] [--patterns window causal ...]

Each row is a process of its own that builds the layout three times on one thread: processor seconds (the machine may
be shared), and the highest resident memory of the first build less what was resident before. Before that, the layout at
GATE_LENGTH, a prime, must show exactly what the pattern's definition says of every pair.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.harness import row
from sparse_attn import (
    Pattern,
    axial,
    bigbird,
    block_sparse,
    causal,
    dilated,
    documents,
    fixed,
    full,
    global_tokens,
    multiples,
    prefix_lm,
    random_blocks,
    sinks,
    sliding_window,
    strided,
)

GATE_LENGTH, BUILDS = 2039, 3
RUNS = Path("runs/layouts.jsonl")


def patterns(length: int) -> dict[str, Pattern]:
    """Every static pattern at one length, from few blocks a row to all of them."""
    draws = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(min(int(torch.randint(100, 900, (1,), generator=draws)), length - sum(sizes)))
    table = [sorted({0, max(row - 3, 0), row}) for row in range(-(-length // 4096))]
    every = range(0, length, -(-length // 8))
    return {
        "window": causal() & sliding_window(256),
        "window, not the nearest": causal() & sliding_window(1024) & ~sliding_window(256),
        "window, sinks": causal() & (sliding_window(256) | sinks(4)),
        "window, global": causal() & (sliding_window(256) | global_tokens(every)),
        "window, global, both ways": sliding_window(256) | global_tokens(every),
        "dilated 4": causal() & dilated(64, 4),
        "dilated 100": causal() & dilated(64, 100),
        "random blocks": causal() & random_blocks(3, 64),
        "bigbird": causal() & bigbird(192, 64, 3, 64),
        "block-sparse": block_sparse(table, 4096),
        "documents of 100 to 900": causal() & documents(sizes),
        "strided 4096": causal() & strided(4096),
        "fixed 4096, 64": causal() & fixed(4096, 64),
        "multiples 1000": causal() & multiples(1000),
        "strided 1000": causal() & strided(1000),
        "axial 1000": causal() & axial(1000),
        "axial 1000, both ways": axial(1000),
        "strided 128": causal() & strided(128),
        "fixed 128, 32": causal() & fixed(128, 32),
        "two documents": causal() & documents(length // 2, length - length // 2),
        "prefix": prefix_lm(1000),
        "causal": causal(),
        "full": full(),
    }


def gate(pattern: Pattern, block: int) -> None:
    """Raises: ValueError unless the layout shows what the definition says."""
    at = torch.arange(GATE_LENGTH)
    truth = pattern.visible(at[:, None], at)
    layout = pattern.layout(GATE_LENGTH, block=block)
    if not layout.to_mask().equal(truth) or layout.visible_pairs() != int(truth.sum()):
        raise ValueError(f"parity: the layout of {pattern} must show what its definition says, got another mask")


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most (unlike getrusage's, not what a parent had before it)."""
    found = re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/self/status must tell {what}, got none")
    return int(found[1]) * 1024


def measure(name: str, length: int, block: int) -> None:
    """One row's numbers as JSON on stdout."""
    pattern = patterns(length)[name]
    before = resident("VmRSS")
    seconds, peak = [], 0
    for _ in range(BUILDS):
        layout = None
        start = time.process_time()
        layout = pattern.layout(length, block=block)
        seconds.append(time.process_time() - start)
        peak = peak or resident("VmHWM") - before
        visited, whole, masks = layout.visited_blocks, layout.full_blocks, len(layout.masks)
    sizes = {"visited": visited, "full": whole, "partial": visited - whole, "masks": masks}
    print(json.dumps({"sizes": sizes, "seconds": seconds, "peak_bytes": max(peak, 0)}))


def bench(name: str, length: int, block: int) -> None:
    """One row, which no process is started for before the gate is passed. Raises: as gate does, and
    subprocess.CalledProcessError if the process fails."""
    gate(patterns(GATE_LENGTH)[name], block)
    command = [sys.executable, "-m", "benchmarks.bench_layouts", "--one", name, str(length), str(block)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    nanoseconds = 1e9 * sorted(found["seconds"])[BUILDS // 2] / max(found["sizes"]["visited"], 1)
    conditions = {"pattern": name, "L": length, "block": block, **found["sizes"]}
    conditions |= {"ns_a_block": round(nanoseconds, 1), "peak_MiB": round(found["peak_bytes"] / 2**20, 1)}
    row("layout", conditions, found["seconds"], versus={}, parity=f"equal at {GATE_LENGTH}", path=RUNS)


def main() -> None:
    """Parse the command line and run every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = list(patterns(GATE_LENGTH))
    parser.add_argument("--lengths", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--patterns", nargs="+", choices=every, default=every)
    parser.add_argument("--one", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        measure(options.one[0], int(options.one[1]), int(options.one[2]))
        return
    for length in options.lengths:
        for block in options.blocks:
            for name in options.patterns:
                bench(name, length, block)


if __name__ == "__main__":
    main()
