"""One clear error on every rank, whichever failed."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.checkpoint.api import CheckpointException

from training.checkpoint import checkpoints
from training.finite import NonFiniteError

T = TypeVar("T")
# all ranks tell each other a text and hear all of them
Tell = Callable[[str], list[str]]
# errors whose text is written for the user; of others the name says more
SPOKEN = (ValueError, OSError, ImportError, NonFiniteError, RuntimeError)
REASON = "sparse-transformers/reason"
# what gloo, NCCL and the store say when another process is gone or silent
LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed ?out|timeout", re.IGNORECASE)


class LostRankError(ConnectionError):
    """Another rank died, stopped or hung; this one cannot go on without it."""


def how_to_go_on(root: Path, *, ranks: int, variables: Mapping[str, str] = os.environ) -> str:
    """What to do once a rank is lost: torchrun, which says so in ``variables``, starts all again if it may.

    root: the folder of the checkpoints, if there are any yet.
    """
    if not checkpoints(root):
        return f"no checkpoint was written yet: start all {ranks} processes again"
    kept = f"checkpoints in {root} are whole"
    if "TORCHELASTIC_RUN_ID" in variables:
        return f"{kept}: torchrun --max-restarts N goes on from them; else start it again with --resume"
    return f"{kept}: start all {ranks} processes again with --resume"


@contextmanager
def one_clear_error(*, timeout_s: float, advice: Callable[[], str]) -> Iterator[None]:
    """Around all that ranks do together: an error on one is told to the others, which report it instead of a timeout.

    advice: what to do, for the end of the message; asked once a rank is lost.
    Raises: LostRankError in place of an error of torch.distributed; other errors as they are.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        yield
    except (Exception, CheckpointException) as error:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            reason = heard() or f"another of the {ranks} processes died, or was silent for {timeout_s:g} s"
            raise LostRankError(f"rank {rank} stops: {reason}; {advice()}") from error
        tell_others(f"rank {rank}: {in_words(error)}")
        raise


def together(act: Callable[[], T], tell: Tell) -> T:
    """What ``act`` returns here, once it has worked on every rank. Every rank calls it.

    Raises: its ValueError or OSError if every rank has the same, else ValueError as :func:`require_sound`.
    """
    problem: Exception | None = None
    try:
        found = act()
    except (ValueError, OSError) as error:
        problem = error
    problems = tell("" if problem is None else in_words(problem))
    if problem is not None and len(set(problems)) == 1:
        raise problem
    require_sound(problems)
    return found


def require_sound(problems: list[str]) -> None:
    """problems: of each rank, none being empty.

    Raises: ValueError with the problem, and with the first rank that has one unless all have the same.
    """
    for rank, problem in enumerate(problems):
        if problem:
            raise ValueError(problem if len(set(problems)) == 1 else f"rank {rank}: {problem}")


def in_words(error: BaseException) -> str:
    """An error in one line: its text, or its type and text where that alone says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else str(error)
    line = " ".join(text.split())
    return line if line and isinstance(error, SPOKEN) else f"{type(error).__name__}: {line}".removesuffix(": ")


def tell_others(reason: str) -> None:
    """Leave why this rank fails where the others look once they miss it; the first reason stays."""
    with suppress(RuntimeError, OSError):  # the store went with the rank that kept it
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
