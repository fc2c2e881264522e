"""Sparse execution of a linear layer, CSR and blocks, against the dense one.

python -m benchmarks.bench_sparse_execution [--shapes 8192x2048 1536x576] [--batch 1 16 256] [--rounds 15] [--threads 2]

Float32, shapes as out x in. CSR multiplies a weight pruned entry by entry, "block" one pruned by blocks of 32 x 32, the
dense layer a dense weight. Every contender rotates over as many weights as fill 128 MB dense, as the layers of a model
do, so that none comes from a cache that the model would not leave it in. The gate compares with a dense product of the
same sparse weight.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import interleaved, require_parity, row
from pruning.execution import SparseLinear
from training.allocator import keep_freed_memory

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
BLOCK = 32
BYTES = 128 * 2**20


def pruned(weight: Tensor, sparsity: float, *, block: int) -> Tensor:
    """A share of the entries, or of the blocks, set to 0, chosen by chance and counted exactly."""
    places = weight.numel() // block**2
    kept = torch.ones(places)
    kept[torch.randperm(places)[: round(sparsity * places)]] = 0
    mask = kept.view(weight.shape[0] // block, weight.shape[1] // block)
    return weight * mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def gate(layer: SparseLinear, weight: Tensor, x: Tensor) -> str:
    """The layer against a dense product. Raises: ValueError where they differ."""
    return f"pass {require_parity({'y': layer(x)}, {'y': F.linear(x, weight)}, tolerance=1e-5):.0e}"


def rotating(layers: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    """The layers in turn, one a call."""
    order = cycle(layers)
    return lambda: next(order)(x)


def compare(shape: tuple[int, int], batches: Sequence[int], rounds: int, memory: str) -> None:
    """Gate all, time all in turns, print one row each."""
    torch.manual_seed(0)
    dense = [nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False) for _ in range(copies(shape))]
    for sparsity in SPARSITIES:
        layers: dict[str, list[nn.Module]] = {"dense": list(dense)}
        weights = {}
        for name, block in (("csr", 1), (f"block {BLOCK}x{BLOCK}", BLOCK)):
            cut = [pruned(linear.weight, sparsity, block=block) for linear in dense]
            layers[name], weights[name] = [SparseLinear(w, None, execution=name) for w in cut], cut[0]
        for batch in batches:
            x = torch.randn(batch, shape[1])
            verdicts = {name: gate(layers[name][0], weight, x) for name, weight in weights.items()}  # type: ignore[arg-type]
            seconds = interleaved({name: rotating(held, x) for name, held in layers.items()}, rounds=rounds)
            for name in weights:
                conditions = {"shape": "x".join(map(str, shape)), "batch": batch, "sparsity": sparsity,
                              "dtype": "float32", "memory": memory}  # fmt: skip
                row(f"sparse_{name.split()[0]}", conditions, seconds[name], versus={"dense": seconds["dense"]},
                    parity=verdicts[name])  # fmt: skip


def copies(shape: tuple[int, int]) -> int:
    """How many float32 weights of this shape fill BYTES."""
    return -(-BYTES // (shape[0] * shape[1] * 4))


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    return int(outputs), int(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[(8192, 2048), (1536, 576)])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = "kept" if keep_freed_memory() else "fresh"
    with torch.no_grad():
        for shape in arguments.shapes:
            compare(shape, arguments.batch, arguments.rounds, memory)


if __name__ == "__main__":
    main()
