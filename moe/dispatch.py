"""From assignments to rows grouped by expert, and the capacity that bounds the groups."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from moe.checks import positive
from moe.routing import Routing, count_experts

Priority = Literal["first_come", "gate", "choice"]


@dataclass(frozen=True)
class Grouping:
    """Assignments in expert order: row r of the grouped matrix carries assignment ``order[r]``.

    order [N]: stable, so that tokens ascend inside a group; token [N]: token of each row;
    counts [E]: rows of each expert, empty groups included.
    """

    order: Int[Tensor, "N"]
    token: Int[Tensor, "N"]
    counts: Int[Tensor, "E"]


def group_by_expert(token: Int[Tensor, "N"], expert: Int[Tensor, "N"], num_experts: int) -> Grouping:
    """Sort the assignments by expert, nothing padded and nothing dropped."""
    order = expert.argsort(stable=True)
    return Grouping(order=order, token=token[order], counts=count_experts(expert, num_experts))


def expert_capacity(num_assignments: int, num_experts: int, factor: float) -> int:
    """C = ceil(N / E · factor), N the assignments of real tokens: K·T without padding. At least 1 for N > 0.

    Raises: ValueError unless factor is finite and positive.
    """
    positive("capacity_factor", factor)
    # the small slack keeps 1.1 · 10 from becoming 12
    return max(min(1, num_assignments), math.ceil(num_assignments * factor / num_experts - 1e-9))


def limit_capacity(routing: Routing, factor: float, *, priority: Priority = "first_come") -> Routing:
    """Keep C assignments of each expert, the first by ``priority``; the rest move to ``dropped``.

    priority: "first_come" keeps a token's assignments before those of later tokens; "gate" takes the tokens by their
    largest router probability, before any renormalisation, and every first choice before any second one (batch
    prioritised routing, V-MoE, Riquelme et al. 2021, arXiv:2106.05974, section 4.1), so that a token's place in the
    batch does not decide; "choice" takes every first choice before any second one, tokens in their order (GShard,
    arXiv:2006.16668).
    A dropped assignment contributes nothing to the output: its token passes by the residual connection.
    C counts the choices before dropping, so limiting twice by the same factor changes nothing; second choices that
    GShard's gate leaves out by chance count too, so that C does not depend on the draw.
    Raises: ValueError for another priority, or a factor that is not finite and positive.
    """
    chosen = routing.token.shape[0] + routing.dropped.shape[0] + routing.skipped
    return limit_rows(routing, expert_capacity(chosen, routing.num_experts, factor), priority=priority)


def limit_rows(routing: Routing, rows: int, *, priority: Priority = "first_come") -> Routing:
    """As :func:`limit_capacity`, with the capacity itself."""
    keep = _rank_in_expert(routing, _precedence(routing, priority)) < rows
    lost = torch.stack([routing.token[~keep], routing.expert[~keep]], dim=1)
    return dataclasses.replace(
        routing,
        token=routing.token[keep],
        expert=routing.expert[keep],
        weight=routing.weight[keep],
        dropped=torch.cat([routing.dropped, lost]),
    )


def _precedence(routing: Routing, priority: Priority) -> Int[Tensor, "N"] | None:
    """The assignments in the order in which they take places; None for the order that they are in."""
    if priority not in get_args(Priority):
        raise ValueError(f"priority must be one of {', '.join(get_args(Priority))}, got {priority!r}")
    if priority == "first_come":
        return None
    earlier = count_experts(routing.token, routing.num_tokens).cumsum(0).roll(1)
    earlier[:1] = 0
    rows = torch.arange(routing.token.shape[0], device=routing.token.device)
    choice = rows - earlier[routing.token]
    if priority == "choice":
        return choice.argsort(stable=True)
    surest = routing.scores.detach().amax(1) if routing.num_tokens else routing.weight.detach()
    by_token = surest[routing.token].argsort(stable=True, descending=True)
    return by_token[choice[by_token].argsort(stable=True)]


def _rank_in_expert(routing: Routing, precedence: Int[Tensor, "N"] | None) -> Int[Tensor, "N"]:
    """How many assignments of the same expert go before each."""
    expert = routing.expert if precedence is None else routing.expert[precedence]
    groups = group_by_expert(routing.token, expert, routing.num_experts)
    starts = groups.counts.cumsum(0) - groups.counts
    rank = torch.empty_like(expert)
    rows = torch.arange(rank.shape[0], device=rank.device, dtype=rank.dtype)
    rank[groups.order] = rows - starts[expert[groups.order]]
    if precedence is None:
        return rank
    return torch.empty_like(rank).scatter_(0, precedence, rank)


@dataclass(frozen=True)
class Block:
    """``experts`` neighbouring experts from ``first`` on, each with ``rows`` rows, the first of them row ``start``."""

    first: int
    experts: int
    rows: int
    start: int


def plan_blocks(sizes: list[int], *, width: int, multiple: int, chunk: int, spare: int = 8) -> list[Block]:
    """Cover the experts' rows by blocks of equal row counts, for one batched product each.

    Up to ``width`` neighbours share a block while filling their rows up to the largest, and that to a multiple of
    ``multiple``, adds at most 1/``spare``; an expert with more than ``chunk`` rows gets several blocks of its own.
    width=1, multiple=1 pads nothing. Empty experts cost no rows where they stand alone.

    >>> plan_blocks([5, 7, 0], width=2, multiple=1, chunk=8)
    [Block(first=0, experts=1, rows=5, start=0), Block(first=1, experts=1, rows=7, start=5)]
    """
    blocks: list[Block] = []
    first = start = 0
    while first < len(sizes):
        experts = _neighbours(sizes[first : first + width], multiple, chunk, spare)
        rows = -(-max(sizes[first : first + experts]) // multiple) * multiple
        for at in range(0, rows, chunk):
            blocks.append(Block(first, experts, min(chunk, rows - at), start + at))
        start += experts * rows
        first += experts
    return blocks


def _neighbours(sizes: list[int], multiple: int, chunk: int, spare: int) -> int:
    """How many of the leading experts share a block: the most whose padding stays within 1/spare."""
    for experts in range(len(sizes), 1, -1):
        rows = -(-max(sizes[:experts]) // multiple) * multiple
        if rows <= chunk and spare * experts * rows <= (spare + 1) * sum(sizes[:experts]):
            return experts
    return 1
