"""Which key blocks each query block visits, built from the geometry of a pattern and never from an L×L mask.

A pattern names, for each query block, a few key intervals that may be visible (``reach``) and a few integers that
decide what the mask of a block looks like (``signature``). Blocks of equal signature have equal masks, so one mask is
evaluated for each *distinct* signature: time is proportional to the visited blocks, not to the pairs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import clamp, combined, distinct, occurring, spans, starts, tensor

# What a block shows where it is no mask: nothing, or everything.
HIDDEN, FULL = -2, -1
# Elements up to which torch computes on the calling thread, and never waits for others.
SERIAL = 1 << 15
# Pairs that are looked at together where only their number is wanted.
STRIP = 1 << 20


@runtime_checkable
class Geometry(Protocol):
    """What a pattern must say about itself so that a layout can be built. N blocks, M intervals a block."""

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The truth for each pair of positions, broadcast."""

    def reach(
        self, first: Int[np.ndarray, "N"], last: Int[np.ndarray, "N"], key_end: int
    ) -> tuple[Int[np.ndarray, "N M"], Int[np.ndarray, "N M"]]:
        """Half-open key intervals that contain every key below ``key_end`` seen by a query in [first, last]."""

    def signature(
        self, query: Int[np.ndarray, "N"], key: Int[np.ndarray, "N"], block: int
    ) -> list[Int[np.ndarray, "N"]]:
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

    @cached_property
    def query_block(self) -> Int[Tensor, "N"]:
        """The query block of each visit."""
        return tensor(np.arange(self.num_query_blocks).repeat(np.diff(self.row_start.numpy())))

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


@dataclass(frozen=True)
class _Frame:
    """Where the blocks lie."""

    q_len: int
    kv_len: int
    block: int
    offset: int
    key_offset: int

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.q_len // self.block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block)


def build_layout(
    pattern: Geometry,
    q_len: int,
    kv_len: int,
    *,
    block: int = 64,
    offset: int = 0,
    key_offset: int = 0,
    by_distance: bool = False,
) -> BlockLayout:
    """The block layout of a pattern for queries at offset … offset+q_len-1 and keys at key_offset ….

    by_distance: what the pattern shows depends on i - j alone. Then one row of blocks says what all see.
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
    frame = _Frame(q_len, kv_len, block, offset, key_offset)
    row, column, classes, some = _touched(pattern, frame, by_distance)
    kind, masks = _kinds(pattern, row[some], column[some], frame)
    if classes is not None:
        kind = kind[classes]
    keep = kind > HIDDEN
    if not keep.all():
        row, column, kind = row[keep], column[keep], kind[keep]
    row_start = starts(np.bincount(row, minlength=frame.rows))
    return BlockLayout(
        q_len, kv_len, block, offset, key_offset, tensor(row_start), tensor(column), tensor(kind), tensor(masks)
    )


def count_pairs(
    pattern: Geometry, q_len: int, kv_len: int, *, block: int, offset: int = 0, by_distance: bool = False
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Query block, key block and visible pairs of every block that shows any: a layout without its masks, which are
    looked at a few at a time. by_distance: as in :func:`build_layout`."""
    frame = _Frame(q_len, kv_len, block, offset, 0)
    row, column, classes, some = _touched(pattern, frame, by_distance)
    first, index = _alike(pattern, row[some], column[some], frame)
    pairs = _counted(pattern, row[some][first], column[some][first], frame)[index]
    pairs = pairs if classes is None else pairs[classes]
    keep = pairs > 0
    return row[keep], column[keep], pairs[keep]


def touched_blocks(pattern: Geometry, q_len: int, kv_len: int, *, block: int, offset: int = 0) -> int:
    """At most so many blocks show anything, by the pattern's reach alone."""
    first = np.arange(-(-q_len // block)) * block + offset
    start, stop = pattern.reach(first, np.minimum(first + (block - 1), offset + q_len - 1), kv_len)
    return int(_blocks(clamp(start, 0, kv_len), clamp(stop, 0, kv_len), block)[1].sum())


def _touched(
    pattern: Geometry, frame: _Frame, by_distance: bool
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "N"] | None, Int[np.ndarray, "C"]]:
    """Candidates; the class of each, None where each is its own; and one candidate of each class."""
    if by_distance:
        return _by_distance(pattern, frame)
    row, column = _candidates(pattern, frame)
    return row, column, None, np.arange(len(row))


def _candidates(pattern: Geometry, frame: _Frame) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Blocks that the pattern's reach touches, sorted by query block, then key block."""
    first = np.arange(frame.rows) * frame.block + frame.offset
    last = np.minimum(first + (frame.block - 1), frame.offset + frame.q_len - 1)
    start, stop = pattern.reach(first, last, frame.key_offset + frame.kv_len)
    start, stop = (clamp(x - frame.key_offset, 0, frame.kv_len) for x in (start, stop))
    low, count = _blocks(start, stop, frame.block)
    many, size = low.shape[1] > 1, max(frame.columns, 1)
    row = np.arange(frame.rows).repeat(count.sum(1))
    column = spans(low.ravel(), count.ravel())
    if not many:
        return row, column
    cell = occurring(row * size + column, frame.rows * size)
    return cell // size, cell % size


def _blocks(
    start: Int[np.ndarray, "N M"], stop: Int[np.ndarray, "N M"], block: int
) -> tuple[Int[np.ndarray, "N M"], Int[np.ndarray, "N M"]]:
    """The first block that each half-open interval touches, and how many it touches."""
    low = start // block
    return low, np.where(stop > start, -(-stop // block) - low, 0)


def _by_distance(
    pattern: Geometry, frame: _Frame
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "C"]]:
    """Candidates as ``_candidates`` gives them, the class of each, and one candidate of each class.

    Blocks of a class lie at one distance and end alike, before the lengths or beyond: they have equal masks.
    """
    block, shift = frame.block, frame.offset - frame.key_offset
    # A query block so late that every block it is compared with lies at positions >= 0.
    first = np.array([(frame.rows + 1) * block + max(shift, 0)])
    origin = int(first[0]) - shift
    start, stop = pattern.reach(first, first + (block - 1), origin + frame.columns * block)
    start, stop = (clamp(x - origin, -frame.rows * block, frame.columns * block) for x in (start, stop))
    low, count = _blocks(start, stop, block)
    ahead = occurring(spans(low.ravel(), count.ravel()) + frame.rows, frame.rows + frame.columns) - frame.rows
    grid = np.arange(frame.rows)[:, None] + ahead
    place = ((grid >= 0) & (grid < frame.columns)).ravel().nonzero()[0]
    row, which = place // max(len(ahead), 1), place % max(len(ahead), 1)
    column = grid.ravel()[place]
    classes = which * 4 + 2 * (row >= frame.q_len // block) + (column >= frame.kv_len // block)
    found, classes = distinct(classes, 4 * len(ahead))
    some = np.empty(len(found), np.int64)
    some[classes] = np.arange(len(classes))
    return row, column, classes, some


def _kinds(
    pattern: Geometry, row: Int[np.ndarray, "N"], column: Int[np.ndarray, "N"], frame: _Frame
) -> tuple[Int[np.ndarray, "N"], Bool[np.ndarray, "U block block"]]:
    """What each block shows, by evaluating one block of each signature: HIDDEN, FULL, or a row of the masks."""
    some, index = _alike(pattern, row, column, frame)
    truth = _evaluate(pattern, row[some], column[some], frame)
    height, width = _sizes(row[some], column[some], frame)
    seen, possible = truth.sum((1, 2)), height * width
    kind = np.where(seen == 0, HIDDEN, FULL)
    masks: dict[bytes, int] = {}
    kept: list[int] = []
    for place in ((seen > 0) & (seen < possible)).nonzero()[0].tolist():
        kind[place] = masks.setdefault(truth[place].tobytes(), len(masks))
        if kind[place] == len(kept):
            kept.append(place)
    return kind[index], truth[kept]


def _alike(
    pattern: Geometry, row: Int[np.ndarray, "N"], column: Int[np.ndarray, "N"], frame: _Frame
) -> tuple[Int[np.ndarray, "U"], Int[np.ndarray, "N"]]:
    """One block of each signature, and for every block which of them is like it."""
    block = frame.block
    signature = pattern.signature(row * block + frame.offset, column * block + frame.key_offset, block)
    size, index = combined([*_sizes(row, column, frame), *signature])
    some = np.empty(size, np.int64)
    some[index] = np.arange(len(index))
    return some, index


def _sizes(
    row: Int[np.ndarray, "N"], column: Int[np.ndarray, "N"], frame: _Frame
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Queries and keys of each block."""
    height, width = frame.q_len - row * frame.block, frame.kv_len - column * frame.block
    return np.minimum(height, frame.block), np.minimum(width, frame.block)


def _counted(
    pattern: Geometry, row: Int[np.ndarray, "U"], column: Int[np.ndarray, "U"], frame: _Frame
) -> Int[np.ndarray, "U"]:
    """Visible pairs of these blocks; of a large block, some rows at a time."""
    if frame.block**2 <= STRIP:
        step = max(1, SERIAL // frame.block**2)
        parts = [slice(start, start + step) for start in range(0, len(row), step)]
        sums = [_evaluate(pattern, row[part], column[part], frame).sum((1, 2)) for part in parts]
        return np.concatenate([np.zeros(0, np.int64), *sums])
    found = np.zeros(len(row), np.int64)
    for place, (height, width) in enumerate(zip(*_sizes(row, column, frame), strict=True)):
        query, key = (int(x[place]) * frame.block for x in (row, column))
        keys = torch.arange(key, key + int(width)) + frame.key_offset
        for queries in torch.arange(query, query + int(height)).split(max(1, STRIP // frame.block)):
            found[place] += int(pattern.visible(queries[:, None] + frame.offset, keys).sum())
    return found


def _evaluate(
    pattern: Geometry, row: Int[np.ndarray, "U"], column: Int[np.ndarray, "U"], frame: _Frame
) -> Bool[np.ndarray, "U block block"]:
    """The truth of these blocks; False beyond the lengths."""
    inside = np.arange(frame.block)
    query, key = ((x * frame.block)[:, None] + inside for x in (row, column))
    truth = np.empty((len(row), frame.block, frame.block), bool)
    some = max(1, SERIAL // frame.block**2)
    for start in range(0, len(row), some):
        part = slice(start, start + some)
        where = tensor(query[part] + frame.offset)[:, :, None], tensor(key[part] + frame.key_offset)[:, None, :]
        truth[part] = pattern.visible(*where).numpy()
    if frame.q_len % frame.block or frame.kv_len % frame.block:
        truth &= (query < frame.q_len)[:, :, None] & (key < frame.kv_len)[:, None, :]
    return truth
