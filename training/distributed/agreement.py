"""What every rank must find alike before training starts."""

import dataclasses
import json
from typing import Any

import torch

from training.config import DistributedConfig, RunConfig
from training.distributed.faults import Tell, require_sound
from training.distributed.world import World
from training.precision import choose_precision

NOISE_OF_PARTS = "its noise is on the layers that ranks hold in part, and Fisher traces are of a whole copy of them"


def require_alone(wanted: DistributedConfig) -> None:
    """Raises: ValueError for what takes several processes."""
    for name in ("expert_parallel", "tensor_parallel"):
        value = getattr(wanted, name)
        if value > 1:
            raise ValueError(
                f"distributed.{name} must be 1 in a run of one process, got {value}:"
                f" torchrun --nproc-per-node {value} -m training train …"
            )


def require_rows(config: RunConfig, *, ranks: int) -> None:
    """Raises: ValueError unless every micro-batch of every rank has as many sequences."""
    wanted = config.distributed
    rows = ranks // wanted.tensor_parallel
    if config.train.batch % (rows * config.train.accumulation):
        split = f" divided by tensor_parallel={wanted.tensor_parallel}" if wanted.tensor_parallel > 1 else ""
        what = f"{ranks} processes{split} times train.accumulation={config.train.accumulation}"
        raise ValueError(f"train.batch must be a multiple of {what}, got {config.train.batch}")


def require_methods(config: RunConfig) -> None:
    """Raises: ValueError for a method of [sparsify] or compression that the layout of [distributed] does not allow."""
    wanted, method = config.distributed, config.sparsify.method
    sparse = config.sparsify.sparsity > 0 or method != "magnitude"
    if method == "variational" and wanted.tensor_parallel > 1:
        raise ValueError(
            "distributed.tensor_parallel must be 1 with sparsify.method='variational', got"
            f" {wanted.tensor_parallel}: its noise is on outputs that each rank then has a part of"
        )
    if config.sparsify.fisher_penalty and wanted.compression != "none":
        raise ValueError(
            f"distributed.compression must be 'none' with sparsify.fisher_penalty, got {wanted.compression!r}: what"
            " was sent is not clipped again, and the penalty's gradient comes after it"
        )
    if config.sparsify.fisher_penalty and method == "variational":
        _require_whole(wanted, "sparsify.fisher_penalty and sparsify.method='variational'", NOISE_OF_PARTS)
    if config.sparsify.curriculum == "low_fisher" and method == "variational":
        _require_whole(wanted, "sparsify.curriculum='low_fisher' and sparsify.method='variational'", NOISE_OF_PARTS)
    if config.train.compile and wanted.tensor_parallel > 1:
        raise ValueError(f"train.compile must be false with distributed.tensor_parallel={wanted.tensor_parallel}")
    if sparse and wanted.compression != "none" and method in ("rigl", "snfs", "nest"):
        raise ValueError(
            f"distributed.compression must be 'none' with sparsify.method={method!r}, got {wanted.compression!r}: it"
            " grows by gradients, most of which compression holds back"
        )
    if wanted.compression == "dgc" and config.optim.betas[0] > 0:
        raise ValueError(
            "optim.betas must begin with 0 with distributed.compression='dgc', which has a momentum of its own, got"
            f" {config.optim.betas}"
        )


def _require_whole(wanted: DistributedConfig, what: str, why: str) -> None:
    for name, whole in (("shard", "none"), ("expert_parallel", 1), ("tensor_parallel", 1)):
        if (value := getattr(wanted, name)) != whole:
            raise ValueError(f"distributed.{name} must be {whole!r} with {what}, got {value!r}: {why}")


def require_alike(what: str, mine: str, tell: Tell) -> None:
    """Raises: ValueError, on every rank, if ranks disagree, naming the first that differs from rank 0."""
    told = tell(mine)
    for rank, other in enumerate(told):
        if other != told[0]:
            raise ValueError(f"{what} must be the same on every rank: rank 0 has {told[0]}, rank {rank} has {other}")


def require_same_config(fields: dict[str, Any], tell: Tell, *, problem: str = "") -> None:
    """fields: the config, flat. problem: why this rank has none.

    Raises: ValueError, on every rank, with the first problem, or naming the first field in which ranks differ.
    """
    told = [json.loads(text) for text in tell(json.dumps([problem, fields]))]
    require_sound([theirs for theirs, _ in told])
    first = told[0][1]
    for rank, (_, other) in enumerate(told):
        for name in {**first, **other}:
            if other.get(name) != first.get(name):
                raise ValueError(
                    f"{name} must be the same on every rank: rank 0 has {first.get(name)!r},"
                    f" rank {rank} has {other.get(name)!r}"
                )


def on_device(config: RunConfig, world: World, tell: Tell) -> RunConfig:
    """The config with this rank's own device, and rank 0's choice of the number format."""
    dtype = config.train.dtype
    if dtype == "auto":
        fast = choose_precision("auto", device=world.device).dtype == torch.bfloat16
        dtype = "bfloat16" if tell("bfloat16" if fast else "float32")[0] == "bfloat16" else "float32"
    train = dataclasses.replace(config.train, dtype=dtype, device=str(world.device))
    return dataclasses.replace(config, train=train)
