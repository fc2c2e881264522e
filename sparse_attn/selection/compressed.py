"""Attention over compressed keys, and the choice of key blocks by its probabilities: two of the branches of NSA.

A stretch of queries at a time meets the compressed keys that its last query sees. Its probabilities give the output
and the choice and are forgotten, so nothing of size L × Nc is held; the backward pass computes them again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.once import applied, differentiable_once
from sparse_attn.selection.ranking import best_columns
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions

# scores that are worked on at once: 4 MiB of float32
PIECE = 1 << 20


@dataclass(frozen=True)
class Geometry:
    """Sizes of NSA in keys: compressed key c stands for keys c·stride … c·stride + compress - 1; a query visits
    ``top_n`` blocks of ``block`` keys, the first ``initial`` and its own and ``local`` - 1 before it always.

    Raises: ValueError if a size is < 1, stride does not divide compress and block, compress > block, or top_n cannot
    hold the blocks that are always visited.
    """

    compress: int = 32
    stride: int = 16
    block: int = 64
    top_n: int = 16
    initial: int = 1
    local: int = 2

    def __post_init__(self) -> None:
        for name in ("compress", "stride", "block", "top_n", "local"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.initial < 0:
            raise ValueError(f"initial must be >= 0, got {self.initial}")
        for name in ("compress", "block"):
            if getattr(self, name) % self.stride:
                raise ValueError(f"stride must divide {name}={getattr(self, name)}, got {self.stride}")
        if self.compress > self.block:
            raise ValueError(f"compress must be <= block={self.block}, got {self.compress}")
        if self.top_n < self.initial + self.local:
            raise ValueError(f"top_n must be >= initial + local = {self.initial + self.local}, got {self.top_n}")

    def compressed(self, keys: int) -> int:
        """How many compressed keys lie within the first ``keys`` keys: ⌊(keys - compress) / stride⌋ + 1, or none."""
        return max((keys - self.compress) // self.stride + 1, 0)

    def overlap(self, keys: int, like: Float[Tensor, "..."]) -> Float[Tensor, "Nc C"]:
        """For compressed key c and block j the strides that they share: p_slc = p_cmp · overlap.

        It is eq. 9, p_slc[j] = Σ_{m < block/stride} Σ_{n < compress/stride} p_cmp[j·block/stride - m - n], where j and
        the index of p_cmp count from one: all compressed keys that overlap the block, weighted by the overlap.
        """
        first = torch.arange(self.compressed(keys), device=like.device)[:, None] * self.stride
        start = torch.arange(0, keys, self.block, device=like.device)
        shared = (first + self.compress).minimum(start + self.block) - first.maximum(start)
        return (shared.clamp(min=0) // self.stride).to(like.dtype)


def attend_compressed(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv Nc d"],
    v: Float[Tensor, "B Hkv Nc d_v"],
    *,
    keys: int,
    geometry: Geometry,
    scale: float,
    real: Bool[Tensor, "B Nc"] | None = None,
    options: ScoreOptions = PLAIN,
) -> tuple[Float[Tensor, "B H L d_v"], Int[Tensor, "B Hkv L n"]]:
    """softmax(scale · q kᵀ over the compressed keys wholly behind the query) v, and the blocks that it chooses.

    keys: how many keys there were before compression; the last query sits at the last of them. real: False for
    compressed keys that nobody sees. A block's score is Σ over the query heads of a key head of p · overlap (eq. 9 and
    10 of arXiv:2502.11089); -1 where a query has fewer than top_n blocks. Gradients reach q, k and v through the
    output; the choice passes none. A query that sees nothing gives zeros.
    options, as :meth:`ScoreOptions.for_call` gives them: ALiBi's distance of a compressed key, which the paper does not
    have, is that of the last key it stands for, the nearest of them; blocks are chosen before anything is dropped.
    """
    with torch.autocast(q.device.type, enabled=False):
        out, blocks = applied(_Compressed, q, k, v, keys, geometry, scale, real, options)
    return out, blocks


class _Stretches:
    """One call's tensors, [P, G·m, ·] for the m queries of a stretch, P = B · Hkv."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: int,
        geometry: Geometry,
        real: Tensor | None,
        options: ScoreOptions,
    ) -> None:
        self.options, self.heads = options, k.shape[1]
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.places, self.groups = k.shape[0] * k.shape[1], q.shape[1] // k.shape[1]
        self.k, self.v = (x.to(self.dtype).flatten(0, 1) for x in (k, v))
        self.length, self.offset, self.geometry = q.shape[2], keys - q.shape[2], geometry
        self.unreal = None if real is None else ~real.repeat_interleave(k.shape[1], 0)[:, None]

    def by_place(self, x: Tensor) -> Tensor:
        """[B, H, L, d] → [P, G, L, d]"""
        return x.flatten(0, 1).unflatten(0, (self.places, self.groups))

    def rows(self, x: Tensor, part: slice) -> Tensor:
        """[P, G·m, d] of a tensor by place."""
        return x[:, :, part].to(self.dtype).flatten(1, 2)

    def parts(self) -> Iterator[tuple[slice, int]]:
        """Stretches of queries, and how many compressed keys the last of each sees."""
        first = 0
        while first < self.length:
            most = self.geometry.compressed(self.offset + self.length)
            step = max(1, PIECE // max(self.places * self.groups * most, 1))
            last = min(first + step, self.length)
            yield slice(first, last), self.geometry.compressed(self.offset + last)
            first = last

    def pairs(self, part: slice, seen: int) -> Pairs:
        """Of scores [P, G, m, seen]; a compressed key stands where its last key does."""
        place = torch.arange(self.places, device=self.k.device)[:, None, None, None]
        head = place % self.heads * self.groups + torch.arange(self.groups, device=place.device)[:, None, None]
        at = torch.arange(part.start, part.stop, device=place.device) + self.offset
        key = torch.arange(seen, device=place.device) * self.geometry.stride + self.geometry.compress - 1
        return Pairs(place // self.heads, head, at[:, None], key)

    def keep(self, part: slice, found: Tensor) -> Tensor | None:
        """Dropout's factors on probabilities [P, G·m, seen]; the selected keys of NSA have others."""
        drawn = self.options.keep(lambda: self.pairs(part, found.shape[-1]), found, branch=1)
        return None if drawn is None else drawn.flatten(1, 2)

    def probabilities(
        self, queries: Tensor, part: slice, seen: int, *, derivative: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """softmax over the first ``seen`` compressed keys [P, G·m, seen], zero where the query does not see them; the
        derivative of a score by scale · q·k, where it is not 1."""
        scores = queries @ self.k[:, :seen].mT
        apart = scores.unflatten(1, (self.groups, -1))
        slope = self.options.score_(apart, lambda: self.pairs(part, seen), derivative=derivative)
        slope = None if slope is None else slope.flatten(1, 2)
        at = torch.arange(part.start, part.stop, device=scores.device) + self.offset + 1
        own = ((at - self.geometry.compress).div(self.geometry.stride, rounding_mode="floor") + 1).clamp(min=0)
        least = self.geometry.compressed(self.offset + part.start + 1)
        column = torch.arange(seen, device=scores.device)
        hidden = column[least:] >= own[:, None]
        scores.unflatten(1, (self.groups, -1))[..., least:].masked_fill_(hidden, -torch.inf)
        blind = (own == 0).repeat(self.groups)[:, None]
        if self.unreal is not None:
            scores.masked_fill_(self.unreal[..., :seen], -torch.inf)
            # not by amax, which refuses rows without columns
            blind = (scores == -torch.inf).all(-1, keepdim=True)
        found = scores.softmax(-1)
        # the softmax over no keys at all is 0 / 0
        found = found.masked_fill_(blind, 0) if self.unreal is not None or least == 0 else found
        return found, slope


class _Compressed(torch.autograd.Function):
    """Saves q, k, v and the output. dS = P ∘ (dP - Σ_j P_ij dP_ij)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: int,
        geometry: Geometry,
        scale: float,
        real: Tensor | None,
        options: ScoreOptions,
    ) -> tuple[Tensor, Tensor]:
        work = _Stretches(q, k, v, keys, geometry, real, options)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        width = min(geometry.top_n, -(-keys // geometry.block))
        blocks = torch.full((*k.shape[:2], q.shape[2], width), -1, dtype=torch.int64, device=q.device)
        overlap = geometry.overlap(keys, work.k)
        grouped, by_place = work.by_place(q), work.by_place(out)
        for part, seen in work.parts():
            found, _ = work.probabilities(work.rows(grouped, part).mul(scale), part, seen)
            keep = work.keep(part, found)
            kept = found if keep is None else found * keep
            by_place[:, :, part] = (kept @ work.v[:, :seen]).unflatten(1, (work.groups, -1)).to(q.dtype)
            columns = -(-(part.stop + work.offset) // geometry.block)
            score = found.unflatten(1, (work.groups, -1)).sum(1) @ overlap[:seen, :columns]
            best = _best(score, part.start + work.offset, geometry)
            blocks.flatten(0, 1)[:, part, : best.shape[2]] = best
        ctx.save_for_backward(q, k, v, out)
        ctx.settings = (keys, geometry, scale, real, options)
        ctx.mark_non_differentiable(blocks)
        return out, blocks

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        keys, geometry, scale, real, options = ctx.settings
        with torch.autocast(q.device.type, enabled=False):
            work = _Stretches(q, k, v, keys, geometry, real, options)
            d_q, d_k, d_v = _gradients(work, q, out, grad_out, scale)
        return d_q, d_k.view_as(k).to(k.dtype), d_v.view_as(v).to(v.dtype), None, None, None, None, None


def _best(score: Float[Tensor, "P m C"], first: int, geometry: Geometry) -> Int[Tensor, "P m n"]:
    """The blocks of highest score for queries at ``first`` …; those always visited first, -1 for blocks ahead."""
    own = (torch.arange(score.shape[1], device=score.device) + first)[:, None] // geometry.block
    column = torch.arange(score.shape[2], device=score.device)
    always = (column < geometry.initial) | (column > own - geometry.local)
    ranked = score.masked_fill_(always, torch.inf).masked_fill_(column > own, -torch.inf)
    return best_columns(ranked, geometry.top_n)


def _gradients(work: _Stretches, q: Tensor, out: Tensor, grad_out: Tensor, scale: float) -> tuple[Tensor, ...]:
    d_q = torch.zeros_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = torch.zeros_like(work.k), torch.zeros_like(work.v)
    queries, upstream, outs, d_queries = (work.by_place(x) for x in (q, grad_out, out, d_q))
    for part, seen in work.parts():
        rows, ups = work.rows(queries, part).mul(scale), work.rows(upstream, part)
        found, slope = work.probabilities(rows, part, seen, derivative=True)
        keep = work.keep(part, found)
        d_v[:, :seen].add_((found if keep is None else found * keep).mT @ ups)
        d_scores = ups @ work.v[:, :seen].mT
        d_scores = d_scores if keep is None else d_scores.mul_(keep)
        d_scores.sub_((ups * work.rows(outs, part)).sum(-1, keepdim=True)).mul_(found)
        d_scores = d_scores if slope is None else d_scores.mul_(slope)
        d_k[:, :seen].add_(d_scores.mT @ rows)
        d_rows = (d_scores @ work.k[:, :seen]).mul_(scale)
        d_queries[:, :, part] = d_rows.unflatten(1, (work.groups, -1)).to(q.dtype)
    return d_q, d_k, d_v
