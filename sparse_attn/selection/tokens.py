"""A list of keys for each query, and the attention over it.

The listed keys and values are gathered a stretch of queries at a time, so that memory is bounded by ELEMENTS and not by
L × n. The backward pass gathers them again and computes the probabilities again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.backends.scoring import Scoring
from sparse_attn.checking import check_dimensions, check_once, check_shapes, check_within
from sparse_attn.once import applied, differentiable_once
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions

# numbers of gathered keys and values that are held at once
ELEMENTS = 2**21


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """The keys that each query sees: tokens [B, Hs, L, n], Hs = H or Hkv, or 1 where all heads share the choice.

    tokens: positions among the kv_len keys, each at most once for a query, -1 where fewer than n were chosen. The list
    is the whole truth: a causal method lists no key behind its query.
    """

    tokens: Int[Tensor, "B Hs L n"]
    kv_len: int

    def to_mask(self) -> Bool[Tensor, "B Hs L S"]:
        """The truth for every pair, dense: for the reference and for pictures."""
        mask = torch.zeros(*self.tokens.shape[:3], self.kv_len + 1, dtype=torch.bool, device=self.tokens.device)
        # long: kv_len may be more than a narrow type holds, and scatter_ takes no other
        tokens = self.tokens.long()
        mask.scatter_(3, tokens.where(tokens >= 0, self.kv_len), True)
        return mask[..., : self.kv_len]

    @property
    def offset(self) -> int:
        """Position of query 0, key 0 being at 0: the last query sits at the last key."""
        # a sum over a slice: attend reads this before it checks that there are 4 dimensions
        return self.kv_len - sum(self.tokens.shape[2:3])

    def without(self, key_mask: Bool[Tensor, "B S"]) -> "TokenSelection":
        """The same list but for the keys where ``key_mask`` is False."""
        rows, tokens = key_mask[:, None, None].expand(*self.tokens.shape[:3], -1), self.tokens.long()
        real = rows.gather(3, tokens.clamp_min(0)) & (tokens >= 0)
        return TokenSelection(tokens.where(real, -1), self.kv_len)

    def check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *, once: bool = True) -> None:
        """Raises: ValueError where the choice is for other sizes, names keys that are not there, or one twice."""
        check_shapes(q, k, v, key_mask)
        check_dimensions("selected tokens", self.tokens)
        batch, heads, length, _ = self.tokens.shape
        wanted, got = [k.shape[0], q.shape[2], k.shape[2]], [batch, length, self.kv_len]
        if wanted != got:
            raise ValueError(f"selection must be for [B, L, S] = {wanted}, got {got}")
        if heads not in (1, k.shape[1], q.shape[1]):
            raise ValueError(
                f"selection heads must be 1, the {k.shape[1]} key or {q.shape[1]} query heads, got {heads}"
            )
        check_within("selected tokens", self.tokens, -1, self.kv_len)
        if once:
            check_once("selected tokens", self.tokens)

    def visit(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, dropout: float, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the listed keys, and its log-sum-exp: see :func:`attend_tokens`."""
        listed = self if key_mask is None else self.without(key_mask)
        options = ScoreOptions(scoring.softcap, scoring.slopes, dropout)
        return attend_tokens(q, k, v, listed, scale=scoring.scale, scoring=options, return_lse=True)

    def density(self) -> float:
        """Share of all pairs that is visited; 0 without pairs."""
        batch, heads, queries, _ = self.tokens.shape
        pairs = batch * heads * queries * self.kv_len
        return float((self.tokens >= 0).sum()) / pairs if pairs else 0.0


@overload
def attend_tokens(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    selection: TokenSelection,
    *,
    scale: float | None = ...,
    scoring: ScoreOptions = ...,
    return_lse: Literal[False] = ...,
) -> Float[Tensor, "B H L d_v"]:
    """The output alone."""


@overload
def attend_tokens(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    selection: TokenSelection,
    *,
    scale: float | None = ...,
    scoring: ScoreOptions = ...,
    return_lse: Literal[True],
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """The output, and the log-sum-exp of each query."""


def attend_tokens(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    selection: TokenSelection,
    *,
    scale: float | None = None,
    scoring: ScoreOptions = PLAIN,
    return_lse: bool = False,
) -> Float[Tensor, "B H L d_v"] | tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """softmax(scale · q kᵀ over the listed keys) v. Query head h reads key head h // (H / Hkv).

    scale: 1/√d if None. scoring: softcap, ALiBi and dropout; the last query sits at the last key. Gradients reach q, k
    and v, not the choice. return_lse: also log Σ exp(score), differentiable, -inf where a query sees nothing; such a
    query gives zeros. Half precision is computed in float32.
    Raises: ValueError where the selection is for other sizes or lists a key outside [-1, S).
    """
    selection.check(q, k, v, once=False)
    factor = 1 / sqrt(max(q.shape[-1], 1)) if scale is None else float(scale)
    options, tokens, rows = scoring.for_call(q), selection.tokens.long(), q
    if tokens.shape[1] not in (1, k.shape[1]):
        # a list for each query head: the heads of a key head are further queries of it
        rows, tokens = (x.unflatten(1, (k.shape[1], -1)).flatten(2, 3) for x in (q, tokens))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = applied(_Tokens, rows, k, v, tokens, factor, options, q.shape[2])
    out, lse = out.reshape(*q.shape[:3], v.shape[3]), lse.reshape(q.shape[:3])
    return (out, lse) if return_lse else out


class _Tokens(torch.autograd.Function):
    """Saves q, k, v, the output and its log-sum-exp. dS = P ∘ (dP - Σ_j P_ij dP_ij + dlse_i)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float, options: ScoreOptions, length: int
    ) -> tuple[Tensor, Tensor]:
        work = _Work(q, k, v, tokens, scale, options, length)
        out = work.q.new_zeros(*work.q.shape[:-1], v.shape[-1])
        lse = work.q.new_full((*work.q.shape[:-1], 1), -torch.inf)
        for part in work.parts():
            found = work.found(part)
            scores, _ = work.scores(part, found)
            total = scores.logsumexp(-1, keepdim=True)
            # a query that sees nothing: exp(-inf - -inf) would be NaN
            scores.sub_(total.clamp(min=torch.finfo(total.dtype).min)).exp_()
            keep = work.keep(part, scores)
            scores = scores if keep is None else scores.mul_(keep)
            out[:, :, part] = (scores.flatten(0, 2) @ work.gathered(work.v, found)).view_as(out[:, :, part])
            lse[:, :, part] = total
        out, lse = work.ungrouped(out).to(q.dtype), work.ungrouped(lse).squeeze(-1)
        ctx.save_for_backward(q, k, v, tokens, out, lse)
        ctx.settings = (scale, options, length)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tokens, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            work = _Work(q, k, v, tokens, *ctx.settings)
            d_q, d_k, d_v = _gradients(work, work.grouped(grad_out), work.grouped(out), lse, grad_lse)
        grads = work.ungrouped(d_q).to(q.dtype), d_k.view_as(k).to(k.dtype), d_v.view_as(v).to(v.dtype)
        return *grads, None, None, None, None


class _Work:
    """One call's tensors in working precision: q as [B, Hkv, L, G, d], k and v as rows [B·Hkv·S, d].

    length: of the sequence; q has L = heads · length rows a head where each query head has its own list."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float, options: ScoreOptions, length: int
    ) -> None:
        self.options, self.length = options, length
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.heads, self.keys, self.scale = k.shape[1], k.shape[2], scale
        self.q = self.grouped(q)
        self.k, self.v = (x.to(self.dtype).flatten(0, 2) for x in (k, v))
        self.tokens = tokens.expand(-1, self.heads, -1, -1)

    def grouped(self, x: Tensor) -> Tensor:
        """[B, H, L, d] as [B, Hkv, L, G, d] in working precision."""
        return x.to(self.dtype).unflatten(1, (self.heads, -1)).transpose(2, 3)

    def ungrouped(self, x: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)

    def parts(self) -> Iterator[slice]:
        """Stretches of queries whose gathered keys and values fit ELEMENTS; none where nothing is listed."""
        batch, heads, length, width = self.tokens.shape
        each = batch * heads * width * (self.k.shape[1] + self.v.shape[1])
        if each == 0 or self.keys == 0:
            return
        step = max(1, ELEMENTS // each)
        for first in range(0, length, step):
            yield slice(first, min(first + step, length))

    def found(self, part: slice) -> Tensor:
        """Rows of the listed keys [B, Hkv, m, n]; -1 stays."""
        tokens = self.tokens[:, :, part]
        first = torch.arange(tokens.shape[0] * self.heads, device=tokens.device) * self.keys
        return (tokens + first.view(-1, self.heads, 1, 1)).where(tokens >= 0, -1)

    def gathered(self, rows: Tensor, found: Tensor) -> Tensor:
        """[B·Hkv·m, n, d]"""
        return rows.index_select(0, found.clamp(min=0).flatten()).view(-1, found.shape[-1], rows.shape[1])

    def scores(self, part: slice, found: Tensor, *, derivative: bool = False) -> tuple[Tensor, Tensor | None]:
        """[B, Hkv, m, G, n], -inf where nothing is listed; the derivative by scale · q·k, where it is not 1."""
        q = self.q[:, :, part]
        scores = (q.flatten(0, 2) @ self.gathered(self.k, found).mT).mul_(self.scale).view(*q.shape[:-1], -1)
        slope = self.options.score_(scores, lambda: self.pairs(part), derivative=derivative)
        return scores.masked_fill_((found < 0).unsqueeze(3), -torch.inf), slope

    def keep(self, part: slice, like: Tensor) -> Tensor | None:
        """Dropout's factors on the probabilities of a part."""
        return self.options.keep(lambda: self.pairs(part), like)

    def pairs(self, part: slice) -> Pairs:
        """Of the scores of a part."""
        batch, heads, rows, groups, _ = self.q.shape
        device, row = self.q.device, torch.arange(part.start, part.stop, device=self.q.device)
        head = torch.arange(heads, device=device)[:, None, None] * (groups * rows // self.length)
        head = head + (row // self.length)[:, None] + torch.arange(groups, device=device)
        return Pairs(
            torch.arange(batch, device=device).view(-1, 1, 1, 1, 1),
            head[..., None],
            (row % self.length + self.keys - self.length)[:, None, None],
            self.tokens[:, :, part, None],
        )


def _gradients(work: _Work, d_out: Tensor, out: Tensor, lse: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = work.grouped(lse[..., None]).clamp(min=torch.finfo(work.dtype).min)
    delta = (d_out * out).sum(-1, keepdim=True) - work.grouped(d_lse[..., None])
    d_q, d_k, d_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (work.q, work.k, work.v))
    for part in work.parts():
        found = work.found(part)
        scores, slope = work.scores(part, found, derivative=True)
        probability = scores.sub_(total[:, :, part]).exp_()
        keep = work.keep(part, probability)
        upstream, rows = d_out[:, :, part].flatten(0, 2), found.clamp(min=0).flatten()
        d_scores = (upstream @ work.gathered(work.v, found).mT).view_as(probability)
        d_scores = d_scores if keep is None else d_scores.mul_(keep)
        d_scores.sub_(delta[:, :, part]).mul_(probability).mul_(work.scale)
        flat = (d_scores if slope is None else d_scores.mul_(slope)).flatten(0, 2)
        probability = probability if keep is None else probability.mul_(keep)
        d_v.index_add_(0, rows, (probability.flatten(0, 2).mT @ upstream).flatten(0, 1))
        d_k.index_add_(0, rows, (flat.mT @ work.q[:, :, part].flatten(0, 2)).flatten(0, 1))
        d_q[:, :, part] = (flat @ work.gathered(work.k, found)).view_as(d_q[:, :, part])
    return d_q, d_k, d_v
