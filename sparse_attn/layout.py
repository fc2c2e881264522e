"""Which key blocks each query block visits, built from the geometry of a pattern and never from an L×L mask.

A pattern names, for each query block, the key intervals that may be visible (``reach``) and a few integers that decide
what the mask of a block looks like (``signature``). Blocks of equal signature have equal masks, so one mask is
evaluated for each *distinct* signature: time is proportional to the visited blocks, not to the pairs, and memory is
that of the layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import combined, distinct, starts, tensor
from sparse_attn.candidates import Candidates
from sparse_attn.frame import Frame
from sparse_attn.once import untransformed
from sparse_attn.reach import Positions, Reaches
from sparse_attn.signature import Classes, Signature

# What a block shows where it is no mask: nothing, or everything.
HIDDEN, FULL = -2, -1
# Not looked at yet.
UNKNOWN = -3
# Signatures up to which each has its place in a table.
PLACES = 1 << 20
# Elements up to which torch computes on the calling thread, and never waits for others.
SERIAL = 1 << 15
# Pairs that are looked at together where only their number is wanted.
STRIP = 1 << 20

# Query block, key block and what is found there.
Found = tuple[Positions, Positions, Positions]


@runtime_checkable
class Geometry(Protocol):
    """What a pattern must say about itself so that a layout can be built. N query blocks."""

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The truth for each pair of positions, broadcast."""

    def reach(self, first: Int[np.ndarray, "N"], last: Int[np.ndarray, "N"], key_end: int) -> Reaches:
        """Keys that contain every key below ``key_end`` seen by a query in [first, last]."""

    def signature(self, block: int) -> Signature:
        """What determines the mask of a block of ``block`` queries and keys."""


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

    @cached_property
    def query_block(self) -> Int[Tensor, "N"]:
        """The query block of each visit."""
        return tensor(np.arange(self.num_query_blocks).repeat(np.diff(self.row_start.numpy())))

    def check(self) -> None:
        """Raises: ValueError where the parts do not fit together, as in a layout that was made or changed by hand."""
        rows, columns = (-(-length // self.block) if self.block > 0 else 0 for length in (self.q_len, self.kv_len))
        masks, visits = self.masks, self.key_block.numel()
        if self.block < 1 or masks.dtype != torch.bool or masks.shape[1:] != (self.block, self.block):
            raise ValueError(
                f"layout.masks must be bool [U, block, block] with block {self.block} >= 1, "
                f"got {masks.dtype} {list(masks.shape)}"
            )
        ends = self.row_start
        if len(ends) != rows + 1 or ends[0] != 0 or ends[-1] != visits or bool((ends.diff() < 0).any()):
            raise ValueError(f"layout.row_start must rise from 0 to {visits} visits over {rows} query blocks")
        if len(self.mask_index) != visits:
            raise ValueError(f"layout.mask_index must name {visits} masks, got {len(self.mask_index)}")
        for name, index, least, end in (
            ("key_block", self.key_block, 0, columns),
            ("mask_index", self.mask_index, -1, len(masks)),
        ):
            low, high = (int(x) for x in index.aminmax()) if visits else (least, least)
            if low < least or (visits and high >= end):
                raise ValueError(f"layout.{name} must be in [{least}, {end}), got {low if low < least else high}")
        rising = self.key_block.diff() > 0
        inside = self.query_block.diff() == 0
        if bool((inside & ~rising).any()):
            raise ValueError("layout.key_block must ascend inside each query block")

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


@untransformed
def build_layout(
    pattern: Geometry, q_len: int, kv_len: int, *, block: int = 64, offset: int = 0, key_offset: int = 0
) -> BlockLayout:
    """The block layout of a pattern for queries at offset … offset+q_len-1 and keys at key_offset ….

    Raises: ValueError if a length or key_offset is negative, or block < 1.
    """
    for name, value, least in (
        ("q_len", q_len, 0),
        ("kv_len", kv_len, 0),
        ("block", block, 1),
        ("key_offset", key_offset, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    frame = Frame(q_len, kv_len, block, offset, key_offset)
    masks: dict[bytes, int] = {}

    def look(row: Positions, column: Positions) -> Positions:
        return _kinds(pattern, row, column, frame, masks)

    each, column, kind = _walk(pattern, frame, look)
    found = np.frombuffer(bytearray().join(masks), bool).reshape(len(masks), block, block)
    row_start = tensor(starts(each))
    return BlockLayout(q_len, kv_len, block, offset, key_offset, row_start, tensor(column), tensor(kind), tensor(found))


def count_pairs(pattern: Geometry, q_len: int, kv_len: int, *, block: int, offset: int = 0) -> Found:
    """Query block, key block and visible pairs of every block that shows any: a layout without its masks, which are
    looked at a few at a time."""
    frame = Frame(q_len, kv_len, block, offset, 0)

    def look(row: Positions, column: Positions) -> Positions:
        pairs = _counted(pattern, row, column, frame)
        return np.where(pairs > 0, pairs, HIDDEN)

    each, column, pairs = _walk(pattern, frame, look)
    return np.arange(frame.rows).repeat(each), column, pairs


def touched_blocks(pattern: Geometry, q_len: int, kv_len: int, *, block: int, offset: int = 0) -> int:
    """At most so many blocks show anything, by the pattern's reach alone."""
    return _candidates(pattern, Frame(q_len, kv_len, block, offset, 0)).most


def _candidates(pattern: Geometry, frame: Frame) -> Candidates:
    first = frame.queries
    last = np.minimum(first + (frame.block - 1), frame.offset + frame.q_len - 1)
    return Candidates(pattern.reach(first, last, frame.key_offset + frame.kv_len), frame)


def _walk(
    pattern: Geometry, frame: Frame, look: Callable[[Positions, Positions], Positions]
) -> tuple[Int[np.ndarray, "R"], Positions, Positions]:
    """Of every block that is not HIDDEN: how many each row has, the columns, and what ``look`` finds there, which is
    asked for one block of each signature."""
    candidates, classes = _candidates(pattern, frame), Classes(pattern.signature(frame.block), frame)
    known = _Known(classes, look)
    each = np.zeros(frame.rows, np.int64)
    columns, kinds = (np.empty(candidates.most, np.int64) for _ in range(2))
    size = 0
    for row, column in candidates.chunks():
        if not len(row):
            continue
        kind = known.kinds(row, column)
        if int(kind.min()) <= HIDDEN:
            keep = (kind > HIDDEN).nonzero()[0]
            row, column, kind = row[keep], column[keep], kind[keep]
        if len(row):
            first, last = int(row[0]), int(row[-1])
            each[first : last + 1] = np.bincount(row - first)
        stop = size + len(row)
        columns[size:stop], kinds[size:stop], size = column, kind, stop
    # only what was written takes memory: the rest is given back
    columns.resize(size, refcheck=False)
    kinds.resize(size, refcheck=False)
    return each, columns, kinds


class _Known:
    """What is found in a block, told by its signature once that was seen."""

    def __init__(self, classes: Classes, look: Callable[[Positions, Positions], Positions]) -> None:
        self._classes, self._look = classes, look
        self._named: dict[tuple[int, ...], int] = {}
        self._table = np.full(classes.places, UNKNOWN) if classes.size <= PLACES else None

    def kinds(self, row: Positions, column: Positions) -> Positions:
        """Of each of these blocks, which are sorted by row, then column."""
        if self._table is None:
            return self._by_name(row, column)
        code, near = self._classes.told(row, column)
        kind = self._table[code]
        if len(near):
            kind[near] = self._by_name(row[near], column[near])
        if int(kind.min()) == UNKNOWN:
            new = (kind == UNKNOWN).nonzero()[0]
            values, which = distinct(code[new], self._classes.places)
            some = _one_of_each(which, len(values))
            self._table[values] = self._look(row[new[some]], column[new[some]])
            kind[new] = self._table[code[new]]
        return kind

    def _by_name(self, row: Positions, column: Positions) -> Positions:
        parts = self._classes.parts(row, column)
        size, which = combined(parts)
        some = _one_of_each(which, size)
        names = list(zip(*(part[some].tolist() for part in parts), strict=True))
        new = [place for place, name in enumerate(names) if name not in self._named]
        if new:
            found = self._look(row[some[new]], column[some[new]]).tolist()
            self._named |= zip([names[place] for place in new], found, strict=True)
        return np.array([self._named[name] for name in names])[which]


def _one_of_each(which: Int[np.ndarray, "N"], size: int) -> Int[np.ndarray, "U"]:
    """The place of some entry of each value in [0, size)."""
    some = np.empty(size, np.int64)
    some[which] = np.arange(len(which))
    return some


def _kinds(pattern: Geometry, row: Positions, column: Positions, frame: Frame, masks: dict[bytes, int]) -> Positions:
    """What these blocks show: HIDDEN, FULL, or the place of their mask among ``masks``, to which new ones are added."""
    kind = np.empty(len(row), np.int64)
    for part in _batches(len(row), frame.block):
        truth = _evaluate(pattern, row[part], column[part], frame)
        possible = frame.heights(row[part]) * frame.widths(column[part])
        seen = truth.sum((1, 2))
        kind[part] = np.where(seen == 0, HIDDEN, FULL)
        for place in ((seen > 0) & (seen < possible)).nonzero()[0].tolist():
            kind[part.start + place] = masks.setdefault(truth[place].tobytes(), len(masks))
    return kind


def _counted(pattern: Geometry, row: Positions, column: Positions, frame: Frame) -> Positions:
    """Visible pairs of these blocks; of a large block, some rows at a time."""
    found = np.zeros(len(row), np.int64)
    if frame.block**2 <= STRIP:
        for part in _batches(len(row), frame.block):
            found[part] = _evaluate(pattern, row[part], column[part], frame).sum((1, 2))
        return found
    for place, (height, width) in enumerate(zip(frame.heights(row), frame.widths(column), strict=True)):
        query, key = (int(x[place]) * frame.block for x in (row, column))
        keys = torch.arange(key, key + int(width)) + frame.key_offset
        for queries in torch.arange(query, query + int(height)).split(max(1, STRIP // frame.block)):
            found[place] += int(pattern.visible(queries[:, None] + frame.offset, keys).sum())
    return found


def _batches(count: int, block: int) -> list[slice]:
    step = max(1, SERIAL // block**2)
    return [slice(start, start + step) for start in range(0, count, step)]


def _evaluate(
    pattern: Geometry, row: Int[np.ndarray, "U"], column: Int[np.ndarray, "U"], frame: Frame
) -> Bool[np.ndarray, "U block block"]:
    """The truth of these blocks; False beyond the lengths."""
    inside = np.arange(frame.block)
    query, key = ((x * frame.block)[:, None] + inside for x in (row, column))
    where = tensor(query + frame.offset)[:, :, None], tensor(key + frame.key_offset)[:, None, :]
    truth: np.ndarray = pattern.visible(*where).numpy()
    if frame.q_len % frame.block or frame.kv_len % frame.block:
        truth = truth & (query < frame.q_len)[:, :, None] & (key < frame.kv_len)[:, None, :]
    return truth
