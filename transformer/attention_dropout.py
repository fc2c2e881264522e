"""Dropout of attention probabilities whose draws belong to a sequence, whichever batch it stands in."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.noise import Noise, Source
from sparse_attn.seeding import attend_seeded, recomputing, seeded

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
    micro-batch or recomputation computes it. From a torch.Generator, which :func:`refuse_recomputation` keeps out of
    recomputations, one seed serves the batch. The global generators are left as they were.
    """
    if isinstance(source, Noise):
        return attend_seeded(attend, seeds_from(source, rows).tolist(), device)
    if rows == 0:
        return attend(slice(0, 0))
    seed = int(torch.randint(SEEDS, (), generator=source, device=source.device))
    with seeded(seed, device):
        return attend(slice(0, rows))


@torch.compiler.disable(reason="generators are seeded on the host")
def seeds_from(source: Source, rows: int) -> Int[Tensor, "B"]:
    """A seed for each of ``rows`` sequences, on the CPU: from :class:`moe.Noise` the same in whichever batch."""
    if not isinstance(source, Noise):
        return torch.randint(SEEDS, (rows,), generator=source, device=source.device).cpu()
    like = torch.empty(rows, dtype=torch.float64)
    return source.draw(SITE, like, lambda part, g: part.random_(0, SEEDS, generator=g)).long()


def refuse_recomputation(source: Source | None) -> None:
    """Raises: ValueError for a torch.Generator in the recomputation of a checkpoint: it has moved on since the forward
    pass and would drop otherwise, which makes gradients wrong."""
    if isinstance(source, torch.Generator) and recomputing():
        raise ValueError(
            "generator must be a moe.Noise or None where activations are computed again in the backward pass, got a "
            "torch.Generator, which would draw other numbers"
        )
