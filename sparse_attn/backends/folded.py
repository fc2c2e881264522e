"""Block-sparse attention in plain torch, forward and backward, a cache-sized piece at a time.

A piece is a few query blocks of a few heads. Its keys are a strided view of K where the plan allows it, so a window
costs no copy; its scores are computed, masked and normalised while they are in cache and then forgotten. Only q, k, v,
the output and the log-sum-exp are kept: memory is linear in the length. The backward computes the scores again; with
the log-sum-exp known, the probability is one exp and its gradient one product (as FlashAttention-2, arXiv:2307.08691).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_attn.backends.flash import flash_backward, flash_forward
from sparse_attn.backends.pieces import Piece, tiles_of
from sparse_attn.backends.plan import Plan
from sparse_attn.backends.remainders import join, split
from sparse_attn.backends.scoring import Scoring
from sparse_attn.backends.work import BITS, CALM, FEW, Work, written_faster
from sparse_attn.heads import side_by_side
from sparse_attn.once import applied, differentiable_once


def folded(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    plan: Plan,
    *,
    scoring: Scoring,
    key_mask: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """Attention over the visited blocks of ``plan``, and the log-sum-exp of each query's visible scores.

    bf16 and fp16 are computed in float32 and rounded once. Dropout draws one seed from torch's generator, so it obeys
    ``torch.manual_seed`` and repeats under activation checkpointing.
    """
    if 0 in (q.shape[1], q.shape[3], v.shape[3]):
        return _without_numbers(q, k, v, plan, scoring=scoring, key_mask=key_mask, dropout=dropout)
    if plan.inner is not None:
        return _by_remainder(q, k, v, *plan.inner, scoring=scoring, key_mask=key_mask, dropout=dropout)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    with torch.autocast(q.device.type, enabled=False):
        return applied(_Folded, q, k, v, key_mask, plan, scoring, dropout, seed)


def _without_numbers(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scoring: Scoring, key_mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """No heads, or heads of width 0, whose scores are 0."""
    if not q.shape[1]:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    rows, keys, values = (x if x.shape[3] else F.pad(x, (0, 1)) for x in (q, k, v))
    out, lse = folded(rows, keys, values, plan, scoring=scoring, key_mask=key_mask, dropout=dropout)
    return out[..., : v.shape[3]], lse


def _by_remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: int,
    plan: Plan,
    *,
    scoring: Scoring,
    key_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Every remainder of the positions by ``step`` for itself, as heads; as sequences where a mask tells them apart."""
    axis = 1 if key_mask is None else 0
    slopes = scoring.slopes
    if slopes is not None:  # distances are step times as long
        slopes = step * (slopes.repeat(step) if axis == 1 else slopes)
    rows, keys, values = (split(x, step, axis) for x in (q, k, v))
    mask = None if key_mask is None else split(key_mask[:, None, :, None], step, axis)[:, 0, :, 0]
    inner = replace(scoring, slopes=slopes)
    out, lse = folded(rows, keys, values, plan, scoring=inner, key_mask=mask, dropout=dropout)
    return join(out, step, axis), join(lse[..., None], step, axis).squeeze(-1)


class _Folded(torch.autograd.Function):
    """Saves q, k, v, out, lse. dS = P ∘ (dP - Σ_c dout_ic out_ic + dlse_i) with P = exp(S - lse) from q and k."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        plan: Plan,
        scoring: Scoring,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        like = q
        q, k, v = side_by_side(q, k, v)
        work = Work(q, k, v, key_mask, plan, scoring, dropout, seed)
        if v.shape[-1] != q.shape[-1]:
            out = work.k.new_zeros(*q.shape[:-1], v.shape[-1])
        else:  # where parts read and write it in turns, in one stretch for each head
            out = work.output(q if plan.merges else like)
        lse = work.k.new_full((*q.shape[:-1], 1), -torch.inf)
        kernel, plain = (partial(run, work, q, out, lse) for run in (flash_forward, _forward))
        work.each(kernel if work.fused else plain, plain)
        # As torch's own attention: the output keeps the strides of q, so that merging the heads afterwards is a view.
        alike = out.shape != like.shape or out.stride() == like.stride()
        out = out.to(q.dtype) if alike else torch.empty_like(like).copy_(out)
        ctx.save_for_backward(q, k, v, key_mask, out, lse)
        ctx.settings = (plan, scoring, dropout, seed)
        ctx.set_materialize_grads(False)
        return out, (lse / BITS if work.bits else lse).squeeze(-1)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, out, lse = ctx.saved_tensors
        out, grad_out = side_by_side(out, torch.zeros_like(out) if grad_out is None else grad_out)
        with torch.autocast(q.device.type, enabled=False):
            work = Work(q, k, v, key_mask, *ctx.settings)
            work.calm = bool(((lse.abs() <= CALM) | lse.isinf()).all())
            # 2^(S - inf) is 0: what sees nothing has no probability, and no NaN.
            lse = lse.masked_fill(lse == -torch.inf, torch.inf)
            grads = work.output(q), torch.zeros_like(work.k), torch.zeros_like(work.v)
            # torch's kernel takes no gradient of the log-sum-exp.
            kernel = partial(flash_backward, work, q, out, lse, grad_out, grads)
            plain = partial(_backward, work, q, out, lse, grad_out, grad_lse, grads)
            fused = work.fused and grad_lse is None
            written = fused and work.calm and written_faster(q.shape[-1])
            work.each(kernel if fused else plain, plain, few=FEW if written else 0)
        return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype), *[None] * 5


def _forward(work: Work, q: Tensor, out: Tensor, lse: Tensor, piece: Piece) -> None:
    """Σ_j 2^(s_ij - top_i) v_j and Σ_j 2^(s_ij - top_i), tile by tile under a rising top."""
    rows = work.queries(piece, q)
    top: Tensor | None = None
    total = value = q.new_empty(0)
    for index, tile in enumerate(tiles_of(piece, work.groups)):
        batched = rows.reshape(tile.batches, -1, rows.shape[-1])
        scores, _ = work.scores(tile, batched, tile.keys(work.k))
        # finite: a row that sees nothing would otherwise be -inf - (-inf)
        peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        probability = scores.sub_(peak).exp2_()
        mass = probability.sum(-1, keepdim=True)
        keep = work.keep(tile, index, probability)
        probability = probability if keep is None else probability.mul_(keep)
        share = work.product(f"share{index > 0}", probability, tile.keys(work.v))
        peak, mass, share = (x.view(*rows.shape[:3], -1) for x in (peak, mass, share))
        if top is None:
            top, total, value = peak, mass, share
            continue
        higher = torch.maximum(top, peak)
        before, now = (top - higher).exp2_(), (peak - higher).exp2_()
        total, value, top = total.mul_(before).addcmul_(mass, now), value.mul_(before).addcmul_(share, now), higher
    if top is None:
        return
    # A query that sees something has the term 2^0 in its total.
    value.div_(total.clamp(min=1))
    total = total.log2().add_(top)
    work.store(piece, out, lse, value, total if work.bits else total.div_(BITS))


def _backward(
    work: Work,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    piece: Piece,
) -> None:
    rows, upstream, shift = (work.queries(piece, x) for x in (q, grad_out, lse))
    shift = shift if work.bits else shift * BITS
    inner = (upstream * work.queries(piece, out)).sum(-1, keepdim=True)
    if grad_lse is not None:
        inner = inner - work.queries(piece, grad_lse[..., None])
    grad_rows = q.new_empty(0)
    for index, tile in enumerate(tiles_of(piece, work.groups)):
        q_rows, up, minus, less = (x.reshape(tile.batches, -1, x.shape[-1]) for x in (rows, upstream, inner, shift))
        keys = tile.keys(work.k)
        scores, slope = work.scores(tile, q_rows, keys, less)
        # no score is above the log-sum-exp; rounded, large ones may be
        probability = (scores if work.calm else scores.clamp_(max=0)).exp2_()
        keep = work.keep(tile, index, probability)
        tile.add(grads[2], work.product("keys", (probability if keep is None else probability * keep).mT, up))
        values = tile.keys(work.v)
        grad_p = work.product("grad", up, values.mT)
        grad_p = grad_p if keep is None else grad_p.mul_(keep)
        grad_s = grad_p.sub_(minus).mul_(probability)
        grad_s = grad_s if slope is None else grad_s.mul_(slope)
        scale = work.scoring.scale
        tile.add(grads[1], work.product("keys", grad_s.mT, q_rows, scale))
        part = work.product(f"share{index > 0}", grad_s, keys, scale).view(rows.shape)
        grad_rows = grad_rows.add_(part) if index else part
    work.store_gradient(piece, grads[0], grad_rows)
