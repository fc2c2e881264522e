"""What every piece of the folded backend shares: the tensors in working precision and how a tile is scored."""

from collections.abc import Callable
from functools import cache
from math import e, log2, prod

import torch
from torch import Tensor

from sparse_attn.backends.pieces import PIECE, GatherTile, Piece, StripTile, Tile, pieces
from sparse_attn.backends.plan import Plan, Run
from sparse_attn.backends.scoring import Scoring
from sparse_attn.backends.thin import Shown

# Scores are kept in bits: torch's exp takes ten times as long where its result underflows, exp2 does not.
BITS = log2(e)
# Keys or queries of a piece below which torch's attention kernel is slower than the products written out.
NARROW = 32
# Log-sum-exps up to which probabilities of scores that are computed once more are right to some 1e-5.
CALM = 32.0
# Queries of a product below which torch's attention kernel takes 32 of them at once, and from there on 64 or more.
FEW = 192


@cache
def _has_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def written_faster(dim: int) -> bool:
    """Whether a backward pass over few queries a product is faster by the products written out than by torch's kernel.

    As measured, on an Intel processor with AMX: 10 to 15% less time for it at heads of 64, 28% at heads of 128, and
    more below 64; more too on an EPYC without AMX.
    """
    return _has_tiles() and dim >= 64


class Work:
    """What forward and backward share: the tensors in working precision and one tile's scores."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        plan: Plan,
        scoring: Scoring,
        dropout: float,
        seed: int,
    ) -> None:
        # float32 for half precision: scores rounded to bf16 would move probabilities by percents.
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.k, self.v = (_rows(x.to(self.dtype)) for x in (k, v))
        self.plan, self.dropout, self.seed = plan, dropout, seed
        self.batch, self.kv_heads = k.shape[:2]
        self.groups = q.shape[1] // max(self.kv_heads, 1)
        self.scoring = scoring
        self.slopes = (
            None if scoring.slopes is None else BITS * scoring.slopes.to(self.k).view(self.kv_heads, 1, -1, 1, 1)
        )
        self.offset = plan.layout.offset - plan.layout.key_offset
        masks = plan.layout.masks.to(q.device)
        self.bias = torch.zeros(masks.shape, dtype=self.dtype, device=q.device).masked_fill_(~masks, -torch.inf)
        self.unseen = None if key_mask is None else ~key_mask[:, None, :, None].expand(-1, self.kv_heads, -1, 1)
        # What torch's own CPU kernel computes: nothing is added to the scores but the pattern's masks.
        self.fused = self.k.device.type == "cpu" and scoring.plain and not dropout and key_mask is None
        self.fused = self.fused and 0 < k.shape[-1] == v.shape[-1]
        # In which unit the log-sum-exp is kept: the backward has to get back the very number that large scores gave.
        self.bits = not self.fused
        self.calm = True
        self.zero = self.k.new_zeros(1, 1, 1)
        self.rooms: dict[str, Tensor] = {}
        self.laid: dict[tuple[int, Run] | Shown, Tensor | None] = {}

    def each(self, run: Callable[[Piece], None], written: Callable[[Piece], None], few: int = 0) -> None:
        """Run every piece; by the products written out where torch's kernel is slower: narrow ones, and those of less
        than ``few`` queries a product, which take smaller pieces."""
        for batch in range(self.batch):
            for piece in pieces(self.plan, batch, slice(0, self.kv_heads), self.groups, PIECE // 2 if few else PIECE):
                slower = piece.width < NARROW or piece.height * self.groups < few
                (written if slower else run)(piece)

    def room(self, name: str, *shape: int) -> Tensor:
        """Memory that the pieces use in turn: it stays in cache, as a fresh tensor for each would not."""
        size = prod(shape)
        if name not in self.rooms or self.rooms[name].numel() < size:
            self.rooms[name] = self.k.new_empty(size)
        return self.rooms[name][:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        """factor · a b in the room of that name."""
        room = self.room(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.baddbmm(self.zero, a, b, beta=0, alpha=factor, out=room)

    def output(self, like: Tensor) -> Tensor:
        """Where the pieces write; zeros only if some query is in no piece. Working precision where pieces add up."""
        dtype = self.dtype if self.plan.merges else like.dtype
        return torch.empty_like(like, dtype=dtype) if self.plan.covers else torch.zeros_like(like, dtype=dtype)

    def store(self, piece: Piece, out: Tensor, lse: Tensor, value: Tensor, total: Tensor) -> None:
        """Output and log-sum-exp of a piece. A late one is merged: out += (value - out) exp(total - lse')."""
        if piece.late:
            before, earlier = (piece.queries(x, self.groups).flatten(2, -2) for x in (out, lse))
            higher = (torch.logaddexp2 if self.bits else torch.logaddexp)(earlier, total)
            share = total - _finite(higher)
            value = before.lerp_(value, share.exp2_() if self.bits else share.exp_())
            total = higher
        piece.write(out, value, self.groups)
        piece.write(lse, total, self.groups)

    def store_gradient(self, piece: Piece, grad: Tensor, value: Tensor) -> None:
        """The queries' gradient of a piece, added to what there is if it is late."""
        if piece.late:
            value = piece.queries(grad, self.groups).flatten(2, -2).add_(value)
        piece.write(grad, value, self.groups)

    def queries(self, piece: Piece, x: Tensor) -> Tensor:
        """The piece's rows of q, or of anything laid out like it, as [h, R, M, d] in working precision."""
        return _rows(piece.queries(x, self.groups).to(self.dtype).flatten(2, -2))

    def scores(self, tile: Tile, rows: Tensor, keys: Tensor, lse: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores of a tile less ``lse``, in bits, -inf where the pattern or the key mask hides the key.

        In the backward (``lse`` given) also d capped / d score where scores are capped.
        """
        cap, slope = self.scoring.softcap, None
        factor = self.scoring.scale * (BITS if cap is None else 1 / cap)
        scores = self.product("scores", rows, keys.mT, factor)
        if cap is not None:
            scores.tanh_()
            slope = 1 - scores.square() if lse is not None else None
            scores.mul_(BITS * cap)
        scores = scores if lse is None else scores.sub_(lse)
        self._bias(tile, scores)
        return scores, slope

    def _bias(self, tile: Tile, scores: Tensor) -> None:
        if self.slopes is not None:
            distance = tile.distance(self.offset, scores)[:, None]
            heads = tile.piece.heads
            shaped = scores.view(heads.stop - heads.start, -1, self.groups, distance.shape[2], scores.shape[-1])
            shaped.addcmul_(self.slopes[heads], distance, value=-1)
        tile.hide(scores, self.bias, self.groups)
        if self.unseen is not None:
            scores.masked_fill_(tile.keys(self.unseen).mT, -torch.inf)

    def laid_bias(self, tile: Tile) -> Tensor | None:
        """The masks of a tile, laid out once for all rows of a strip and all heads of a thin part."""
        if isinstance(tile, GatherTile):
            return tile.wide_bias(self.bias, self.groups)
        key = (tile.piece.height, tile.run) if isinstance(tile, StripTile) else tile.shown
        if key not in self.laid:
            self.laid[key] = tile.wide_bias(self.bias, self.groups)
        return self.laid[key]

    def keep(self, tile: Tile, index: int, probability: Tensor) -> Tensor | None:
        """Which probabilities dropout keeps, scaled by 1 / (1 - dropout): the same in forward and backward."""
        if not self.dropout:
            return None
        place = (*tile.piece.place, index)
        generator = torch.Generator(probability.device).manual_seed((self.seed ^ hash(place)) % 2**63)
        kept = torch.empty_like(probability).bernoulli_(1 - self.dropout, generator=generator)
        return kept / (1 - self.dropout)


def _finite(lse: Tensor) -> Tensor:
    """A query that sees nothing would otherwise be -inf - (-inf)."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def _rows(x: Tensor) -> Tensor:
    """Numbers of one row side by side, as torch's kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()
