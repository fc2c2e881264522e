"""Attention over the key blocks that each query chose, key block by key block.

The choices are turned round: the queries that chose a key block are gathered in chunks of equal size, many chunks are
one batched product, and a query's parts are added up with their weights at the end. No row of keys is copied for a
query and nothing of size L×S or L×n×block is held; L×n×d is, for a few heads at a time. The backward pass computes the
probabilities again. A column of ones beside v and k makes the products themselves sum the probabilities, and subtract
the log-sum-exp and Σ_j P_ij dP_ij.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from sparse_attn.once import applied, differentiable_once
from sparse_attn.selection.record import BlockSelection
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions
from sparse_attn.selection.visits import Chunks, Visits, turn_round

# scores that are worked on at once: 4 MiB of float32
PIECE = 1 << 20
# numbers of parts that are held at once, unless one head has more
PARTS = 1 << 22


@overload
def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    scoring: ScoreOptions = ...,
    return_lse: Literal[False] = ...,
) -> Tensor:
    """The output alone."""


@overload
def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: BlockSelection,
    *,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    scoring: ScoreOptions = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each query."""


def attend_selected(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    selection: BlockSelection,
    *,
    scale: float | None = None,
    key_mask: Bool[Tensor, "B S"] | None = None,
    scoring: ScoreOptions = PLAIN,
    return_lse: bool = False,
) -> Float[Tensor, "B H L d_v"] | tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """softmax(scale · q kᵀ over the keys of the chosen blocks) v. Query head h reads key head h // (H / Hkv).

    scale: 1/√d if None. key_mask: False for padding, which nobody sees. scoring: softcap, ALiBi and dropout. Gradients
    reach q, k and v, not the choice. return_lse: also log Σ exp(score), differentiable, -inf where a query sees
    nothing; such a query gives zeros. Half precision is computed in float32.
    Raises: ValueError where the selection or the mask is for other sizes.
    """
    selection.check(q, k, v, key_mask, once=False)
    factor = 1 / sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = applied(_Selected, q, k, v, selection, key_mask, factor, scoring.for_call(q))
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Piece:
    """Some chunks: their query rows, their key blocks, which keys are hidden, and the parts [first, last) they fill."""

    queries: Tensor
    blocks: Tensor
    hidden: Tensor | None
    first: int
    last: int


class _Unit:
    """Places first … last-1 of the B · Hkv, G query heads each, and what they visit."""

    def __init__(
        self, selection: BlockSelection, key_mask: Tensor | None, places: range, groups: int, options: ScoreOptions
    ) -> None:
        self.options, self.selection = options, selection
        self.places, self.groups, self.size = slice(places.start, places.stop), groups, selection.block
        self.visits: Visits = turn_round(selection, self.places, key_mask)
        self.split = self.visits.whole.queries.numel() * groups
        self.parts = self.split + self.visits.partial.queries.numel() * groups

    def index(self) -> Tensor:
        """For each query and head [p·L·G, n] its parts, ``self.parts`` where a choice has none."""
        whole, partial = (x.slots * self.groups for x in (self.visits.whole, self.visits.partial))
        parts = whole.where(whole >= 0, (partial + self.split).where(partial >= 0, self.parts))
        heads = torch.arange(self.groups, dtype=parts.dtype, device=parts.device)[:, None]
        return (parts[:, None] + heads).clamp_(max=self.parts).flatten(0, 1)

    def pieces(self) -> Iterator[_Piece]:
        """All chunks, some at once; those without a mask first."""
        first = 0
        for chunks in (self.visits.whole, self.visits.partial):
            rows = chunks.queries.shape[1]
            step = max(1, PIECE // (rows * self.groups * self.size))
            for start in range(0, len(chunks.blocks), step):
                queries, blocks = chunks.queries[start : start + step], chunks.blocks[start : start + step]
                hidden = None if chunks is self.visits.whole else self.visits.hidden(queries, blocks)
                last = first + queries.numel() * self.groups
                yield _Piece(queries, blocks, hidden, first, last)
                first = last

    def rows(self, x: Tensor, dtype: torch.dtype, column: Tensor | None = None) -> Tensor:
        """[P, G, L, d] → [p·L + 1, G, d]: a query's heads side by side, and a row of zeros for empty places."""
        mine = x[self.places].transpose(1, 2)
        width = x.shape[-1] + (column is not None)
        rows = torch.empty(mine.shape[0] * mine.shape[1] + 1, self.groups, width, dtype=dtype, device=x.device)
        rows[-1] = 0
        by_place = rows[:-1].view(*mine.shape[:-1], width)
        by_place[..., : x.shape[-1]].copy_(mine)
        if column is not None:
            by_place[..., -1].copy_(column[self.places].transpose(1, 2))
        return rows

    def blocks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[P, S, d] → [p·C, block, d + 1]: a column of ones last; beyond the last key zeros."""
        mine = pad(x[self.places].to(dtype), (0, 1), value=1.0)
        return pad(mine, (0, 0, 0, -x.shape[1] % self.size)).unflatten(1, (-1, self.size)).flatten(0, 1)

    def pairs(self, piece: _Piece) -> Pairs:
        """Of scores [chunks, rows, G, block]."""
        _, heads, length, _ = self.selection.blocks.shape
        place = (piece.blocks // self.visits.columns + self.places.start)[:, None, None, None]
        first, device = piece.blocks % self.visits.columns * self.size, piece.blocks.device
        key = first[:, None, None, None] + torch.arange(self.size, device=device)
        head = place % heads * self.groups + torch.arange(self.groups, device=device)[:, None]
        return Pairs(place // heads, head, (piece.queries % length + self.selection.offset)[..., None, None], key)

    def score(self, piece: _Piece, scores: Tensor, *, derivative: bool = False) -> Tensor | None:
        """Cap scores [chunks, rows · G, block] and add the bias, in place; the derivative where it is not 1."""
        apart = scores.unflatten(1, (-1, self.groups))
        slope = self.options.score_(apart, lambda: self.pairs(piece), derivative=derivative)
        return None if slope is None else slope.flatten(1, 2)

    def keep(self, piece: _Piece, like: Tensor) -> Tensor | None:
        """Dropout's factors on probabilities laid out like the scores."""
        found = self.options.keep(lambda: self.pairs(piece), like)
        return None if found is None else found.flatten(1, 2)

    def hide(self, piece: _Piece, scores: Tensor, value: float) -> Tensor:
        """[chunks, rows · G, block] with ``value`` where a key is hidden."""
        if piece.hidden is not None:
            scores.unflatten(1, (-1, self.groups)).masked_fill_(piece.hidden, value)
        return scores


def _gathered(rows: Tensor, piece: _Piece) -> Tensor:
    """The piece's rows: [chunks, rows · G, d]."""
    return rows.index_select(0, piece.queries.flatten()).view(len(piece.blocks), -1, rows.shape[-1])


class _Selected(torch.autograd.Function):
    """Saves q, k, v, the output and its log-sum-exp. dS = P ∘ (dP - Σ_j P_ij dP_ij + dlse_i)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        selection: BlockSelection,
        key_mask: Tensor | None,
        scale: float,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        call = _Call(q, k, v, scale)
        units = call.units(selection, key_mask, options)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = torch.empty(q.shape[:-1], dtype=call.dtype, device=q.device)
        for unit in units:
            _attend(call, unit, call.by_place(out), call.by_place(lse))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.units, ctx.scale = units, scale
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            call = _Call(q, k, v, ctx.scale)
            delta = grad_lse - (grad_out.to(call.dtype) * out).sum(-1)
            upstream = tuple(call.by_place(x) for x in (grad_out, delta, -lse.where(lse > -torch.inf, 0)))
            grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
            for unit in ctx.units:
                _gradients(call, unit, upstream, grads)
        return *grads, None, None, None, None


class _Call:
    """One call's tensors by place, q [P, G, L, d], k and v [P, S, d], and the precision it works in."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.count, self.groups = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        self.q, self.k, self.v, self.scale = self.by_place(q), k.flatten(0, 1), v.flatten(0, 1), scale

    def by_place(self, x: Tensor) -> Tensor:
        """[B, H, L, …] → [P, G, L, …]"""
        return x.flatten(0, 1).unflatten(0, (self.count, self.groups))

    def units(self, selection: BlockSelection, key_mask: Tensor | None, options: ScoreOptions) -> list[_Unit]:
        """All places, as many at once as PARTS allows."""
        each = self.groups * selection.blocks.shape[2] * selection.blocks.shape[3] * (self.v.shape[-1] + 1)
        step = max(1, PARTS // max(each, 1))
        starts = range(0, self.count, step)
        return [
            _Unit(selection, key_mask, range(start, min(start + step, self.count)), self.groups, options)
            for start in starts
        ]


def _attend(call: _Call, unit: _Unit, out: Tensor, lse: Tensor) -> None:
    """Fill the unit's places of out [P, G, L, d_v] and lse [P, G, L]."""
    queries = unit.rows(call.q, call.dtype).mul_(call.scale)
    keys, values = unit.blocks(call.k, call.dtype)[..., :-1], unit.blocks(call.v, call.dtype)
    parts = values.new_empty(unit.parts + 1, values.shape[-1])
    highest = values.new_empty(unit.parts + 1)
    parts[-1], highest[-1] = 0, -torch.inf
    for piece in unit.pieces():
        scores = _gathered(queries, piece) @ keys.index_select(0, piece.blocks).mT
        unit.score(piece, scores)
        top = unit.hide(piece, scores, -torch.inf).amax(-1, keepdim=True)
        highest[piece.first : piece.last] = top.flatten()
        place = parts[piece.first : piece.last].view(*scores.shape[:2], -1)
        # exp(-inf) costs some thirty times exp(0)
        probability = unit.hide(piece, unit.hide(piece, scores.sub_(top), 0.0).exp_(), 0.0)
        keep = unit.keep(piece, probability)
        kept = probability if keep is None else probability * keep
        torch.bmm(kept, values.index_select(0, piece.blocks), out=place)
        if keep is not None:
            # what is dropped still counts in the sum
            place[..., -1] = probability.sum(-1)
    _combine(parts, highest, unit.index(), out[unit.places], lse[unit.places])


def _combine(parts: Tensor, highest: Tensor, index: Tensor, out: Tensor, lse: Tensor) -> None:
    """out = Σ_c e^(m_c - m) o_c / s with s = Σ_c e^(m_c - m) s_c, over a query's parts c = index; lse = m + log s."""
    if not index.numel():
        out.zero_()
        lse.fill_(-torch.inf)
        return
    by_query = highest[index]
    top = by_query.amax(-1, keepdim=True)
    # a query that sees nothing: exp(-inf - -inf) would be NaN
    weight = by_query.sub_(top.clamp(min=torch.finfo(top.dtype).min)).exp_()
    total = embedding_bag(index, parts, mode="sum", per_sample_weights=weight)
    places, groups, length = lse.shape
    shape = (places, length, groups)
    # the highest score of a query that sees something adds 1 to its sum
    total, sums = total[:, :-1], total[:, -1:].clamp(min=1)
    out.copy_((total / sums).view(*shape, -1).transpose(1, 2))
    lse.copy_((top + sums.log()).view(shape).transpose(1, 2))


def _gradients(call: _Call, unit: _Unit, upstream: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
    """Fill the unit's places of the gradients of q, k and v; upstream: d_out,
    dlse - Σ d_out·out, and -lse."""
    d_out, delta, lse = upstream
    queries = unit.rows(call.q, call.dtype, lse)
    queries[..., :-1].mul_(call.scale)
    d_outs = unit.rows(d_out, call.dtype, delta)
    keys, values = unit.blocks(call.k, call.dtype), unit.blocks(call.v, call.dtype)
    d_queries = keys.new_empty(unit.parts + 1, keys.shape[-1] - 1)
    d_queries[-1] = 0
    chunks = len(unit.visits.whole.blocks) + len(unit.visits.partial.blocks)
    d_keys = keys.new_empty(chunks, unit.size, keys.shape[-1] - 1)
    d_values = keys.new_empty(chunks, unit.size, values.shape[-1] - 1)
    done = 0
    for piece in unit.pieces():
        rows, ups, some = _gathered(queries, piece), _gathered(d_outs, piece), keys.index_select(0, piece.blocks)
        mine = slice(done, done + len(some))
        done = mine.stop
        probability, slope = _probability(unit, piece, rows, some)
        keep, read = unit.keep(piece, probability), values.index_select(0, piece.blocks)
        torch.bmm((probability if keep is None else probability * keep).mT, ups[..., :-1], out=d_values[mine])
        d_scores = ups @ read.mT if keep is None else _dropped(ups, read, keep)
        d_scores.mul_(probability)
        d_scores = d_scores if slope is None else d_scores.mul_(slope)
        torch.bmm(d_scores.mT, rows[..., :-1], out=d_keys[mine])
        torch.bmm(d_scores, some[..., :-1], out=d_queries[piece.first : piece.last].view(*rows.shape[:2], -1))
    place = call.by_place(grads[0])[unit.places]
    places, groups, length, width = place.shape
    index = unit.index()
    # without a choice there are no bags to add up
    total = embedding_bag(index, d_queries, mode="sum").mul_(call.scale) if index.numel() else place.new_zeros(())
    place.copy_(total.expand(places * length * groups, width).view(places, length, groups, width).transpose(1, 2))
    for grad, by_chunk in ((grads[1], d_keys), (grads[2], d_values)):
        place = grad.flatten(0, 1)[unit.places]
        place.copy_(_by_block(by_chunk, unit).unflatten(0, (places, -1)).flatten(1, 2)[:, : place.shape[1]])


def _probability(unit: _Unit, piece: _Piece, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """[chunks, rows · G, block], and the derivative of a score by scale · q·k where it is not 1. rows end in -lse, keys
    in ones."""
    if unit.options.plain:
        return unit.hide(piece, (rows @ keys.mT).exp_(), 0.0), None
    scores = rows[..., :-1] @ keys[..., :-1].mT
    slope = unit.score(piece, scores, derivative=True)
    return unit.hide(piece, scores.add_(rows[..., -1:]).exp_(), 0.0), slope


def _dropped(ups: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """keep ∘ (d_out vᵀ) + delta: ups end in delta."""
    return (ups[..., :-1] @ values[..., :-1].mT).mul_(keep).add_(ups[..., -1:])


def _by_block(by_chunk: Tensor, unit: _Unit) -> Tensor:
    """[chunks, block, d] added up for each block: [p·C, block, d]."""
    whole = len(unit.visits.whole.blocks)
    parts = ((unit.visits.whole, by_chunk[:whole]), (unit.visits.partial, by_chunk[whole:]))
    sums = [_added(part.flatten(1), chunks) for chunks, part in parts]
    return (sums[0] + sums[1]).unflatten(1, by_chunk.shape[1:])


def _added(part: Tensor, chunks: Chunks) -> Tensor:
    every = torch.arange(len(part), device=part.device)
    return embedding_bag(every, part, chunks.first, mode="sum")
