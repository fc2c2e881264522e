"""The thresholded matrix-vector product of decoding, against the dense product and against the bytes it must read.

python -m benchmarks.bench_activation [--sparsity 0.5 0.8 0.9] [--rounds 40] [--threads 2]

One row of 2048 activations through sixteen 2048 → 8192 projections in float32, one after the other, as decoding goes
through layers: 67 MB each, with fresh random places of the non-zero entries for each and in each round, so that no
cache helps. "inputs" skips columns of the weight (TEAL, and down projections), "outputs" skips rows of it (up
projections behind a gate, 2048 → 8192 likewise). "floor" is the dense products' time times the density: reading the
same bytes at the dense product's speed.
"""

import argparse
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F

from benchmarks.harness import interleaved, require_parity, row
from moe.activation import column_table, draw_sparse, products_at, sparse_matvec

INPUTS, OUTPUTS, TABLES = 2048, 8192, 16


def contenders(kind: str, density: float) -> tuple[dict[str, Callable[[], object]], str]:
    """The dense and the sparse product over rotating weights, and the verdict of the parity gate."""
    weights = [torch.randn(OUTPUTS, INPUTS) for _ in range(TABLES)]
    x, width = torch.randn(1, INPUTS), INPUTS if kind == "inputs" else OUTPUTS
    # drawn beforehand, so that drawing is not timed; a table meets the same places again after 63 rounds
    prepared = [draw_sparse(1, width, density, torch.float32) for _ in range(63)]
    if kind == "inputs":
        tables = [column_table(weight) for weight in weights]
        dense, sparse = F.linear, sparse_matvec
        gate = require_parity(
            {"y": sparse(prepared[0], tables[0])}, {"y": dense(prepared[0], weights[0])}, tolerance=1e-5
        )
        operands = cycle(prepared)
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda: [dense(next(operands), weight) for weight in weights],
            "sparse": lambda: [sparse(next(operands), table) for table in tables],
        }
        return runs, f"pass {gate:.0e}"
    masks = cycle([entry != 0 for entry in prepared])
    active = next(masks)
    gate = require_parity(
        {"y": products_at(x, weights[0], active)}, {"y": F.linear(x, weights[0]) * active}, tolerance=1e-5
    )
    runs = {
        "dense": lambda: [F.linear(x, weight) for weight in weights],
        "sparse": lambda: [products_at(x, weight, next(masks)) for weight in weights],
    }
    return runs, f"pass {gate:.0e}"


def compare(kind: str, sparsity: float, rounds: int) -> None:
    """Gate, time in turns, print one row for each of dense and sparse."""
    torch.manual_seed(0)
    density = 1.0 - sparsity
    with torch.no_grad():
        runs, verdict = contenders(kind, density)
        seconds = interleaved(runs, rounds=rounds, warmup=5)
    floor = [density * taken for taken in seconds["dense"]]
    conditions = {
        "skips": kind,
        "in": INPUTS,
        "out": OUTPUTS,
        "batch": 1,
        "maps": TABLES,
        "sparsity": sparsity,
        "dtype": "float32",
    }
    row("matvec_dense", conditions, seconds["dense"], versus={}, parity="reference")
    row(
        "matvec_sparse",
        conditions,
        seconds["sparse"],
        versus={"dense": seconds["dense"], "floor": floor},
        parity=verdict,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for kind in ("inputs", "outputs"):
        for sparsity in arguments.sparsity:
            compare(kind, sparsity, arguments.rounds)


if __name__ == "__main__":
    main()
