"""Block-sparse attention by torch's flex_attention, compiled: it trains on CUDA, and on CPU it infers."""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.backends.scoring import Scoring
from sparse_attn.layout import BlockLayout

# The table of block pairs is dense; above this the folded and triton backends go on without one.
BLOCK_PAIRS = 1 << 26


def flex_attend(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    layout: BlockLayout,
    *,
    scoring: Scoring,
    key_mask: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> tuple[Float[Tensor, "B H L d_v"], Tensor]:
    """Attention over the visited blocks of ``layout``, handed over as block indices; no mask is evaluated to find them.

    Dong et al. 2024 (arXiv:2412.05496). The truth inside a partial block is looked up in the layout's own masks, so
    that patterns of equal lengths share one compiled kernel. Softcap and ALiBi are applied to the scores in the
    kernel. The log-sum-exp, [B, H, L] float32, is empty unless asked for.
    The first call of a shape compiles (a C++ compiler on CPU, triton on CUDA).
    Raises: ValueError on CPU where a gradient or the log-sum-exp is asked for, which torch does not have there; for
    dropout; and where the table of block pairs would hold more than 2^26.
    """
    _check(q, k, v, layout, dropout, return_lse)
    if q.shape[2] == 0 or k.shape[2] == 0 or layout.visited_blocks == 0:
        # zero, and zero gradient
        nothing = (q.sum() + k.sum() + v.sum()) * 0
        return q.new_zeros(*q.shape[:3], v.shape[3]) + nothing, q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    blocks = _block_mask(layout, q.device, key_mask)
    options = {"BLOCK_M": layout.block, "BLOCK_N": layout.block} if layout.block < 128 and q.is_cuda else None
    with torch.autocast(q.device.type, enabled=False):
        found = _compiled()(
            q,
            k,
            v,
            score_mod=_score_mod(scoring, layout),
            block_mask=blocks,
            scale=scoring.scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_lse=return_lse,
            kernel_options=options,
        )
    return found if return_lse else (found, q.new_empty(0))


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(layout: BlockLayout, device: torch.device, key_mask: Tensor | None) -> Any:
    """The layout as flex's record: full blocks apart from partial ones, each row's blocks first in its line."""
    from torch.nn.attention.flex_attention import BlockMask

    table = _mask_table(layout)
    partial, full = (_listed(found) for found in (table >= 0, table == -1))
    block, masks, where = layout.block, _padded(layout.masks).to(device), table.to(device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = where[i // block, j // block]
        truth = (mask == -1) | ((mask >= 0) & masks[mask.clamp(min=0), i % block, j % block])
        return truth if key_mask is None else truth & key_mask[b, j]

    if key_mask is not None:
        # padding may lie in any block, so none is full
        partial, full = _listed(table >= -1), _listed(table < -2)
    few, some, many, all_of = (x[None, None].to(device) for x in (*partial, *full))
    lengths = (layout.q_len, layout.kv_len)
    return BlockMask.from_kv_blocks(few, some, many, all_of, BLOCK_SIZE=block, mask_mod=seen, seq_lengths=lengths)


def _padded(masks: Bool[Tensor, "U block block"]) -> Bool[Tensor, "U2 block block"]:
    """At least 8 masks, and a power of two of them: another number of masks would be another compilation."""
    count = max(8, 1 << max(masks.shape[0] - 1, 0).bit_length())
    return torch.cat([masks, masks.new_zeros(count - masks.shape[0], *masks.shape[1:])])


def _mask_table(layout: BlockLayout) -> Int[Tensor, "R C"]:
    """For each pair of blocks the row of the layout's masks, -1 where it is full, -2 where it is not visited."""
    table = torch.full((layout.num_query_blocks, -(-layout.kv_len // layout.block)), -2, dtype=torch.int64)
    table[layout.query_block, layout.key_block] = layout.mask_index
    return table


def _listed(found: Bool[Tensor, "R C"]) -> tuple[Int[Tensor, "R"], Int[Tensor, "R C"]]:
    """How many blocks each row visits, and their columns, ascending, before the others."""
    order = found.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return found.sum(1).to(torch.int32), order.to(torch.int32)


def _score_mod(scoring: Scoring, layout: BlockLayout) -> Any:
    """cap(score) - slope · |i - j| on flex's score, which the scale is already in; None where that is all."""
    if scoring.plain:
        return None
    softcap, slopes = scoring.softcap, scoring.slopes
    shift = layout.offset - layout.key_offset

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        capped = score if softcap is None else softcap * torch.tanh(score / softcap)
        return capped if slopes is None else capped - slopes[h] * (i + shift - j).abs()

    return modified


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, dropout: float, return_lse: bool) -> None:
    pairs = layout.num_query_blocks * -(-layout.kv_len // layout.block)
    if pairs > BLOCK_PAIRS:
        raise ValueError(f"backend='flex' needs at most {BLOCK_PAIRS} pairs of blocks, got {pairs}: use 'folded'")
    if dropout:
        raise ValueError(f"backend='flex' has no dropout: dropout must be 0, got {dropout}")
    if q.is_cuda:
        return
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("backend='flex' has no gradients on CPU: use 'folded', or torch.no_grad()")
    if return_lse:
        raise ValueError("backend='flex' gives no log-sum-exp on CPU: use 'folded'")
