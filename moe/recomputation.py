"""Whether a forward pass is the second of activation checkpointing, which no statistics may count."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_told = False


@contextmanager
def recomputing() -> Iterator[None]:
    """A forward pass in here is a recomputation: also one of a module compiled inside the checkpoint, which cannot see
    the backward pass around it and is compiled once for each of the two.

    >>> checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputing()))
    """
    global _told
    before, _told = _told, True
    try:
        yield
    finally:
        _told = before


def in_backward() -> bool:
    """Whether autograd is running a backward pass, or :func:`recomputing` says so: a forward pass in there is the
    recomputation of a checkpoint."""
    return _told or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1)
