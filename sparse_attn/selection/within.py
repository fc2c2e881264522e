"""A pattern that bounds a choice by content: only keys that it shows can be chosen."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.patterns import Pattern, PerHead


def check_within(within: Pattern | None, *, per_head: bool) -> None:
    """Raises: ValueError for what is no pattern, or for one of each head where all heads share a choice."""
    if within is None:
        return
    if not isinstance(within, Pattern):
        raise ValueError(f"within must be None or a Pattern, got {within!r}: parse_pattern reads one from text")
    if isinstance(within, PerHead) and not per_head:
        raise ValueError(f"within must be one pattern, since all heads share the choice, got {within}")


def allowed(
    within: Pattern | None, first: int, queries: int, keys: int, device: torch.device, *, heads: int = 1
) -> Bool[Tensor, "#H m S"]:
    """Which of the first S = ``keys`` keys may be chosen for the m = ``queries`` queries from position ``first`` on:
    those up to the query that the pattern shows. Raises: ValueError for a pattern of another number of heads."""
    at = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    behind = (key <= at)[None]
    return behind if within is None else behind & _shown(within, at, key, heads)


@torch.compiler.disable(reason="patterns of blocks look at their table on the host")
def _shown(
    within: Pattern, at: Int[Tensor, "m 1"], key: Int[Tensor, "S"], heads: int
) -> Bool[Tensor, "m S"] | Bool[Tensor, "H m S"]:
    if not isinstance(within, PerHead):
        return within.visible(at, key)
    if len(within.heads) != heads:
        raise ValueError(f"within must hold a pattern for each of {heads} query heads, got {len(within.heads)}")
    return torch.stack([head.visible(at, key) for head in within.heads])
