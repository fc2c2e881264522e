"""The pieces that the folded backend computes at once, and how each reads and writes the whole tensors.

A piece has h key heads with G query heads each, R query blocks of ``height`` queries, and N keys a query block. Its
matrices are [h·R, G·height, ·] for queries and [h·R, N, ·] for keys: the query heads of one key head are further rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sparse_attn.backends.plan import Gather, Plan, Strip

# Scores of one piece: 1 MiB of float32, which a core's cache holds between the passes over them.
PIECE = 1 << 18


@dataclass(frozen=True)
class StripPiece:
    """Rows row … row+rows-1 of a strip, for the key heads ``heads`` of one sequence."""

    strip: Strip
    batch: int
    heads: slice
    row: int
    rows: int
    blind: bool

    @property
    def place(self) -> tuple[int, ...]:
        """Tells this piece from all others of a plan."""
        return self.batch, self.heads.start, self.strip.first, self.row

    def queries(self, x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "h R G height d"]:
        """View of the piece's queries, or of anything laid out like them."""
        first = self.strip.first + self.row * self.strip.height
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        rows = x[self.batch, heads, first : first + self.rows * self.strip.height]
        return rows.unflatten(1, (self.rows, self.strip.height)).unflatten(0, (-1, groups)).transpose(1, 2)

    def write(self, x: Float[Tensor, "B H L d"], value: Float[Tensor, "hR M d"], groups: int) -> None:
        """Store one row for each query of the piece."""
        place = self.queries(x, groups)
        place.copy_(value.view(place.shape))

    def keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "hR N d"]:
        """The keys that each query block reads: a view where one run is read by one head, else a copy."""
        parts = [self._run(x, run.start, run.step, run.length) for run in self.strip.runs]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return joined.reshape(-1, self.strip.width, x.shape[-1])

    def add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "hR N d"]) -> None:
        """Add what each query block contributes to its keys. Runs overlap, the columns of one key block never do."""
        column = 0
        for run in self.strip.runs:
            part = value.view(-1, self.rows, self.strip.width, x.shape[-1])[:, :, column : column + run.length]
            column += run.length
            if not run.step or self.rows == 1:
                first = run.start + self.row * run.step
                x[self.batch, self.heads, first : first + run.length].add_(part.sum(1))
                continue
            for start in range(0, run.length, run.step):
                width = min(run.step, run.length - start)
                self._run(x, run.start + start, run.step, width).add_(part[:, :, start : start + width])

    def hide(self, scores: Float[Tensor, "hR M N"], bias: Float[Tensor, "U block block"], groups: int) -> None:
        """Add the masks, -inf where the pattern hides a pair, to the partial columns."""
        by_query = scores.view(scores.shape[0], groups, self.strip.height, self.strip.width)
        for column, width, mask in self.strip.partial:
            by_query[..., column : column + width].add_(bias[mask, : self.strip.height, :width])

    def _run(self, x: Shaped[Tensor, "B Hkv S d"], start: int, step: int, length: int) -> Shaped[Tensor, "h R n d"]:
        part = x[self.batch, self.heads]
        head, key, width = part.stride()
        first = part.storage_offset() + (start + self.row * step) * key
        size = (part.shape[0], self.rows, length, part.shape[2])
        return part.as_strided(size, (head, step * key, key, width), first)


@dataclass(frozen=True, eq=False)
class GatherPiece:
    """Some query blocks of a gather, for the key heads ``heads`` of one sequence."""

    gather: Gather
    batch: int
    heads: slice
    block: int
    blind: bool

    @property
    def place(self) -> tuple[int, ...]:
        """Tells this piece from all others of a plan."""
        return self.batch, self.heads.start, int(self.gather.rows[0]) * self.block, -1

    def queries(self, x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "h R G height d"]:
        """Copy of the piece's queries, or of anything laid out like them."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        rows = _blocks(x[self.batch, heads], self.block)[:, self.gather.rows]
        return rows.unflatten(0, (-1, groups)).transpose(1, 2)

    def write(self, x: Float[Tensor, "B H L d"], value: Float[Tensor, "hR M d"], groups: int) -> None:
        """Store one row for each query of the piece."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        by_block = value.view(-1, len(self.gather.rows), groups, self.block, x.shape[-1]).transpose(1, 2)
        _blocks(x[self.batch, heads], self.block)[:, self.gather.rows] = by_block.flatten(0, 1)

    def keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "hR N d"]:
        """Copy of the keys that each query block reads."""
        blocks = _blocks(x[self.batch, self.heads], self.block)[:, self.gather.blocks]
        return blocks.reshape(-1, self.gather.blocks.shape[1] * self.block, x.shape[-1])

    def add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "hR N d"]) -> None:
        """Add what each query block contributes to its keys."""
        heads = self.heads.stop - self.heads.start
        by_block = value.view(heads, -1, self.block, x.shape[-1])
        _blocks(x[self.batch, self.heads], self.block).index_add_(1, self.gather.blocks.flatten(), by_block)

    def hide(self, scores: Float[Tensor, "hR M N"], bias: Float[Tensor, "U block block"], groups: int) -> None:
        """Add the masks, -inf where the pattern hides a pair."""
        shape = (1, self.block, self.block)
        masks = torch.cat([bias.new_full(shape, -torch.inf), bias.new_zeros(shape), bias])[self.gather.masks + 2]
        rows, count = self.gather.masks.shape
        by_row = masks.transpose(1, 2).reshape(rows, 1, self.block, count * self.block)
        scores.view(-1, rows, groups, self.block, count * self.block).add_(by_row)


Piece = StripPiece | GatherPiece


def pieces(plan: Plan, batch: int, heads: slice, groups: int) -> Iterator[Piece]:
    """All that a plan asks of some key heads of one sequence, in pieces of about ``PIECE`` scores."""
    block = plan.layout.block
    for strip in plan.strips:
        for row, rows, some in _cut(strip.rows, heads, groups * strip.height * strip.width):
            yield StripPiece(strip, batch, some, row, rows, strip.blind)
    for gather in plan.gathers:
        for row, rows, some in _cut(len(gather.rows), heads, groups * block * gather.blocks.shape[1] * block):
            part = slice(row, row + rows)
            taken = Gather(gather.rows[part], gather.blocks[part], gather.masks[part])
            yield GatherPiece(taken, batch, some, block, True)


def shares(batch: int, heads: int, workers: int) -> list[list[tuple[int, slice]]]:
    """The key heads of all sequences dealt to workers in equal runs, each as (sequence, heads) pairs."""
    bounds = [batch * heads * worker // workers for worker in range(workers + 1)]
    return [
        [
            (index, slice(max(start - index * heads, 0), min(stop - index * heads, heads)))
            for index in range(start // max(heads, 1), -(-stop // max(heads, 1)))
        ]
        for start, stop in pairwise(bounds)
    ]


def _cut(rows: int, heads: slice, each: int) -> Iterator[tuple[int, int, slice]]:
    """Many query blocks first, then many heads."""
    tall = min(rows, max(1, PIECE // each))
    wide = max(1, PIECE // (each * tall))
    for first in range(heads.start, heads.stop, wide):
        for row in range(0, rows, tall):
            yield row, min(tall, rows - row), slice(first, min(first + wide, heads.stop))


def _blocks(x: Shaped[Tensor, "h S d"], block: int) -> Shaped[Tensor, "h n block d"]:
    """View of the whole blocks."""
    whole = x.shape[1] // block
    return x[:, : whole * block].unflatten(1, (whole, block))
