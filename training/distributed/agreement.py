"""What every rank must find alike before training starts."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch

from training.config import RunConfig
from training.distributed.world import World
from training.precision import choose_precision

Tell = Callable[[str], list[str]]


def require_rows(config: RunConfig, *, ranks: int) -> None:
    """Raises: ValueError unless every micro-batch of every rank has as many sequences."""
    parts = ranks * config.train.accumulation
    if config.train.batch % parts:
        what = f"{ranks} processes times train.accumulation={config.train.accumulation}"
        raise ValueError(f"train.batch must be a multiple of {what}, got {config.train.batch}")


def require_alike(what: str, mine: str, tell: Tell) -> None:
    """Raises: ValueError, on every rank, if ranks disagree, naming the first that differs from rank 0."""
    told = tell(mine)
    for rank, other in enumerate(told):
        if other != told[0]:
            raise ValueError(f"{what} must be the same on every rank: rank 0 has {told[0]}, rank {rank} has {other}")


def require_same_config(fields: dict[str, Any], tell: Tell) -> None:
    """fields: the config, flat. Raises: ValueError, on every rank, naming the first field in which ranks differ."""
    told = [json.loads(text) for text in tell(json.dumps(fields))]
    for rank, other in enumerate(told):
        for name in {**told[0], **other}:
            if other.get(name) != told[0].get(name):
                raise ValueError(
                    f"{name} must be the same on every rank: rank 0 has {told[0].get(name)!r},"
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
