"""Each query attends to the keys of its highest scores."""

from dataclasses import replace
from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_attn.checking import check_mask, check_shapes
from sparse_attn.patterns import Pattern
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.record import Selected
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions
from sparse_attn.selection.tokens import TokenSelection, attend_tokens
from sparse_attn.selection.within import allowed, check_within

# scores that are held at once: 16 MiB of float32
SCORES = 1 << 22


class TopKKeys(nn.Module):
    """Attention to the keys that :func:`top_k_keys` chooses, as a layer's selection. It has no parameters.

    within: the pattern that shows the keys to choose among; None: all up to the query.
    Raises: ValueError if k < 1, or within is no pattern.

    >>> TopKKeys(64, within=sliding_window(4096) | sinks(4))
    """

    def __init__(self, k: int, *, within: Pattern | None = None) -> None:
        super().__init__()
        _check_k(k)
        check_within(within, per_head=True)
        self.k, self.within = k, within

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
        scoring: softcap, ALiBi and dropout; the keys of highest score are those of highest score with the bias."""
        check_shapes(q, k, v, key_mask)
        q, k, v = (without_padding(x, key_mask) for x in (q, k, v))
        chosen = top_k_keys(q, k, top_k=self.k, key_mask=key_mask, within=self.within, scoring=scoring)
        return Selected(attend_tokens(q, k, v, chosen, scoring=scoring), {}, chosen)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"k={self.k}, within={self.within}"


@torch.no_grad()
def top_k_keys(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    *,
    top_k: int,
    key_mask: Bool[Tensor, "B S"] | None = None,
    within: Pattern | None = None,
    scoring: ScoreOptions = PLAIN,
) -> TokenSelection:
    """The ``top_k`` keys j ≤ i of highest q_i · k_j, a list for each query head (Hs = H): exact.

    within: chooses among the keys that this pattern shows alone; ``per_head`` has one for each query head.
    scoring: with ALiBi those of highest cap(q_i · k_j / √d) - slope · (i - j); a softcap alone changes no order.
    Every score is computed, a stretch of queries at a time, so that no L × S matrix is held: time is that of dense
    scores, under any pattern. The last query sits at the last key. Where fewer keys are visible the list ends in -1.
    Raises: ValueError if top_k < 1, L > S, or within does not fit.
    """
    _check(q, k, top_k, key_mask)
    check_within(within, per_head=True)
    options = replace(scoring, dropout=0.0).for_call(q)
    length, offset = q.shape[2], k.shape[2] - q.shape[2]
    width = min(top_k, k.shape[2])
    tokens = torch.full((*q.shape[:3], width), -1, dtype=torch.int64, device=q.device)
    step = max(1, SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1))
    for first in range(0, length, step):
        last = min(first + step, length)
        found = _best(q[:, :, first:last], k[:, :, : offset + last], width, key_mask, within, options)
        tokens[:, :, first:last, : found.shape[3]] = found
    return TokenSelection(tokens, k.shape[2])


def _best(
    q: Tensor, k: Tensor, width: int, key_mask: Tensor | None, within: Pattern | None, options: ScoreOptions
) -> Tensor:
    """[B, H, m, min(width, S)] of the last m queries among S keys; -1 where a key is not seen."""
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(work).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ k.to(work).mT).view(*q.shape[:3], k.shape[2])
    if options.alibi is not None:
        options.score_(scores.div_(sqrt(max(q.shape[3], 1))), lambda: _pairs(scores))
    first = k.shape[2] - q.shape[2]
    if within is None:
        ahead = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores[..., first:].masked_fill_(ahead, -torch.inf)
    else:
        seen = allowed(within, first, q.shape[2], k.shape[2], q.device, heads=q.shape[1])
        scores.masked_fill_(~seen, -torch.inf)
    if key_mask is not None:
        scores.masked_fill_(~key_mask[:, None, None, : k.shape[2]], -torch.inf)
    best, tokens = scores.topk(min(width, k.shape[2]), dim=-1)
    return tokens.masked_fill_(best == -torch.inf, -1)


def _pairs(scores: Tensor) -> Pairs:
    """Of [B, H, m, S], the last m queries."""
    batch, heads, queries, keys = (torch.arange(size, device=scores.device) for size in scores.shape)
    at = queries + scores.shape[3] - scores.shape[2]
    return Pairs(batch[:, None, None, None], heads[:, None, None], at[:, None], keys)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")


def _check(q: Tensor, k: Tensor, top_k: int, key_mask: Tensor | None) -> None:
    _check_k(top_k)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q must not be longer than k={k.shape[2]}, got {q.shape[2]}")
    if q.shape[1] % max(k.shape[1], 1):
        raise ValueError(f"key heads must divide the {q.shape[1]} query heads, got {k.shape[1]}")
    check_mask("key_mask", key_mask, k)
