"""Attention whose dropout draws from torch's global generators, under seeds that belong to sequences; recomputation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor


@torch.compiler.disable(reason="torch's global generators are seeded on the host")
def attend_seeded(
    attend: Callable[[slice], Float[Tensor, "b H L d"]], seeds: Sequence[int], device: torch.device
) -> Float[Tensor, "B H L d"]:
    """``attend(slice(i, i + 1))`` of every sequence i under its own seed, side by side: what a sequence drops does not
    depend on the batch it stands in. The global generators are left as they were."""
    outs = []
    for row, seed in enumerate(seeds):
        with seeded(seed, device):
            outs.append(attend(slice(row, row + 1)))
    return torch.cat(outs) if outs else attend(slice(0, 0))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators of the CPU and of this device start from ``seed``, and go on after as before."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def recomputing() -> bool:
    """Whether autograd is running a backward pass: a forward in there is the recomputation of a checkpoint."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
