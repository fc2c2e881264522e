"""Prefix language models: the first tokens see each other, the loss begins after them."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer.loss import IGNORE


def past_prefix(
    targets: Int[Tensor, "B L"], length: int, place: Int[Tensor, "#B L"] | None = None
) -> Int[Tensor, "B L"]:
    """Next tokens [B, L] with −100 for those inside a prefix of ``length`` tokens, which their predecessors see.

    place: where each column stands in its text; None: from 0 on. Position i predicts token i + 1, so the first that
    counts is position length − 1 (Raffel et al. 2020, arXiv:1910.10683, §3.2.1: the loss is that of the tokens after
    the prefix).
    """
    if length <= 1:
        return targets
    if place is None:
        place = torch.arange(targets.shape[1], device=targets.device)[None]
    return targets.masked_fill(place < length - 1, IGNORE)


def require_whole_prefix(length: int, seen: Int[Tensor, "B"], real: Bool[Tensor, "B L"]) -> None:
    """Raises: ValueError if a text goes on of which a cache has ``seen`` tokens, not yet all of its prefix.

    Tokens of the prefix see the later ones of it, which must be there when they are read. real: False marks padding
    among what comes now; a text whose prefix is still to come may end inside it, and then cannot go on.
    """
    short = seen[(seen > 0) & (seen < length) & real.any(1)]
    if len(short):
        raise ValueError(
            f"a cache must get the first prefix_length={length} tokens of a text at once, as they see each other, "
            f"got {int(short[0])} before these"
        )
