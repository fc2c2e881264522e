"""Tiles of queries that look at the same short list of keys: what sorting tokens into buckets leaves to compute.

Every tile is a dense product of a few queries with a few keys, gathered by row. The pairs of a tile that may not see
each other are masked by a rule that is asked again in the backward pass, so that no mask is kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.once import applied, differentiable_once
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions

# scores and gathered numbers of tiles that are worked on at once
ELEMENTS = 2**21


@dataclass(frozen=True, eq=False)
class Tiles:
    """queries [N, m] and keys [N, n]: rows of flattened [B·H·L] queries and [B·Hkv·S] keys, -1 where a place is empty.

    A row may stand in many tiles, but at most once in one. heads, q_len, kv_len: H, L and S; the last query sits at the
    last key.
    """

    queries: Int[Tensor, "N m"]
    keys: Int[Tensor, "N n"]
    heads: int
    q_len: int
    kv_len: int

    def pairs(self, part: slice) -> Pairs:
        """Of the scores [t, m, n] of some tiles."""
        rows, listed = self.queries[part].clamp(min=0)[..., None], self.keys[part].clamp(min=0)[:, None]
        at = rows % self.q_len + self.kv_len - self.q_len
        head = rows // self.q_len
        return Pairs(head // self.heads, head % self.heads, at, listed % self.kv_len)


def attend_tiles(
    q: Float[Tensor, "rows d"],
    k: Float[Tensor, "keys d"],
    v: Float[Tensor, "keys d_v"],
    tiles: Tiles,
    visible: Callable[[slice], Bool[Tensor, "..."]],
    *,
    scale: float,
    options: ScoreOptions = PLAIN,
) -> tuple[Float[Tensor, "N m d_v"], Float[Tensor, "N m"]]:
    """In every tile softmax(scale · q kᵀ over its visible keys) v, and log Σ exp(score): zeros and -inf without any.

    visible: for a stretch of tiles the pairs [t, m, n] that see each other; empty places need no rule. q, k and v are
    in working precision; options as :meth:`ScoreOptions.for_call` gives them. Gradients reach q, k and v through both
    outputs.
    """
    with torch.autocast(q.device.type, enabled=False):
        return applied(_Tiles, q, k, v, tiles, visible, scale, options)


def merge_union(
    out: Float[Tensor, "N m d_v"], lse: Float[Tensor, "N m"], queries: Int[Tensor, "N m"], rows: int
) -> tuple[Float[Tensor, "rows d_v"], Float[Tensor, "rows"]]:
    """o_i = Σ_t exp(lse_ti - lse_i) o_ti, lse_i = log Σ_t exp(lse_ti): attention over the keys of all tiles of a row.

    Kitaev et al. 2020 (arXiv:2001.04451), appendix A. A row that saw nothing gives zeros and -inf.
    """
    at = queries.flatten().clamp(min=0)
    each = lse.flatten().masked_fill(queries.flatten() < 0, -torch.inf)
    top = each.new_full((rows,), -torch.inf).scatter_reduce(0, at, each.detach(), "amax")
    top = top.clamp(min=torch.finfo(each.dtype).min)
    weight = (each - top[at]).exp()
    total = each.new_zeros(rows).index_add(0, at, weight)
    mixed = out.new_zeros(rows, out.shape[-1]).index_add(0, at, weight[:, None] * out.flatten(0, 1))
    seen = total > 0
    # a row that saw nothing: 0/0 and log 0 would make NaN gradients
    safe = total.where(seen, 1)
    return mixed / safe[:, None], (top + safe.log()).where(seen, -torch.inf)


def merge_mean(
    out: Float[Tensor, "N m d_v"], lse: Float[Tensor, "N m"], queries: Int[Tensor, "N m"], rows: int
) -> tuple[Float[Tensor, "rows d_v"], Int[Tensor, "rows"]]:
    """The mean of a row's outputs over the tiles where it saw something, and their number; zeros without any."""
    at, seen = queries.flatten().clamp(min=0), (lse > -torch.inf).flatten() & (queries.flatten() >= 0)
    count = torch.zeros(rows, dtype=torch.int64, device=out.device).index_add(0, at, seen.long())
    total = out.new_zeros(rows, out.shape[-1]).index_add(0, at, out.flatten(0, 1) * seen[:, None])
    return total / count.clamp(min=1)[:, None], count


class _Tiles(torch.autograd.Function):
    """Saves the rows, the outputs and their log-sum-exp. dS = P ∘ (dP - Σ_j P_ij dP_ij + dlse_i)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Tiles,
        visible: Callable[[slice], Tensor],
        scale: float,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(*tiles.queries.shape, v.shape[-1])
        lse = q.new_full((*tiles.queries.shape, 1), -torch.inf)
        for part in _parts(tiles, q, v):
            scores, _ = _scores(q, k, tiles, visible, part, scale, options)
            total = scores.logsumexp(-1, keepdim=True)
            # a query that sees nothing: exp(-inf - -inf) would be NaN
            scores.sub_(total.clamp(min=torch.finfo(total.dtype).min)).exp_()
            keep = _keep(options, tiles, part, scores)
            kept = scores if keep is None else scores.mul_(keep)
            out[part], lse[part] = kept @ _gathered(v, tiles.keys[part]), total
        lse = lse.squeeze(-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (tiles, visible, scale, options)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        tiles, visible, scale, options = ctx.settings
        d_q, d_k, d_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        delta = (grad_out * out).sum(-1, keepdim=True) - grad_lse[..., None]
        total = lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]
        for part in _parts(tiles, q, v):
            scores, slope = _scores(q, k, tiles, visible, part, scale, options, derivative=True)
            probability = scores.sub_(total[part]).exp_()
            keep = _keep(options, tiles, part, probability)
            d_scores = grad_out[part] @ _gathered(v, tiles.keys[part]).mT
            d_scores = d_scores if keep is None else d_scores.mul_(keep)
            d_scores.sub_(delta[part]).mul_(probability).mul_(scale)
            d_scores = d_scores if slope is None else d_scores.mul_(slope)
            kept = probability if keep is None else probability.mul_(keep)
            _added(d_v, tiles.keys[part], kept.mT @ grad_out[part])
            _added(d_k, tiles.keys[part], d_scores.mT @ _gathered(q, tiles.queries[part]))
            _added(d_q, tiles.queries[part], d_scores @ _gathered(k, tiles.keys[part]))
        return d_q, d_k, d_v, None, None, None, None


def _parts(tiles: Tiles, q: Tensor, v: Tensor) -> Iterator[slice]:
    """Stretches of tiles whose scores and gathered rows fit ELEMENTS; none where no tile holds a key."""
    (count, rows), keys = tiles.queries.shape, tiles.keys.shape[1]
    if rows == 0 or keys == 0:
        return
    step = max(1, ELEMENTS // (rows * keys + (rows + keys) * (q.shape[1] + v.shape[1])))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _scores(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    visible: Callable[[slice], Tensor],
    part: slice,
    scale: float,
    options: ScoreOptions,
    *,
    derivative: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[t, m, n], -inf where a pair does not see each other; the derivative by scale · q·k, where it is not 1."""
    queries, keys = tiles.queries[part], tiles.keys[part]
    scores = (_gathered(q, queries) @ _gathered(k, keys).mT).mul_(scale)
    slope = options.score_(scores, lambda: tiles.pairs(part), derivative=derivative)
    seen = visible(part) & (queries >= 0)[:, :, None] & (keys >= 0)[:, None]
    return scores.masked_fill_(~seen, -torch.inf), slope


def _keep(options: ScoreOptions, tiles: Tiles, part: slice, like: Tensor) -> Tensor | None:
    return options.keep(lambda: tiles.pairs(part), like)


def _gathered(rows: Tensor, at: Tensor) -> Tensor:
    """[t, m, d]; an empty place repeats row 0, which the mask takes out again."""
    return rows.index_select(0, at.clamp(min=0).flatten()).view(*at.shape, -1)


def _added(total: Tensor, at: Tensor, part: Tensor) -> None:
    total.index_add_(0, at.clamp(min=0).flatten(), part.flatten(0, 1))
