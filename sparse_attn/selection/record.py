"""What a content-based method chose: key blocks for each query, and the attention that visits them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.backends.scoring import Scoring
from sparse_attn.checking import check_dimensions, check_least, check_once, check_shapes
from sparse_attn.selection.buckets import Buckets
from sparse_attn.selection.scoring import ScoreOptions
from sparse_attn.selection.tokens import TokenSelection


@dataclass(frozen=True, eq=False)
class BlockSelection:
    """Key blocks of ``block`` keys for each query and key head; query heads that share a key head share the choice.

    blocks [B, Hkv, L, n]: indices of key blocks, each at most once for a query, -1 where fewer than n were chosen.
    offset: position of query 0, key 0 being at 0. causal: of the chosen blocks a query sees the keys j ≤ i only.
    """

    blocks: Int[Tensor, "B Hkv L n"]
    block: int
    kv_len: int
    offset: int = 0
    causal: bool = True

    def to_mask(self) -> Bool[Tensor, "B Hkv L S"]:
        """The truth for every pair, dense: for the reference and for pictures."""
        batch, heads, queries, _ = self.blocks.shape
        columns = -(-self.kv_len // self.block)
        chosen = torch.zeros(batch, heads, queries, columns + 1, dtype=torch.bool, device=self.blocks.device)
        # long: columns may be more than a narrow type holds, and scatter_ takes no other
        blocks = self.blocks.long()
        chosen.scatter_(3, blocks.where(blocks >= 0, columns), True)
        mask = chosen[..., :columns].repeat_interleave(self.block, 3)[..., : self.kv_len]
        if self.causal:
            at = torch.arange(queries, device=mask.device)[:, None] + self.offset
            mask = mask & (torch.arange(self.kv_len, device=mask.device) <= at)
        return mask

    def check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, once: bool = True) -> None:
        """Raises: ValueError where the choice is for other sizes, names blocks that are not there, or one twice."""
        check_shapes(q, k, v, key_mask)
        check_least("block", self.block, 1)
        check_dimensions("selected blocks", self.blocks)
        wanted = (k.shape[0], k.shape[1], q.shape[2])
        if tuple(self.blocks.shape[:3]) != wanted or self.kv_len != k.shape[2]:
            got = [*self.blocks.shape[:3], self.kv_len]
            raise ValueError(f"selection must be for [B, Hkv, L] and S = {[*wanted, k.shape[2]]}, got {got}")
        columns = -(-self.kv_len // self.block)
        if self.blocks.numel():
            least, most = (int(end) for end in self.blocks.aminmax())
            if least < -1 or most >= columns:
                wrong = most if most >= columns else least
                raise ValueError(f"selected blocks must be in [-1, {columns}), got {wrong}")
        if once:
            check_once("selected blocks", self.blocks)

    def visit(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, dropout: float, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the chosen blocks, and its log-sum-exp: see :func:`attend_selected`."""
        from sparse_attn.selection.selected import attend_selected  # which reads this record

        options = ScoreOptions(scoring.softcap, scoring.slopes, dropout)
        return attend_selected(q, k, v, self, scale=scoring.scale, key_mask=key_mask, scoring=options, return_lse=True)

    def density(self) -> float:
        """Share of all pairs that is visited, keys behind the query included; 0 without pairs."""
        batch, heads, queries, _ = self.blocks.shape
        pairs = batch * heads * queries * -(-self.kv_len // self.block)
        return float((self.blocks >= 0).sum()) / pairs if pairs else 0.0


@dataclass(frozen=True, eq=False)
class Selected:
    """What a selecting attention gives: its output, its side losses by name (scalars, none if it has none), and its
    choice where it makes one that can be written down."""

    out: Float[Tensor, "B H L d_v"]
    losses: dict[str, Float[Tensor, ""]]
    chosen: BlockSelection | TokenSelection | Buckets | None = None
