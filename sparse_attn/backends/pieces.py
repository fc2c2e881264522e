"""The pieces that the folded backend computes at once, and how each reads and writes the whole tensors.

A piece has h key heads with G query heads each, R query blocks of ``height`` queries, and N keys a query block. Its
matrices are [h·R, G·height, ·] for queries and [h·R, N, ·] for keys: the query heads of one key head are further rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sparse_attn.backends.plan import Gather, Plan, Strip

# Scores of one piece: 4 MiB of float32, which two cores' caches hold between the passes over them. Half of it is no
# faster and wakes the threads twice as often; four times is a third slower.
PIECE = 1 << 20


@dataclass(frozen=True)
class StripPiece:
    """Rows row … row+rows-1 of a strip, for the key heads ``heads`` of one sequence."""

    strip: Strip
    batch: int
    heads: slice
    row: int
    rows: int
    blind: bool

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


def pieces(plan: Plan, batch: int, kv_heads: int, groups: int) -> Iterator[Piece]:
    """All the work of a plan in pieces of about ``PIECE`` scores: many query blocks first, then many heads."""
    block = plan.layout.block
    for index in range(batch):
        for strip in plan.strips:
            each = groups * strip.height * strip.width
            for row, rows, heads in _cut(strip.rows, kv_heads, each):
                yield StripPiece(strip, index, heads, row, rows, strip.blind)
        for gather in plan.gathers:
            each = groups * block * gather.blocks.shape[1] * block
            for row, rows, heads in _cut(len(gather.rows), kv_heads, each):
                part = slice(row, row + rows)
                some = Gather(gather.rows[part], gather.blocks[part], gather.masks[part])
                yield GatherPiece(some, index, heads, block, True)


def _cut(rows: int, heads: int, each: int) -> Iterator[tuple[int, int, slice]]:
    tall = min(rows, max(1, PIECE // each))
    wide = min(heads, max(1, PIECE // (each * tall)))
    for first in range(0, heads, wide):
        for row in range(0, rows, tall):
            yield row, min(tall, rows - row), slice(first, min(first + wide, heads))


def _blocks(x: Shaped[Tensor, "h S d"], block: int) -> Shaped[Tensor, "h n block d"]:
    """View of the whole blocks."""
    whole = x.shape[1] // block
    return x[:, : whole * block].unflatten(1, (whole, block))
