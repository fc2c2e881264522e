"""The demo's mixture with a quarter and half of its experts gone, or merged into others, or of the neurons inside them.

Experts go by frequency, by what they add or by chance, neurons by what they add, by the gradient of a gate, by
magnitude or by chance: the same share from each layer, or ranked over all of them.

python -m benchmarks.experts_removed [--run runs/demo/moe] [--fractions 0.25 0.5]

Calibration: 32 sequences of training text; bits per byte of held-out text as the demo counts them. Nothing is
retrained. Records are appended to runs/experts-removed.jsonl; ``python -m benchmarks.pruning_page --collect`` makes the
table of them.
"""

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import commit
from pruning import (
    expert_importance,
    expert_neuron_importance,
    gate_importance,
    magnitude_importance,
    merge_experts,
    prunable_axes,
    prune_expert_neurons,
    prune_experts,
    random_importance,
)
from training.config import RunConfig, from_dict
from training.data import Batches
from training.evaluation import evaluate
from training.run import load_data, model_folder, read_record
from transformer import Transformer

RECORDS = Path("runs/experts-removed.jsonl")
SEQUENCES, SEEDS = 32, 5


Way = Callable[[Transformer, float], Any]
PLACES = {"each layer": True, "all layers": False}


def neuron_ways(model: Transformer, batches: list[torch.Tensor]) -> dict[str, Way]:
    """Name → what takes a fraction of the neurons inside the experts of a model away."""
    axes = [axis for axis in prunable_axes(model) if axis.kind == "expert_neuron"]

    def remove(scores: Any, layerwise: bool, target: Transformer, fraction: float) -> object:
        return prune_expert_neurons(target, scores, fraction=fraction, layerwise=layerwise)

    scores = {
        "least added": expert_neuron_importance(model, batches),
        "gate gradient": gate_importance(model, batches, axes=axes),
        "magnitude": magnitude_importance(model, axes),
    }
    for seed in range(SEEDS):
        scores[f"by chance {seed}"] = random_importance(axes, generator=torch.Generator().manual_seed(seed))
    return {
        f"neurons from {place}, {name}": partial(remove, found, layerwise)
        for place, layerwise in PLACES.items()
        for name, found in scores.items()
    }


def expert_ways(model: Transformer, batches: list[torch.Tensor]) -> dict[str, Way]:
    """Name → what takes a fraction of the experts of a model away."""
    axes = [axis for axis in prunable_axes(model) if axis.kind == "expert"]

    def remove(scores: Any, layerwise: bool, target: Transformer, fraction: float) -> object:
        return prune_experts(target, scores, fraction=fraction, layerwise=layerwise)

    def merge(router: Any, target: Transformer, fraction: float) -> object:
        return merge_experts(target, batches, fraction=fraction, router=router)

    scores = {
        "least used": expert_importance(model, batches, method="frequency"),
        "least added (REAP)": expert_importance(model, batches, method="gate_norm"),
    }
    for seed in range(SEEDS):
        scores[f"by chance {seed}"] = random_importance(axes, generator=torch.Generator().manual_seed(seed))
    removed = {
        f"from {place}, {name}": partial(remove, found, layerwise)
        for place, layerwise in PLACES.items()
        for name, found in scores.items()
    }
    merged = {f"merged in each layer, router row {row}": partial(merge, row) for row in ("kept", "logsumexp")}
    return {**removed, **merged}


def left(model: Transformer) -> list[list[int]]:
    """Experts of each layer, and neurons of each of them."""
    return [[layer.feedforward.num_experts, layer.feedforward.hidden] for layer in model.config.layers]


def main() -> None:
    """One record for each way and fraction, the whole model first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo/moe"))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = read_record(options.run / "run.json")
    config = from_dict(RunConfig, {"data": record["data"]}, where=str(options.run)).data
    model, data = Transformer.from_pretrained(model_folder(options.run)).eval(), load_data(config)
    rows = Batches(data.train, batch=SEQUENCES, length=config.length, seed=0).next().inputs
    batches = list(rows.split(8))

    def bits(one: Transformer) -> float:
        return evaluate(one, data.held_out, data.tokenizer, length=config.length).bits_per_byte

    def write(way: str, fraction: float, one: Transformer) -> None:
        line = {
            "name": "experts", "way": way, "fraction": fraction, "bits_per_byte": bits(one),
            "parameters": one.num_parameters(), "left": left(one), "calibration": [SEQUENCES, config.length],
            "torch": torch.__version__, "commit": commit(),
        }  # fmt: skip
        with RECORDS.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)

    write("whole", 0.0, model)
    for way, take in {**expert_ways(model, batches), **neuron_ways(model, batches)}.items():
        for fraction in options.fractions:
            one = copy.deepcopy(model)
            take(one, fraction)
            write(way, fraction, one)


if __name__ == "__main__":
    main()
