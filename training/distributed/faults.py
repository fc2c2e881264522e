"""One clear error on every rank, whichever failed."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed import Store

from training.finite import NonFiniteError

REASON = "sparse-transformers/reason"
# what gloo, NCCL and the store say when another process is gone or silent
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed ?out|timeout", re.IGNORECASE)


class LostRankError(ConnectionError):
    """Another rank died, stopped or hung; this one cannot go on without it."""


def how_to_go_on(checkpoints: Path, *, ranks: int, variables: Mapping[str, str] = os.environ) -> str:
    """What to do once a rank is lost: torchrun, which says so in ``variables``, starts all again if it may."""
    kept = f"checkpoints in {checkpoints} are whole"
    if "TORCHELASTIC_RUN_ID" in variables:
        return f"{kept}: torchrun --max-restarts N goes on from them; else start it again with --resume"
    return f"{kept}: start all {ranks} processes again with --resume"


@contextmanager
def one_clear_error(*, timeout_s: float, advice: str) -> Iterator[None]:
    """Around all that ranks do together: an error on one is told to the others, which report it instead of a timeout.

    advice: what to do, for the end of the message.
    Raises: LostRankError in place of an error of torch.distributed; other errors as they are.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        yield
    except (ValueError, OSError, ImportError, NonFiniteError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            reason = heard() or f"another of the {ranks} processes died, or was silent for {timeout_s:g} s"
            raise LostRankError(f"rank {rank} stops: {reason}; {advice}") from error
        tell_others(f"rank {rank}: {error}")
        raise


def tell_others(reason: str) -> None:
    """Leave why this rank fails where the others look once they miss it; the first reason stays."""
    store().compare_set(REASON, "", reason)


def heard() -> str:
    """The reason that a rank left, or nothing."""
    try:
        return store().get(REASON).decode() if store().check([REASON]) else ""
    except (RuntimeError, OSError):  # the store went with the rank that kept it
        return ""


def store() -> Store:
    """The store of the default group: torchrun keeps it, so that it outlives a rank."""
    return dist.distributed_c10d._get_default_store()
