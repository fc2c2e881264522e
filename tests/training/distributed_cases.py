"""Runs of a small model that one process and many must train alike, by name."""

from pathlib import Path
from typing import Any

import torch

from pruning import Sparsifier, global_ranking
from pruning.dynamic import RigL
from tests.training.models import small_data
from training.config import OptimConfig, TrainConfig
from training.data import Batch
from training.optim import local
from training.parallel import Alone, Parallel
from training.step import SideLosses, StepOutput
from training.trainer import Trainer
from transformer import DenseConfig, MoEConfig, Transformer, TransformerConfig
from transformer.layer_config import ROUTERS

STEPS = 5
# name: (feed-forward, settings of [train])
RUNS: dict[str, tuple[DenseConfig | MoEConfig, dict[str, Any]]] = {
    "dense": (DenseConfig(hidden=24), {}),
    "moe": (MoEConfig(hidden=8, num_experts=12, k=2, shared_hidden=8), {"aux_scope": "global", "aux": 0.1}),
    "sigmoid": (MoEConfig(hidden=8, num_experts=4, k=2, router="sigmoid"), {"aux": 0.0, "accumulation": 2}),
}
# one run for each router; ranks route their own tokens, as one process does its micro-batches
ROUTED = {f"router-{name}": name for name in ROUTERS}
RUNS |= {
    run: (
        MoEConfig(
            hidden=8, num_experts=4, k=1 if name in ("switch", "base") else 2, router=name, shared_hidden=4,
            capacity_factor=1.0 if name in ("switch", "top_2") else None, allow_future=name == "expert_choice",
        ),
        {"aux": 0.05},
    )
    for run, name in ROUTED.items()
}  # fmt: skip
# runs in a world of so many ranks: (name, expert_parallel, shard)
LAYOUTS = {
    1: [("moe", 1, "none")],
    2: [
        ("dense", 1, "none"),
        ("dense", 1, "fsdp"),
        ("moe", 1, "fsdp"),
        ("moe", 2, "none"),
        ("moe", 2, "fsdp"),
        ("sigmoid", 2, "none"),
        *((run, 2, "none") for run in ROUTED),
    ],
    3: [("dense", 1, "fsdp"), ("moe", 3, "none")],
    4: [("moe", 2, "fsdp"), ("moe", 4, "none"), ("sigmoid", 2, "none")],
}

# what is saved by how many ranks in which layout, at which step, and where it goes on
SAVED, SAVED_STEP = [("moe", 2, "none"), ("moe", 2, "fsdp")], 3
RESUMED = {2: [(1, "fsdp"), (2, "none")], 3: [(3, "fsdp"), (1, "none")]}


def make_model(name: str) -> Transformer:
    """The seeded model of a run; no dropout, as its masks would differ between numbers of processes."""
    torch.manual_seed(0)
    config = TransformerConfig.uniform(
        vocab_size=257, dim=16, num_layers=2, num_heads=2, feedforward=RUNS[name][0], max_length=16
    )
    return Transformer(config)


def make_trainer(
    name: str, out: Path, *, parallel: Parallel | None = None, sparsifiers: Any = None, **settings: Any
) -> Trainer:
    """A trainer of STEPS steps of 24 sequences; sparsifiers: a function of the placed model."""
    model = make_model(name)
    parallel = parallel or Alone()
    parallel.place(model)
    noise_of_rows(parallel)
    defaults: dict[str, Any] = {
        "steps": STEPS,
        "batch": 24,
        "dtype": "float32",
        "eval_every": 100,
        "save_every": 100,
        "device": "cpu",
    }
    return Trainer(
        model, small_data(), out=out, length=16, optim=OptimConfig(lr=0.01, warmup=2),
        train=TrainConfig(**(defaults | RUNS[name][1] | settings)), parallel=parallel,
        sparsifiers=[] if sparsifiers is None else sparsifiers(model),
    )  # fmt: skip


def noise_of_rows(parallel: Parallel) -> None:
    """What a router draws depends on the rows, whichever process has them."""
    run = parallel.forward

    def forward(model: Transformer, batch: Batch, side: SideLosses) -> StepOutput:
        torch.manual_seed(int(batch.inputs.sum()))
        return run(model, batch, side)

    parallel.forward = forward  # type: ignore[method-assign]


def magnitude_pruner(model: Transformer) -> list[Sparsifier]:
    """Half of all weights at step 0, in one ranking with many ties; seven tenths from step 4 on."""
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).mul_(100).round_().div_(100)
    return [Sparsifier(model, schedule=lambda step: 0.5 if step < 4 else 0.7, allocation=global_ranking)]


def rigl(model: Transformer) -> list[RigL]:
    """Connections that move every second step."""
    return [RigL(model, sparsity=0.5, every=2, stop=5)]


PRUNERS = {"magnitude": magnitude_pruner, "rigl": rigl}
# method and layout
PRUNED = [("magnitude", "none"), ("magnitude", "fsdp"), ("rigl", "none")]


def without_clock(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics less what the clock says."""
    return {key: value for key, value in line.items() if key not in {"time", "tokens_per_s"}}
