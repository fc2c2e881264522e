"""What a content-based method chose, as ``attend`` takes it in place of a layout."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_attn.backends.reference import reference
from sparse_attn.backends.scoring import Scoring


@runtime_checkable
class Choice(Protocol):
    """Keys that each query sees, chosen by content: blocks, tokens or buckets."""

    @property
    def offset(self) -> int:
        """Position of query 0, key 0 being at 0."""
        ...

    def to_mask(self) -> Bool[Tensor, "B h L S"]:
        """The truth for every pair, dense; h is 1, the key heads or the query heads."""
        ...

    def check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, once: bool = True) -> None:
        """Raises: ValueError where the choice is for other sizes, names keys that are not there, or one of them twice
        (once=False leaves that out, for what this library itself chose)."""
        ...

    def visit(
        self,
        q: Float[Tensor, "B H L d"],
        k: Float[Tensor, "B Hkv S d"],
        v: Float[Tensor, "B Hkv S d_v"],
        scoring: Scoring,
        dropout: float,
        key_mask: Bool[Tensor, "B S"] | None,
    ) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
        """Output and log-sum-exp, at the cost of what was chosen."""
        ...


@torch.compiler.disable(reason="what was chosen is counted on the host")
def attend_choice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Choice,
    scoring: Scoring,
    key_mask: Tensor | None,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of each query, by what was chosen alone ("auto") or by a dense mask ("reference")."""
    chosen.check(q, k, v, key_mask)
    if backend == "auto":
        return chosen.visit(q, k, v, scoring, dropout, key_mask)
    mask = chosen.to_mask()
    mask = mask.repeat_interleave(q.shape[1] // max(mask.shape[1], 1), 1)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    at = torch.arange(chosen.offset, chosen.offset + q.shape[2], device=q.device)
    bias = scoring.bias(at, torch.arange(k.shape[2], device=q.device), q)
    return reference(q, k, v, mask, scale=scoring.scale, softcap=scoring.softcap, bias=bias, dropout=dropout)
