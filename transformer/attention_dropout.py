"""Dropout of attention probabilities whose draws belong to a sequence, whichever batch it stands in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from moe.noise import Noise, Source

SITE = "attention probabilities"
# seeds are drawn as float64, which holds whole numbers up to here
SEEDS = 2**53


@torch.compiler.disable(reason="torch's global generators are seeded on the host")
def drawn_from(
    source: Source, attend: Callable[[slice], Float[Tensor, "b H L d"]], *, rows: int, device: torch.device
) -> Float[Tensor, "B H L d"]:
    """``attend(part)`` of a batch of ``rows`` sequences, whose dropout draws from torch's global generators, from a
    source instead.

    From :class:`moe.Noise` every sequence attends by itself under a seed of its own: the same whichever process,
    micro-batch or recomputation computes it. From a torch.Generator one seed serves the batch. The global generators
    are left as they were.
    """
    if rows == 0:
        return attend(slice(0, 0))
    if not isinstance(source, Noise):
        seed = int(torch.randint(SEEDS, (), generator=source, device=source.device))
        with _seeded(seed, device):
            return attend(slice(0, rows))
    like = torch.empty(rows, dtype=torch.float64)
    seeds = source.draw(SITE, like, lambda part, g: part.random_(0, SEEDS, generator=g))
    outs = []
    for row, seed in enumerate(seeds.tolist()):
        with _seeded(int(seed), device):
            outs.append(attend(slice(row, row + 1)))
    return torch.cat(outs)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators of the CPU and of this device start from ``seed``, and go on after as before."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
