"""``sparse-transformers plan``: every mesh of a cluster for a config, what each takes, and the best."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from training.config import RunConfig, load_config
from training.planning.counts import ModelCounts, count_model
from training.planning.hardware import GB, Cluster
from training.planning.predict import Assumptions, Prediction, meshes, predict


@dataclass(frozen=True)
class PlanArguments:
    """Predict memory a rank, traffic, and time of a training step on every mesh of a cluster, and name the best.

    An analytic model: nothing runs. Its assumptions are the flags below and docs/guides/many-processes.md.
    """

    config: tyro.conf.Positional[Path]
    """TOML file of the run, as 'train' takes it."""
    gpus: int = 8
    """Accelerators in all."""
    gpu: str = "h100"
    """Which: a100, h100, h200, b200, mi300x, l40s or rtx4090."""
    per_node: int = 8
    """Accelerators in a node."""
    bandwidth: float = 50.0
    """GB/s that each accelerator can send to another node (400 Gbit/s are 50)."""
    memory: float | None = None
    """GB of an accelerator, instead of the data sheet's."""
    batch: int | None = None
    """Sequences in a step, instead of the config's train.batch."""
    vocab_size: int | None = None
    """Tokens, instead of the config's data.vocab_size."""
    efficiency: float = Assumptions.efficiency
    """Share of the peak that matrix products reach."""
    overlap: float = Assumptions.overlap
    """Share of the backward pass that can hide the reduction of gradients."""
    imbalance: float = Assumptions.imbalance
    """Load of the busiest rank of experts against the mean."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the predictions as JSON lines instead of tables."""


def plan_command(arguments: PlanArguments, console: Console) -> list[Prediction]:
    """Print the table; the predictions, best first.

    Raises: ValueError for a config or a number that does not fit; FileNotFoundError."""
    config = load_config(arguments.config)
    network = arguments.bandwidth * GB
    memory = None if arguments.memory is None else arguments.memory * GB
    cluster = Cluster.named(arguments.gpu, arguments.gpus, per_node=arguments.per_node, network=network, memory=memory)
    counts = count_model(config, vocab_size=arguments.vocab_size)
    tokens = _tokens(config, arguments)
    given = Assumptions(efficiency=arguments.efficiency, overlap=arguments.overlap, imbalance=arguments.imbalance)
    found = [
        predict(
            counts,
            cluster,
            mesh,
            tokens=tokens,
            micro_batches=config.train.accumulation,
            checkpointing=config.train.checkpointing,
            half=config.train.dtype != "float32",
            assumptions=given,
        )
        for mesh in meshes(counts, cluster.gpus)
    ]
    found.sort(key=lambda one: (not one.fits, one.step_seconds if one.fits else one.memory_total))
    if arguments.as_json:
        for one in found:
            print(json.dumps(asdict(one) | {"memory_total": one.memory_total}))
        return found
    console.print(_heading(counts, cluster, tokens), highlight=False)
    console.print(_table(found))
    console.print(_verdict(found, cluster), highlight=False)
    return found


def _tokens(config: RunConfig, arguments: PlanArguments) -> int:
    batch = config.train.batch if arguments.batch is None else arguments.batch
    if batch < 1 or batch % arguments.gpus:
        raise ValueError(f"batch must be a multiple of gpus={arguments.gpus}, got {batch}: set --batch")
    return batch * config.data.length


def _heading(counts: ModelCounts, cluster: Cluster, tokens: int) -> str:
    return (
        f"{counts.dense / 1e6:,.1f} M weights and {counts.experts / 1e6:,.1f} M of experts, "
        f"{counts.flops / 1e6:,.1f} MFLOPs forward a token, {tokens:,} tokens a step, "
        f"{cluster.gpus} x {cluster.gpu.name} of {cluster.gpu.memory / GB:.0f} GB"
    )


def _table(found: list[Prediction]) -> Table:
    table = Table(title="A rank and a step: GB held and sent, ms by part, best first")
    for title in ("experts over", "shard", "GB", "fits", "sent", "compute", "all-to-all", "exposed", "step", "tok/s"):
        table.add_column(title, justify="left" if title == "shard" else "right", no_wrap=True)
    for one in found:
        compute = one.seconds["forward"] + one.seconds["backward"]
        parts = (compute, one.seconds["all-to-all"], one.seconds["exposed"], one.step_seconds)
        table.add_row(
            str(one.mesh.expert),
            one.mesh.shard,
            f"{one.memory_total / GB:.2f}",
            "yes" if one.fits else "no",
            f"{sum(one.sent.values()) / GB:.2f}",
            *(f"{1e3 * value:.4g}" for value in parts),
            f"{one.tokens_per_s:.3g}",
        )
    return table


def _verdict(found: list[Prediction], cluster: Cluster) -> str:
    best = found[0]
    if not best.fits:
        return (
            f"nothing fits {cluster.gpu.memory / GB:.0f} GB: the smallest, {best.mesh}, takes "
            f"{best.memory_total / GB:.1f} GB ({', '.join(f'{k} {v / GB:.1f}' for k, v in best.memory.items())}); "
            "more --gpus, train.checkpointing, a larger train.accumulation, or a smaller batch help"
        )
    launch = f"torchrun --nproc-per-node {min(cluster.gpus, cluster.per_node)} -m training train CONFIG"
    use = f"{best.utilisation:.0%} of the peak, {best.memory_total / GB:.2f} GB"
    return f"best: {best.mesh} ({use})\n  {launch} --expert-parallel {best.mesh.expert} --shard {best.mesh.shard}"
