"""Which key blocks each query block visits, built from the geometry of a pattern and never from an L×L mask.

A pattern names, for each query block, a few key intervals that may be visible (``reach``) and a few integers that
decide what the mask of a block looks like (``signature``). Blocks of equal signature have equal masks, so one mask is
evaluated for each *distinct* signature: time is proportional to the visited blocks, not to the pairs.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@runtime_checkable
class Geometry(Protocol):
    """What a pattern must say about itself so that a layout can be built. N blocks, M intervals a block."""

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The truth for each pair of positions, broadcast."""

    def reach(
        self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int
    ) -> tuple[Int[Tensor, "N M"], Int[Tensor, "N M"]]:
        """Half-open key intervals that contain every key below ``key_end`` seen by a query in [first, last]."""

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        """Integers that determine the mask of the block whose first query and first key these are."""


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Query block r visits ``key_block[row_start[r]:row_start[r + 1]]``, ascending. R query blocks, N visits, U masks.

    Query i sits at position ``offset + i`` and key j at ``key_offset + j``. ``mask_index`` is -1 where every pair of
    the block that lies inside the lengths is visible (a full block), else the row of ``masks`` that holds its truth
    (a partial block: some pairs visible, some not). Pairs beyond the lengths are False in ``masks``; a full block at
    the ragged end still ends at the length.
    """

    q_len: int
    kv_len: int
    block: int
    offset: int
    key_offset: int
    row_start: Int[Tensor, "R_plus_1"]
    key_block: Int[Tensor, "N"]
    mask_index: Int[Tensor, "N"]
    masks: Bool[Tensor, "U block block"]

    @property
    def num_query_blocks(self) -> int:
        """Rows of blocks."""
        return self.row_start.numel() - 1

    @property
    def visited_blocks(self) -> int:
        """Blocks that attend computes."""
        return self.key_block.numel()

    @property
    def full_blocks(self) -> int:
        """Visited blocks that need no mask."""
        return int((self.mask_index < 0).sum())

    @property
    def query_block(self) -> Int[Tensor, "N"]:
        """The query block of each visit."""
        rows = torch.arange(self.num_query_blocks)
        return rows.repeat_interleave(self.row_start.diff())

    def to_mask(self) -> Bool[Tensor, "L S"]:
        """The truth for every pair, dense: for the reference and for short sequences."""
        dense = torch.zeros(self.q_len, self.kv_len, dtype=torch.bool)
        for row, column, mask in zip(
            self.query_block.tolist(), self.key_block.tolist(), self.mask_index.tolist(), strict=True
        ):
            place = dense[row * self.block : (row + 1) * self.block, column * self.block : (column + 1) * self.block]
            place[:] = True if mask < 0 else self.masks[mask, : place.shape[0], : place.shape[1]]
        return dense

    def visible_pairs(self) -> int:
        """Exact number of visible (query, key) pairs inside the lengths."""
        full = self.mask_index < 0
        height = (self.q_len - self.query_block[full] * self.block).clamp(max=self.block)
        width = (self.kv_len - self.key_block[full] * self.block).clamp(max=self.block)
        in_mask = self.masks.flatten(1).sum(1)
        return int((height * width).sum()) + int(in_mask[self.mask_index[~full]].sum())


def build_layout(
    pattern: Geometry, q_len: int, kv_len: int, *, block: int = 64, offset: int = 0, key_offset: int = 0
) -> BlockLayout:
    """The block layout of a pattern for queries at offset … offset+q_len-1 and keys at key_offset ….

    Raises: ValueError if a length is negative or block < 1.
    """
    for name, value, least in (("q_len", q_len, 0), ("kv_len", kv_len, 0), ("block", block, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    row, column = _candidates(pattern, q_len, kv_len, block, offset, key_offset)
    distinct, representative = _distinct(pattern, row, column, q_len, kv_len, block, offset, key_offset)
    truth, inside = _evaluate(
        pattern, row[representative], column[representative], q_len, kv_len, block, offset, key_offset
    )
    seen, possible = truth.flatten(1).sum(1), inside.flatten(1).sum(1)
    partial = (seen > 0) & (seen < possible)
    # -2: nothing visible, dropped below; -1: full; otherwise the partial mask's row.
    kind = torch.where(partial, partial.cumsum(0) - 1, torch.where(seen > 0, -1, -2))[distinct]
    keep = kind > -2
    row, column, kind = row[keep], column[keep], kind[keep]
    rows = -(-q_len // block)
    row_start = torch.zeros(rows + 1, dtype=torch.long)
    row_start[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return BlockLayout(q_len, kv_len, block, offset, key_offset, row_start, column, kind, truth[partial])


def _candidates(
    pattern: Geometry, q_len: int, kv_len: int, block: int, offset: int, key_offset: int
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Blocks that the pattern's reach touches, sorted by query block, then key block."""
    rows, columns = -(-q_len // block), -(-kv_len // block)
    first = torch.arange(rows) * block + offset
    last = (first + block - 1).clamp(max=offset + q_len - 1)
    start, stop = pattern.reach(first, last, key_offset + kv_len)
    start = (start - key_offset).clamp(0, kv_len)
    stop = (stop - key_offset).clamp(0, kv_len)
    low, high = start // block, -(-stop // block)
    count = torch.where(stop > start, high - low, 0).flatten()
    within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    column = low.flatten().repeat_interleave(count) + within
    row = torch.arange(rows)[:, None].expand_as(low).flatten().repeat_interleave(count)
    cell = torch.unique(row * max(columns, 1) + column)
    return cell // max(columns, 1), cell % max(columns, 1)


def _distinct(
    pattern: Geometry,
    row: Int[Tensor, "N"],
    column: Int[Tensor, "N"],
    q_len: int,
    kv_len: int,
    block: int,
    offset: int,
    key_offset: int,
) -> tuple[Int[Tensor, "N"], Int[Tensor, "U"]]:
    """For each block the index of its signature, and for each signature one block that has it."""
    signature = pattern.signature(row * block + offset, column * block + key_offset, block)
    height, width = (q_len - row * block).clamp(max=block), (kv_len - column * block).clamp(max=block)
    index = torch.zeros_like(row)
    for part in (height, width, *signature):
        _, code = torch.unique(part, return_inverse=True)
        _, index = torch.unique(index * (row.numel() + 1) + code, return_inverse=True)
    size = int(index.max()) + 1 if index.numel() else 0
    return index, torch.zeros(size, dtype=torch.long).scatter_(0, index, torch.arange(row.numel()))


def _evaluate(
    pattern: Geometry,
    row: Int[Tensor, "U"],
    column: Int[Tensor, "U"],
    q_len: int,
    kv_len: int,
    block: int,
    offset: int,
    key_offset: int,
) -> tuple[Bool[Tensor, "U block block"], Bool[Tensor, "U block block"]]:
    """The truth of these blocks, and which of their pairs lie inside the lengths."""
    query = (row[:, None] * block + torch.arange(block))[:, :, None]
    key = (column[:, None] * block + torch.arange(block))[:, None, :]
    inside = (query < q_len) & (key < kv_len)
    return pattern.visible(query + offset, key + key_offset) & inside, inside
