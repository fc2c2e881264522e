"""The pieces that the folded backend computes at once, and how each reads and writes the whole tensors.

A piece has h key heads with G query heads each and R query blocks (or clusters of them). Its queries are a matrix
[h·R, M, d]: the query heads of one key head are further rows. Its keys come as tiles that are independent of each
other once the log-sum-exp is known; a tile reads [b, N, d] keys, with b = h·R, or b = h where all rows read the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sparse_attn.backends.clusters import Gather
from sparse_attn.backends.plan import Plan, Run, Strip
from sparse_attn.backends.thin import ThinPiece, ThinTile

# Scores of one piece: 8 MiB of float32; smaller pieces stay longer in cache, but each costs Python about 100 µs.
PIECE = 1 << 21


@dataclass(frozen=True, eq=False)
class StripTile:
    """One run of keys of a strip piece."""

    piece: "StripPiece"
    run: Run

    @property
    def batches(self) -> int:
        """b: products side by side."""
        heads = self.piece.heads.stop - self.piece.heads.start
        return heads * self.piece.rows if self.run.step else heads

    def keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "b N d"]:
        """The keys that each query block reads: a view where they stand still or one head reads them, else a copy."""
        run = self.run
        if not run.step:
            return x[self.piece.batch, self.piece.heads, run.start : run.start + run.length]
        return self._moving(x, 0, run.length).reshape(self.batches, run.length, x.shape[-1])

    def wide_keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "h R N d"]:
        """View of the keys that each query block reads."""
        return self._moving(x, 0, self.run.length)

    def add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "b N d"]) -> None:
        """Add what each query block contributes to its keys."""
        if not self.run.step:
            self.keys(x).add_(value)
            return
        self.wide_add(x, value.view(-1, self.piece.rows, *value.shape[1:]))

    def wide_add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "h R N d"]) -> None:
        """The same for keys laid out as by wide_keys. Runs overlap, the columns of one key block never do."""
        run = self.run
        if not run.step:
            self.keys(x).add_(value.sum(1))
            return
        for start in range(0, run.length, run.step):
            width = min(run.step, run.length - start)
            self._moving(x, start, width).add_(value[:, :, start : start + width])

    def wide_bias(self, bias: Float[Tensor, "U block block"], groups: int) -> Float[Tensor, "1 1 M N"] | None:
        """The masks of one query block, to be added to its scores; None if it sees all its keys."""
        if not self.run.partial:
            return None
        laid = bias.new_zeros(self.piece.strip.height, self.run.length)
        for query, height, column, width, mask in self.run.partial:
            part = laid[query : query + height, column : column + width]
            part.copy_(bias[mask, : len(part), :width]) if mask >= 0 else part.fill_(-torch.inf)
        return laid.repeat(groups, 1)[None, None]

    def hide(self, scores: Float[Tensor, "b M N"], bias: Float[Tensor, "U block block"], groups: int) -> None:
        """Add the masks, -inf where the pattern hides a pair, to the partial columns."""
        by_query = scores.view(-1, self.piece.strip.height, self.run.length)
        for query, height, column, width, mask in self.run.partial:
            part = by_query[:, query : query + height, column : column + width]
            part.fill_(-torch.inf) if mask < 0 else part.add_(bias[mask, : part.shape[1], :width])

    def distance(self, offset: int, like: Tensor) -> Float[Tensor, "r height N"]:
        """|i - j| of each pair; one r stands for all rows where the keys move on with the queries."""
        run, strip = self.run, self.piece.strip
        rows = torch.arange(1 if run.step else self.piece.rows, device=like.device) + self.piece.row
        query = strip.first + offset + rows[:, None] * strip.height + torch.arange(strip.height, device=like.device)
        key = run.start + rows[:, None] * run.step + torch.arange(run.length, device=like.device)
        return (query[:, :, None] - key[:, None]).abs().to(like.dtype)

    def _moving(self, x: Shaped[Tensor, "B Hkv S d"], start: int, length: int) -> Shaped[Tensor, "h R n d"]:
        run, piece = self.run, self.piece
        part = x[piece.batch, piece.heads]
        head, key, width = part.stride()
        first = part.storage_offset() + (run.start + start + piece.row * run.step) * key
        size = (part.shape[0], piece.rows, length, part.shape[2])
        return part.as_strided(size, (head, run.step * key, key, width), first)


@dataclass(frozen=True)
class StripPiece:
    """Rows row … row+rows-1 of a strip, for the key heads ``heads`` of one sequence."""

    strip: Strip
    batch: int
    heads: slice
    row: int
    rows: int
    late: bool = False

    @property
    def place(self) -> tuple[int, ...]:
        """Tells this piece from all others of a plan."""
        return self.batch, self.heads.start, 0, self.strip.first, self.row

    @property
    def height(self) -> int:
        """Queries of one head to a product."""
        return self.strip.height

    @property
    def width(self) -> int:
        """Keys that each query reads."""
        return self.strip.width

    def tiles(self, groups: int) -> list[StripTile]:
        """One for each run."""
        return [StripTile(self, run) for run in self.strip.runs]

    def queries(self, x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "h R G height d"]:
        """View of the piece's queries, or of anything laid out like them."""
        first = self.strip.first + self.row * self.strip.height
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        rows = x[self.batch, heads, first : first + self.rows * self.strip.height]
        return rows.unflatten(1, (self.rows, self.strip.height)).unflatten(0, (-1, groups)).transpose(1, 2)

    def write(self, x: Float[Tensor, "B H L d"], value: Float[Tensor, "h R M d"], groups: int) -> None:
        """Store one row for each query of the piece."""
        self.queries(x, groups).copy_(value.unflatten(2, (groups, self.strip.height)))


@dataclass(frozen=True, eq=False)
class GatherTile:
    """Key blocks first … last-1 of each cluster of a gather piece."""

    piece: "GatherPiece"
    first: int
    last: int

    @property
    def batches(self) -> int:
        """b: products side by side."""
        return (self.piece.heads.stop - self.piece.heads.start) * len(self.piece.gather.rows)

    def keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "b N d"]:
        """Copy of the key blocks that each cluster reads."""
        return self.wide_keys(x).flatten(0, 1)

    def wide_keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "h R N d"]:
        """Copy of the key blocks that each cluster reads."""
        part = _blocks(x[self.piece.batch, self.piece.heads], self.piece.block)
        taken = part.index_select(1, self._blocks.flatten().to(x.device))
        return taken.view(len(part), len(self._blocks), -1, x.shape[-1])

    def add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "b N d"]) -> None:
        """Add what each cluster contributes to its keys."""
        self.wide_add(x, value.unflatten(0, (-1, len(self._blocks))))

    def wide_bias(self, bias: Float[Tensor, "U block block"], groups: int) -> Float[Tensor, "R 1 M N"] | None:
        """The masks of each cluster, to be added to its scores; None if all see all their keys."""
        masks, block = self._masks, self.piece.block
        if bool((masks == -1).all()):
            return None
        table = torch.cat([bias, bias.new_full((1, block, block), -torch.inf), bias.new_zeros(1, block, block)])
        laid = table[masks].transpose(2, 3)[:, :, None].expand(-1, -1, groups, -1, -1, -1)
        return laid.reshape(len(masks), 1, masks.shape[1] * groups * block, -1)

    def wide_add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "h R N d"]) -> None:
        """Add what each cluster contributes to its keys."""
        part = _blocks(x[self.piece.batch, self.piece.heads], self.piece.block)
        index = self._blocks.flatten().to(x.device)
        part.index_add_(1, index, value.reshape(len(part), -1, self.piece.block, x.shape[-1]))

    def hide(self, scores: Float[Tensor, "b M N"], bias: Float[Tensor, "U block block"], groups: int) -> None:
        """Add the masks, -inf where the pattern hides a pair: where they are few, to those blocks alone."""
        masks, block = self._masks, self.piece.block
        cluster, row, column = (masks != -1).nonzero(as_tuple=True)
        if not len(cluster):
            return
        table = torch.cat([bias, bias.new_full((1, block, block), -torch.inf), bias.new_zeros(1, block, block)])
        by_block = scores.view(-1, len(masks), masks.shape[1], groups, block, masks.shape[2], block)
        if 3 * len(cluster) < masks.numel():
            added = table[masks[cluster, row, column]][:, None, None]
            by_block[:, cluster, row, :, :, column] += added
            return
        laid = table[masks].transpose(2, 3).reshape(len(masks), masks.shape[1], 1, block, -1)
        by_block.flatten(-2).add_(laid)

    def distance(self, offset: int, like: Tensor) -> Float[Tensor, "r height N"]:
        """|i - j| of each pair."""
        inside = torch.arange(self.piece.block)
        query = self.piece.gather.rows[..., None] * self.piece.block + inside + offset
        key = (self._blocks[..., None] * self.piece.block + inside).flatten(1)
        return (query[..., None] - key[:, None, None]).abs().flatten(0, 1).to(like)

    @property
    def _blocks(self) -> Tensor:
        return self.piece.gather.blocks[:, self.first : self.last]

    @property
    def _masks(self) -> Tensor:
        return self.piece.gather.masks[:, :, self.first : self.last]


@dataclass(frozen=True, eq=False)
class GatherPiece:
    """Some clusters of a gather, for the key heads ``heads`` of one sequence.

    late: its queries have seen other keys before; results are merged, gradients added.
    """

    gather: Gather
    batch: int
    heads: slice
    block: int
    late: bool

    @property
    def place(self) -> tuple[int, ...]:
        """Tells this piece from all others of a plan."""
        return self.batch, self.heads.start, 2 if self.late else 1, int(self.gather.rows[0, 0]), 0

    @property
    def height(self) -> int:
        """Queries of one head to a product."""
        return self.gather.masks.shape[1] * self.block

    @property
    def width(self) -> int:
        """Keys that each query reads."""
        return self.gather.blocks.shape[1] * self.block

    def tiles(self, groups: int) -> list[GatherTile]:
        """The columns in parts of about ``PIECE`` scores."""
        height, width = self.gather.masks.shape[1:]
        some = max(8, PIECE // (height * groups * self.block**2))
        return [GatherTile(self, start, min(start + some, width)) for start in range(0, width, some)]

    def queries(self, x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "h R m G block d"]:
        """Copy of the piece's queries, or of anything laid out like them."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        rows = _blocks(x[self.batch, heads], self.block).index_select(1, self.gather.rows.flatten().to(x.device))
        return rows.unflatten(1, self.gather.rows.shape).unflatten(0, (-1, groups)).permute(0, 2, 3, 1, 4, 5)

    def write(self, x: Float[Tensor, "B H L d"], value: Float[Tensor, "h R M d"], groups: int) -> None:
        """Store one row for each query of the piece."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        by_block = value.unflatten(2, (-1, groups, self.block)).flatten(1, 2).transpose(1, 2).flatten(0, 1)
        index = self.gather.rows.flatten().to(x.device)
        _blocks(x[self.batch, heads], self.block).index_copy_(1, index, by_block.to(x.dtype))


Piece = StripPiece | GatherPiece | ThinPiece
Tile = StripTile | GatherTile | ThinTile


def tiles_of(piece: Piece, groups: int) -> Sequence[Tile]:
    """The tiles of a piece of any kind."""
    return piece.tiles(groups)


def pieces(plan: Plan, batch: int, heads: slice, groups: int, size: int) -> Iterator[Piece]:
    """All that a plan asks of some key heads of one sequence, in pieces of at most about ``size`` scores, late ones
    last."""
    block = plan.layout.block
    for strip in plan.strips:
        for row, rows, some in _cut(size, strip.rows, heads, groups * strip.height * strip.width):
            yield StripPiece(strip, batch, some, row, rows)
    for gather, late in (*((one, False) for one in plan.gathers), *((one, True) for one in plan.late)):
        each = groups * block**2 * gather.masks[0].numel()
        # Many heads first: they share the masks.
        tall = max(1, size // (each * (heads.stop - heads.start)))
        for row, rows, some in _cut(size, min(tall, len(gather.rows)), heads, each, len(gather.rows)):
            part = slice(row, row + rows)
            taken = Gather(gather.rows[part], gather.blocks[part], gather.masks[part])
            yield GatherPiece(taken, batch, some, block, late)
    for number, thin in enumerate(plan.thin):
        wide = max(1, size // (groups * thin.pairs))
        for first in range(heads.start, heads.stop, wide):
            yield ThinPiece(thin, number, batch, slice(first, min(first + wide, heads.stop)))


def _cut(size: int, rows: int, heads: slice, each: int, total: int | None = None) -> Iterator[tuple[int, int, slice]]:
    """Many query blocks first (at most ``rows``), then many heads."""
    total = rows if total is None else total
    tall = min(rows, max(1, size // each))
    tall = -(-total // -(-total // tall))  # as many pieces, of about equal size
    wide = max(1, size // (each * tall))
    for first in range(heads.start, heads.stop, wide):
        for row in range(0, total, tall):
            yield row, min(tall, total - row), slice(first, min(first + wide, heads.stop))


def _blocks(x: Shaped[Tensor, "h S d"], block: int) -> Shaped[Tensor, "h n block d"]:
    """View of the whole blocks."""
    whole = x.shape[1] // block
    return x[:, : whole * block].unflatten(1, (whole, block))
