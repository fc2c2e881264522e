"""Heads with patterns of their own: heads of equal pattern attend together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_attn.patterns import Pattern


@dataclass(frozen=True)
class HeadRun:
    """Query heads start … stop-1 of one pattern, and the key heads kv_start … kv_stop-1 that they read."""

    pattern: Pattern
    start: int
    stop: int
    kv_start: int
    kv_stop: int


def side_by_side(*x: Float[Tensor, "_ _ _ _"]) -> list[Tensor]:
    """The rows of each head in one stretch of memory: a copy where they are not, as where a model merges its heads.

    There they lie a multiple of d apart, for 16 heads of 64 on the same cache lines: reading a head's blocks takes up
    to a third longer.
    """
    return [one if one.stride(-2) == one.shape[-1] and one.stride(-1) == 1 else one.contiguous() for one in x]


def head_runs(patterns: Sequence[Pattern], kv_heads: int) -> list[HeadRun]:
    """Runs of equal pattern, cut so that each reads whole key heads with all their query heads, or one key head."""
    group = len(patterns) // max(kv_heads, 1)
    runs: list[HeadRun] = []
    for uniform, members in groupby(range(kv_heads), lambda h: _only(patterns[h * group : (h + 1) * group])):
        kv = list(members)
        if uniform is not None:
            runs.append(HeadRun(uniform, kv[0] * group, (kv[-1] + 1) * group, kv[0], kv[-1] + 1))
            continue
        for head in kv:
            for pattern, some in groupby(range(head * group, (head + 1) * group), patterns.__getitem__):
                inside = list(some)
                runs.append(HeadRun(pattern, inside[0], inside[-1] + 1, head, head + 1))
    return runs


def grouped_order(patterns: Sequence[Pattern], kv_heads: int) -> list[int]:
    """Key heads ordered so that those of equal patterns are neighbours; heads that already are stay in place."""
    group = len(patterns) // max(kv_heads, 1)
    kinds = [tuple(patterns[head * group : (head + 1) * group]) for head in range(kv_heads)]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    return sorted(range(kv_heads), key=lambda head: first[kinds[head]])


def over_heads(
    run: Callable[[Pattern, list[int], Tensor, Tensor, Tensor], Sequence[Tensor]],
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    patterns: Sequence[Pattern],
) -> list[Tensor]:
    """``run(pattern, query heads, q, k, v)`` on the heads of each pattern, its results joined along the heads.

    Neighbours of equal pattern are views. Where equal patterns lie scattered, all heads are copied once in an order
    that brings them together, and the results go back.
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    order = grouped_order(patterns, kv_heads)
    query_order = [head * group + member for head in order for member in range(group)]
    moved = order != list(range(kv_heads))
    if moved:
        q, k, v = q[:, query_order], k[:, order], v[:, order]
    runs = head_runs([patterns[head] for head in query_order], kv_heads)
    # split: the gradients of all parts are joined once, not added up in a tensor of zeros for each.
    queries = q.split([part.stop - part.start for part in runs], 1)
    bounds = list(dict.fromkeys((part.kv_start, part.kv_stop) for part in runs))
    sizes = [stop - start for start, stop in bounds]
    keys, values = (dict(zip(bounds, x.split(sizes, 1), strict=True)) for x in (k, v))
    results = [
        run(
            part.pattern,
            query_order[part.start : part.stop],
            rows,
            keys[part.kv_start, part.kv_stop],
            values[part.kv_start, part.kv_stop],
        )
        for part, rows in zip(runs, queries, strict=True)
    ]
    joined = [torch.cat(parts, 1) for parts in zip(*results, strict=True)]
    if not moved:
        return joined
    back = torch.tensor(query_order).argsort().to(q.device)
    return [x.index_select(1, back) for x in joined]


def alibi_slopes(num_heads: int) -> Float[Tensor, "H"]:
    """Slopes of ALiBi: 2^(-8h/n), h = 1 … n, for a power of two n.

    For other counts those of the power of two below, followed by every second slope of the power of two above, as
    the authors' code does. Press et al. 2021 (arXiv:2108.12409). Raises: ValueError if num_heads < 1.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads}")
    below = 1 << num_heads.bit_length() - 1
    exact = 2.0 ** (-8 / below * torch.arange(1, below + 1))
    between = 2.0 ** (-4 / below * torch.arange(1, 2 * below + 1, 2))
    return torch.cat([exact, between[: num_heads - below]])


def _only(patterns: Sequence[Pattern]) -> Pattern | None:
    """The one pattern of all these heads, or None."""
    return patterns[0] if all(pattern == patterns[0] for pattern in patterns) else None
