"""From assignments to rows grouped by expert, and the capacity that bounds the groups."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing import Routing, count_experts


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
    """C = ceil(N / E · factor), N the assignments of real tokens (K·T without padding). Raises: ValueError, factor ≤ 0."""
    if not factor > 0 or math.isinf(factor):
        raise ValueError(f"capacity_factor must be a finite number > 0, got {factor}")
    # the small slack keeps 1.1 · 10 from becoming 12
    return math.ceil(num_assignments * factor / num_experts - 1e-9)


def limit_capacity(routing: Routing, factor: float) -> Routing:
    """Keep the first C assignments of each expert in token order; the rest move to ``dropped``.

    A dropped assignment contributes nothing to the output: its token passes by the residual connection.
    C counts the choices before dropping, so limiting twice by the same factor changes nothing.
    """
    chosen = routing.token.shape[0] + routing.dropped.shape[0]
    keep = _rank_in_expert(routing) < expert_capacity(chosen, routing.num_experts, factor)
    lost = torch.stack([routing.token[~keep], routing.expert[~keep]], dim=1)
    return dataclasses.replace(
        routing,
        token=routing.token[keep],
        expert=routing.expert[keep],
        weight=routing.weight[keep],
        dropped=torch.cat([routing.dropped, lost]),
    )


def _rank_in_expert(routing: Routing) -> Int[Tensor, "N"]:
    """How many earlier assignments chose the same expert."""
    groups = group_by_expert(routing.token, routing.expert, routing.num_experts)
    starts = groups.counts.cumsum(0) - groups.counts
    rank = torch.empty_like(routing.expert)
    rows = torch.arange(rank.shape[0], device=rank.device, dtype=rank.dtype)
    rank[groups.order] = rows - starts[routing.expert[groups.order]]
    return rank


def combine_rows(rows: Float[Tensor, "N D"], token: Int[Tensor, "N"], num_tokens: int) -> Float[Tensor, "T D"]:
    """y_t = Σ of the rows that carry token t."""
    return rows.new_zeros(num_tokens, rows.shape[1]).index_add_(0, token, rows)
