"""Block-sparse attention in plain torch, forward and backward, a cache-sized piece at a time.

A piece is a few query blocks of a few heads. Its keys are a strided view of K where the plan allows it, so a window
costs no copy; its scores are computed, masked and normalised while they are in cache and then forgotten. The backward
computes them again, so only q, k and v are kept: memory is linear in the length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_attn.backends.pieces import Piece, pieces, shares
from sparse_attn.backends.plan import Plan
from sparse_attn.backends.workers import side_by_side

# Scores that make it worth handing a share to another thread.
WORTH = 1 << 18


def folded(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    plan: Plan,
    *,
    scale: float,
    key_mask: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "..."]]:
    """Attention over the visited blocks of ``plan``, and the log-sum-exp of each query's visible scores (empty
    unless asked).

    bf16 and fp16 are computed in float32 and rounded once. Dropout draws one seed from torch's generator, so it obeys
    ``torch.manual_seed`` and repeats under activation checkpointing.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    with torch.autocast(q.device.type, enabled=False):
        return _Folded.apply(q, k, v, key_mask, plan, scale, dropout, seed, return_lse)


class _Work:
    """What forward and backward share: the tensors in working precision and one piece's probabilities."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        plan: Plan,
        dropout: float,
        seed: int,
    ) -> None:
        # float32 for half precision: scores rounded to bf16 would move probabilities by percents.
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.k, self.v, self.plan, self.dropout, self.seed = k.to(self.dtype), v.to(self.dtype), plan, dropout, seed
        self.batch, self.kv_heads = k.shape[:2]
        self.groups = q.shape[1] // max(self.kv_heads, 1)
        masks = plan.layout.masks.to(q.device)
        self.bias = torch.zeros(masks.shape, dtype=self.dtype, device=q.device).masked_fill_(~masks, -torch.inf)
        self.unseen = None if key_mask is None else ~key_mask[:, None, :, None].expand(-1, self.kv_heads, -1, 1)

    def each(self, run: Callable[[Piece], None]) -> None:
        """Run every piece. On a CPU, threads share the heads out: no two write to the same keys."""
        scores = self.plan.layout.visited_blocks * self.plan.layout.block**2 * self.groups
        threads = torch.get_num_threads() if self.k.device.type == "cpu" else 1
        workers = max(1, min(threads, self.batch * self.kv_heads, self.batch * self.kv_heads * scores // WORTH))

        def task(share: list[tuple[int, slice]]) -> None:
            for batch, heads in share:
                for piece in pieces(self.plan, batch, heads, self.groups):
                    run(piece)

        side_by_side([partial(task, share) for share in shares(self.batch, self.kv_heads, workers)])

    def output(self, like: Tensor) -> Tensor:
        """Where the pieces write; zeros only if some query is in no piece."""
        return torch.empty_like(like) if self.plan.covers else torch.zeros_like(like)

    def queries(self, piece: Piece, x: Tensor) -> Tensor:
        """The piece's rows of q, or of anything laid out like it, as [h·R, G·height, d] in working precision."""
        rows = piece.queries(x, self.groups)
        return rows.to(self.dtype).reshape(rows.shape[0] * rows.shape[1], -1, rows.shape[-1])

    def scores(self, piece: Piece, rows: Tensor, keys: Tensor) -> Tensor:
        """Scores of the piece, -inf where the pattern or the key mask hides the key."""
        scores = torch.bmm(rows, keys.mT)
        piece.hide(scores, self.bias, self.groups)
        if self.unseen is not None:
            scores.masked_fill_(piece.keys(self.unseen).mT, -torch.inf)
        return scores

    def probability(self, piece: Piece, scores: Tensor) -> Tensor:
        """Softmax over the visible keys, and zeros where none is visible."""
        if not piece.blind and self.unseen is None:
            return scores.softmax(-1)
        nothing = scores.amax(-1, keepdim=True) == -torch.inf
        return scores.softmax(-1).masked_fill_(nothing, 0)

    def keep(self, piece: Piece, probability: Tensor) -> Tensor | None:
        """Which probabilities dropout keeps, scaled by 1 / (1 - dropout): the same in forward and backward."""
        if not self.dropout:
            return None
        generator = torch.Generator(probability.device).manual_seed((self.seed ^ hash(piece.place)) % 2**63)
        kept = torch.empty_like(probability).bernoulli_(1 - self.dropout, generator=generator)
        return kept / (1 - self.dropout)


class _Folded(torch.autograd.Function):
    """Saves q, k, v only. dS = P ∘ (dP - Σ_j P_ij dP_ij + dlse_i) with P recomputed from q and k."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        plan: Plan,
        scale: float,
        dropout: float,
        seed: int,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, key_mask)
        ctx.settings = (plan, scale, dropout, seed, return_lse)
        work = _Work(q, k, v, key_mask, plan, dropout, seed)
        # As torch's own attention: the output keeps the strides of q, so that merging the heads afterwards is a view.
        out = work.output(q) if v.shape[-1] == q.shape[-1] else q.new_zeros(*q.shape[:-1], v.shape[-1])
        lse = work.k.new_full((*q.shape[:-1], 1) if return_lse else (0, 0, 0, 1), -torch.inf)

        def run(piece: Piece) -> None:
            rows = work.queries(piece, q) * scale
            scores = work.scores(piece, rows, piece.keys(work.k))
            if return_lse:
                piece.write(lse, scores.logsumexp(-1, keepdim=True), work.groups)
            probability = work.probability(piece, scores)
            keep = work.keep(piece, probability)
            dropped = probability if keep is None else probability * keep
            piece.write(out, torch.bmm(dropped, piece.keys(work.v)), work.groups)

        work.each(run)
        return out, lse.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask = ctx.saved_tensors
        plan, scale, dropout, seed, return_lse = ctx.settings
        with torch.autocast(q.device.type, enabled=False):
            work = _Work(q, k, v, key_mask, plan, dropout, seed)
            grads = _gradients(work, q, scale, grad_out, grad_lse if return_lse else None)
        return grads[0], grads[1].to(k.dtype), grads[2].to(v.dtype), *[None] * 6


def _gradients(
    work: _Work, q: Tensor, scale: float, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = work.output(q), torch.zeros_like(work.k), torch.zeros_like(work.v)

    def run(piece: Piece) -> None:
        rows = work.queries(piece, q) * scale
        keys = piece.keys(work.k)
        probability = work.probability(piece, work.scores(piece, rows, keys))
        keep = work.keep(piece, probability)
        upstream = work.queries(piece, grad_out)
        dropped = probability if keep is None else probability * keep
        piece.add(grad_v, torch.bmm(dropped.mT, upstream))
        grad_p = torch.bmm(upstream, piece.keys(work.v).mT)
        if keep is not None:
            grad_p *= keep
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, probability, -1, probability.dtype)
        if grad_lse is not None:
            grad_s.addcmul_(probability, work.queries(piece, grad_lse[..., None]))
        piece.add(grad_k, torch.bmm(grad_s.mT, rows))
        piece.write(grad_q, torch.bmm(grad_s, keys).mul_(scale), work.groups)

    work.each(run)
    return grad_q, grad_k, grad_v
