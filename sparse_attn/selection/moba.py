"""Mixture of block attention: each query picks key blocks by the mean of their keys."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_attn.checking import check_mask, check_shapes
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.ranking import best_columns
from sparse_attn.selection.record import BlockSelection, Selected
from sparse_attn.selection.scoring import PLAIN, ScoreOptions
from sparse_attn.selection.selected import attend_selected


class MoBA(nn.Module):
    """Attention to the blocks that :func:`moba` chooses, as a layer's selection. It has no parameters.

    Raises: ValueError if block or top_k < 1.
    """

    def __init__(self, *, block: int = 64, top_k: int = 8) -> None:
        super().__init__()
        _check_sizes(block, top_k)
        self.block, self.top_k = block, top_k

    def forward(
        self,
        q: Float[Tensor, "B H L d"],
        k: Float[Tensor, "B Hkv S d"],
        v: Float[Tensor, "B Hkv S d_v"],
        *,
        hidden: Float[Tensor, "B L dim"] | None = None,
        key_mask: Bool[Tensor, "B S"] | None = None,
        scoring: ScoreOptions = PLAIN,
    ) -> Selected:
        """The last query sits at the last key. hidden is not read; key_mask is False for padding.
        scoring: softcap, ALiBi and dropout over the chosen keys; blocks are chosen by content alone."""
        check_shapes(q, k, v, key_mask)
        q, k, v = (without_padding(x, key_mask) for x in (q, k, v))
        chosen = moba(q, k, block=self.block, top_k=self.top_k, key_mask=key_mask)
        return Selected(attend_selected(q, k, v, chosen, key_mask=key_mask, scoring=scoring), {}, chosen)

    def extra_repr(self) -> str:
        return f"block={self.block}, top_k={self.top_k}"


@torch.no_grad()
def moba(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    *,
    block: int = 64,
    top_k: int = 8,
    key_mask: Bool[Tensor, "B S"] | None = None,
) -> BlockSelection:
    """The ``top_k`` key blocks of highest score s_c = q · mean(keys of block c), the query's own block always one.

    Lu et al. 2025 (arXiv:2502.13189), eq. 5–6: a block that starts after the query has score -∞, its own block +∞.
    Query heads that share a key head choose by the sum of their scores (the paper has one key head for each).
    The last query sits at the last key. key_mask: padding is in no mean, and a block of nothing else is not chosen,
    the own one excepted. No gradient passes the choice, as in the paper: only the attention over the chosen keys
    trains q and k. Raises: ValueError if block or top_k < 1, or L > S.
    """
    _check(q, k, block, top_k, key_mask)
    length, keys = q.shape[2], k.shape[2]
    offset = keys - length
    means = block_means(k, block, key_mask)
    grouped = q.to(means.dtype).unflatten(1, (k.shape[1], -1)).sum(2)
    scores = grouped @ means.mT
    own = (torch.arange(length, device=q.device) + offset)[:, None] // block
    column = torch.arange(means.shape[2], device=q.device)
    scores.masked_fill_(column > own, -torch.inf)
    if key_mask is not None:
        scores.masked_fill_(~_any_real(key_mask, block)[:, None, None], -torch.inf)
    scores.masked_fill_(column == own, torch.inf)
    return BlockSelection(best_columns(scores, top_k), block, keys, offset)


def block_means(
    k: Float[Tensor, "B Hkv S d"], block: int, key_mask: Bool[Tensor, "B S"] | None = None
) -> Float[Tensor, "B Hkv R d"]:
    """Mean key of each block, at least in float32, over the keys that it has: a ragged last block has fewer, and
    padding does not count. Zero for a block of padding."""
    work = k.to(torch.promote_types(k.dtype, torch.float32))
    if key_mask is not None:
        real = key_mask[:, None, :, None]
        sums, counts = (_block_sums(x, block) for x in (work.masked_fill(~real, 0), real.to(work.dtype)))
        return sums / counts.clamp(min=1)
    counts = (k.shape[2] - torch.arange(0, k.shape[2], block, device=k.device)).clamp(max=block)
    return _block_sums(work, block) / counts[:, None]


def _block_sums(x: Float[Tensor, "B h S d"], block: int) -> Float[Tensor, "B h R d"]:
    whole = x.shape[2] // block * block
    sums = x[:, :, :whole].unflatten(2, (-1, block)).sum(3)
    if whole == x.shape[2]:
        return sums
    return torch.cat([sums, x[:, :, whole:].sum(2, keepdim=True)], 2)


def _any_real(key_mask: Bool[Tensor, "B S"], block: int) -> Bool[Tensor, "B R"]:
    rest = -key_mask.shape[1] % block
    return torch.nn.functional.pad(key_mask, (0, rest)).unflatten(1, (-1, block)).any(2)


def _check_sizes(block: int, top_k: int) -> None:
    for name, value in (("block", block), ("top_k", top_k)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _check(q: Tensor, k: Tensor, block: int, top_k: int, key_mask: Tensor | None) -> None:
    _check_sizes(block, top_k)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not be longer than k={k.shape[2]}, got {q.shape[2]}")
    if q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"key heads must divide the {q.shape[1]} query heads, got {k.shape[1]}")
    check_mask("key_mask", key_mask, k)
