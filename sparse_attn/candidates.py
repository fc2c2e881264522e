"""The blocks that a pattern's reach touches, in order, some rows of blocks at a time.

A row is a few runs of consecutive blocks, and of neighbours in a list that all rows share (the last columns of a grid,
the multiples of a stride), so its blocks are written in one go, with nothing to sort. Only where several lists come
together in one pattern are they brought in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int

from sparse_attn.arrays import clamp, spans
from sparse_attn.frame import Frame
from sparse_attn.reach import Comb, Positions, Reach, Reaches

# Blocks that are worked on together: their arrays stay in the cache, and in the heap (larger ones are mapped anew).
CHUNK = 1 << 14

# Runs of blocks of each row: from, up to but without.
Bounds = tuple[Int[np.ndarray, "_ _"], Int[np.ndarray, "_ _"]]


@dataclass(frozen=True, eq=False)
class Runs:
    """Row r holds the blocks begin[r, m] … begin[r, m] + count[r, m] - 1, or the entries of ``listed`` there (+ r where
    it ``moves``), ascending and each once."""

    begin: Int[np.ndarray, "R M"]
    count: Int[np.ndarray, "R M"]
    listed: Int[np.ndarray, "n"] | None
    moves: bool

    def expand(self, first: int, stop: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "rows"]]:
        """Blocks of the rows first … stop - 1, and how many each row has."""
        begin, count = self.begin[first:stop], self.count[first:stop]
        column, each = spans(begin.ravel(), count.ravel()), count.sum(1)
        if self.listed is not None:
            column = self.listed[column]
        if self.moves:
            column += np.arange(first, stop).repeat(each)
        return column, each


class Candidates:
    """Every block that the reach of the frame's rows touches."""

    def __init__(self, reaches: Reaches, frame: Frame) -> None:
        self._frame = frame
        self._runs = _runs(reaches, frame)
        self._each = sum((runs.count.sum(1) for runs in self._runs), np.zeros(frame.rows, np.int64))

    @property
    def most(self) -> int:
        """At most so many blocks."""
        return min(int(self._each.sum()), self._frame.rows * self._frame.columns)

    def chunks(self) -> Iterator[tuple[Positions, Positions]]:
        """Rows and columns of about CHUNK blocks at a time, sorted by row, then column; each row in one piece."""
        ends = self._each.cumsum()
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, np.arange(CHUNK, total, CHUNK)).tolist() if total > CHUNK else []
        bounds = sorted({0, *cuts, self._frame.rows})
        for first, stop in pairwise(bounds):
            yield self._some(first, stop)

    def _some(self, first: int, stop: int) -> tuple[Positions, Positions]:
        parts = [runs.expand(first, stop) for runs in self._runs]
        rows = np.arange(first, stop)
        if len(parts) == 1:
            column, each = parts[0]
            return rows.repeat(each), column
        base = (rows - first) * self._frame.columns
        # stable: each part ascends already, and this sort merges what does
        cell = np.sort(np.concatenate([base.repeat(each) + column for column, each in parts]), kind="stable")
        cell = cell[np.append(True, cell[1:] != cell[:-1])[: len(cell)]]
        each = np.diff(np.searchsorted(cell, np.append(base, (stop - first) * self._frame.columns)))
        return rows.repeat(each), cell - base.repeat(each)


def _runs(reaches: Reaches, frame: Frame) -> list[Runs]:
    by_comb: dict[tuple[Comb, ...], list[Bounds]] = {(): []}
    for reach in reaches:
        by_comb.setdefault(reach.combs, []).append(_bounds(reach, frame))
    plain = _united(by_comb.pop(()), frame)
    found: list[Runs] = []
    for combs, some in by_comb.items():
        listed, moves = _listed(combs, frame)
        found.append(_woven(plain, _united(some, frame), listed, moves, frame))
        # the runs are in the first list's rows: other lists are brought in order with it
        plain = _united([], frame)
    return found or [Runs(plain[0], np.maximum(plain[1] - plain[0], 0), None, False)]


def _bounds(reach: Reach, frame: Frame) -> Bounds:
    """The blocks from the first to the last that each interval of the reach touches."""
    start, stop = (clamp(x - frame.key_offset, 0, frame.kv_len) for x in (reach.start, reach.stop))
    low = start // frame.block
    return low, np.where(stop > start, -(-stop // frame.block), low)


def _united(parts: list[Bounds], frame: Frame) -> Bounds:
    """The blocks of all parts, in runs that ascend and do not overlap; a run may be empty."""
    if len(parts) == 1 and parts[0][0].shape[1] == 1:
        return parts[0]
    empty = np.zeros((frame.rows, 0), np.int64)
    low, high = (np.concatenate([empty, *(part[side] for part in parts)], 1) for side in range(2))
    low, high, _ = _sorted(low, high, 0)
    before = np.maximum.accumulate(high, axis=1)
    low[:, 1:] = np.maximum(low[:, 1:], before[:, :-1])
    return low, before


def _sorted(
    low: Int[np.ndarray, "R M"], high: Int[np.ndarray, "R M"], mark: Bool[np.ndarray, "M"] | int
) -> tuple[Int[np.ndarray, "R M"], Int[np.ndarray, "R M"], Int[np.ndarray, "R M"]]:
    """Runs by where they begin, with a mark of one bit; those of no block first, at 0."""
    # all in one number sorts faster than the order of one of them; blocks are fewer than 2^30
    packed = np.sort(np.where(high > low, low << 32 | high << 1 | mark, 0), axis=1)
    return packed >> 32, packed >> 1 & (1 << 31) - 1, packed & 1


def _woven(plain: Bounds, bounds: Bounds, listed: Int[np.ndarray, "n"], moves: bool, frame: Frame) -> Runs:
    """Runs of blocks and, between them, what a list holds inside its bounds."""
    edge = np.zeros((frame.rows, 1), np.int64)
    low, high, shift = *bounds, np.arange(frame.rows)[:, None] if moves else edge
    if not plain[0].shape[1]:
        begin, end = (np.searchsorted(listed, x - shift) for x in (low, high))
        return Runs(begin, np.maximum(end - begin, 0), listed, moves)
    gaps = np.concatenate([edge, plain[1]], 1), np.concatenate([plain[0], edge + frame.columns], 1)
    parts = frame.rows, low.shape[1] * gaps[0].shape[1]
    low = np.maximum(low[:, :, None], gaps[0][:, None]).reshape(parts)
    high = np.minimum(high[:, :, None], gaps[1][:, None]).reshape(parts)
    mark = np.arange(low.shape[1] + plain[0].shape[1]) < low.shape[1]
    low, high, mark = _sorted(np.concatenate([low, plain[0]], 1), np.concatenate([high, plain[1]], 1), mark)
    # the blocks themselves follow the list, from as far before the first as the last row moves
    before = frame.rows - 1 if moves else 0
    begin, end = (
        np.where(mark, np.searchsorted(listed, x - shift), x - shift + before + len(listed)) for x in (low, high)
    )
    return Runs(begin, end - begin, np.append(listed, np.arange(-before, frame.columns)), moves)


def _listed(combs: tuple[Comb, ...], frame: Frame) -> tuple[Int[np.ndarray, "n"], bool]:
    """The blocks that all combs hold, or of combs that move and combs that stand those with fewer; and which it is."""
    by_kind = [
        (reduce(partial(np.intersect1d, assume_unique=True), lists), moves)
        for moves in (False, True)
        if (lists := [c.blocks(frame.block, frame.offset, frame.key_offset) for c in combs if c.moves == moves])
    ]
    return min(by_kind, key=lambda kind: len(kind[0]))
