"""Scores taken again and again while weights go: the rounds of SNIP and SynFlow."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pruning.batches import Progress
from pruning.mask_selection import Select
from pruning.structure import check_fraction


def exponential(sparsity: float, rounds: int) -> list[float]:
    """Sparsity after round k = 1 … n: 1 − (1 − s)^(k/n), each round keeping the same share of what is left.

    Tanaka et al. 2020 (arXiv:2006.05467), algorithm 1.
    Raises: ValueError for a sparsity outside [0, 1) or rounds < 1."""
    check_fraction("sparsity", sparsity)
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    return [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds)] + [sparsity]


def scored_in_rounds(
    weights: Mapping[str, Tensor],
    score: Callable[[], dict[str, Tensor]],
    *,
    sparsity: float,
    rounds: int,
    select: Select,
    progress: Progress = None,
) -> dict[str, Tensor]:
    """score() is called in every round on what the rounds before left of `weights`, which are set to 0 in place.

    The scores of the last round, −inf where a weight went before; selecting from them at `sparsity` is that round.
    Weights that are 0 at first are gone. Rounds that ask no more than is gone already are left out."""
    kept = {name: weight.detach() != 0 for name, weight in weights.items()}
    gone = 1 - sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())
    shares = [share for share in exponential(sparsity, rounds)[:-1] if share > gone]
    steps = [*shares, sparsity]
    for share in progress(steps) if progress else steps:
        scores = {name: found.masked_fill(~kept[name], -torch.inf) for name, found in score().items()}
        if share != sparsity:
            kept = select(scores, share).kept
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.masked_fill_(~kept[name], 0)
    return scores


@contextmanager
def restored(weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Every weight has its values again at the end, errors included."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
