"""TEAL over all seven maps of every block of SmolLM2-135M-Instruct, beside its feed-forward networks alone.

python -m benchmarks.activation_blocks [--sparsity 0.25 0.4 0.5 0.6] [--greedy 0.4] [--dtype float32]

Weights, texts and records are those of :mod:`benchmarks.activation_smollm2`. The greedy allocation runs each block some
hundred times, and so sees GREEDY_DOCUMENTS of the calibration documents alone, in steps of GREEDY_STEP.
"""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.activation_smollm2 import LENGTH, THRESHOLD_ROWS, load_model, perplexity, token_rows, write
from moe import calibrate_teal
from moe.calibration import feedforward_inputs, thresholds_from_inputs
from moe.sparsified import SparsifiedActivations, attention_sites, feedforward_sites, sparsify_activations
from moe.teal import TealThresholds

GREEDY_DOCUMENTS, GREEDY_STEP = 1, 0.1
Allocation = Literal["uniform", "greedy"]


def weights_of_blocks(model: nn.Module) -> int:
    """Weights of all seven maps of all blocks."""
    networks = [linear for s in feedforward_sites(model).values() for linear in (s.gate, s.up, s.down) if linear]
    attention = [linear for s in attention_sites(model).values() for linear in s.projections.values()]
    return sum(linear.weight.numel() for linear in [*networks, *attention])


@contextmanager
def weights_unread(sparse: SparsifiedActivations) -> Iterator[dict[str, list[float]]]:
    """Collects, of each map and batch, how many weights meet a zero, while the layers run densely."""
    unread: dict[str, list[float]] = {}

    def note(name: str, linear: Any, limit: float) -> Any:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            share = (inputs[0].abs() <= limit).double().mean().item()
            unread.setdefault(name, []).append(share * linear.weight.numel())

        return linear.register_forward_pre_hook(count)

    # a feed-forward's maps meet inputs whose small entries are zeros already
    handles = [
        note(f"{name}.{part}", getattr(layer, part), 0.0)
        for name, layer in sparse.layers.items()
        for part in ("gate", "up", "down")
    ]
    handles += [note(name, linear, linear.threshold) for name, linear in sparse.projections.items()]
    try:
        yield unread
    finally:
        for handle in handles:
            handle.remove()


def measured(model: Any, found: TealThresholds, evaluation: list[Tensor]) -> dict[str, float]:
    """Perplexity with these thresholds, and the share of the blocks' weights that decoding need not read."""
    whole = weights_of_blocks(model)
    sparse = sparsify_activations(
        model, method="teal", thresholds=found.feedforward, attention=found.attention or None, execution="dense"
    )
    with weights_unread(sparse) as unread:
        value = perplexity(model, evaluation)
    sparse.restore()
    return {"perplexity": value, "reads_saved": sum(sum(of) / len(of) for of in unread.values()) / whole}


def calibrated(model: Any, calibration: list[Tensor], sparsity: float, allocation: Allocation) -> TealThresholds:
    """Thresholds of all seven maps."""
    return calibrate_teal(
        model, calibration, sparsity=sparsity, allocation=allocation, step=GREEDY_STEP, rows=THRESHOLD_ROWS,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def blocks(
    model: Any, calibration: list[Tensor], evaluation: list[Tensor], levels: Mapping[Allocation, list[float]]
) -> None:
    """A record for the feed-forward alone and for whole blocks at each sparsity."""
    common = {
        "dense_perplexity": perplexity(model, evaluation),
        "dtype": str(model.dtype).removeprefix("torch."),
        "evaluation_tokens": LENGTH * len(evaluation),
        "threshold_rows": THRESHOLD_ROWS,
    }
    inputs = feedforward_inputs(model, calibration, rows=THRESHOLD_ROWS, generator=torch.Generator().manual_seed(0))
    for sparsity in levels["uniform"]:
        alone = TealThresholds(thresholds_from_inputs(model, inputs, method="teal", sparsity=sparsity), {})
        figures = {"calibration_tokens": LENGTH * len(calibration), **measured(model, alone, evaluation)}
        write("blocks", common | {"method": "feed-forward uniform", "sparsity": sparsity, **figures})
    for allocation, sparsities in levels.items():
        rows = calibration[:GREEDY_DOCUMENTS] if allocation == "greedy" else calibration
        for sparsity in sparsities:
            found = calibrated(model, rows, sparsity, allocation)
            figures = {"calibration_tokens": LENGTH * len(rows), **measured(model, found, evaluation)}
            write("blocks", common | {"method": f"blocks {allocation}", "sparsity": sparsity, **figures})


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--greedy", nargs="*", type=float, default=[0.4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(getattr(torch, arguments.dtype))
    calibration, evaluation = token_rows(tokenizer)
    blocks(model, calibration, evaluation, {"uniform": arguments.sparsity, "greedy": arguments.greedy})


if __name__ == "__main__":
    main()
