"""What decides the mask of a block: blocks of equal signature have equal masks, so one of them is looked at.

Most integers of a signature are a function of where the queries begin, of where the keys begin, or of the distance
between both. Those are worked out once for each row, column or diagonal of blocks, and a visit looks them up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from jaxtyping import Int

from sparse_attn.arrays import combined, spans
from sparse_attn.frame import Frame
from sparse_attn.reach import Positions

Side = Callable[[Positions], Positions]
Sides = tuple[Int[np.ndarray, "..."], ...]


@dataclass(frozen=True)
class Meeting:
    """Integers of a pair of blocks. side: what they need of a block of queries, or of keys, that starts there.

    by_piece: side begins with the first and the last of some ascending pieces that the block touches, and blocks
    without a piece in common all have equal integers.
    """

    side: Callable[[Positions], Sides]
    meet: Callable[[Sides, Sides], list[Positions]]
    by_piece: bool


@dataclass(frozen=True)
class Signature:
    """Functions whose integers together determine the mask of the block of (query, key) starts.

    query, key: of the one start; distance: of query - key; meeting: of both.
    """

    query: tuple[Side, ...] = ()
    key: tuple[Side, ...] = ()
    distance: tuple[Side, ...] = ()
    meeting: tuple[Meeting, ...] = ()

    def __add__(self, other: "Signature") -> "Signature":
        return Signature(
            self.query + other.query,
            self.key + other.key,
            self.distance + other.distance,
            self.meeting + other.meeting,
        )


def crossing(start: Positions, width: int, block: int) -> Positions:
    """Where a block crosses into the next ``width`` positions: below the block and the width; 0 where it does not."""
    return np.maximum(start % width - max(width - block, 0), 0)


class Classes:
    """The signature of every block of a frame, looked up: ``parts`` are equal where the masks are."""

    def __init__(self, signature: Signature, frame: Frame) -> None:
        query, key = frame.queries, frame.keys
        # a ragged end is like no other; without one, lengths tell nothing apart
        heights = [frame.heights(np.arange(frame.rows))] if frame.q_len % frame.block else []
        widths = [frame.widths(np.arange(frame.columns))] if frame.kv_len % frame.block else []
        distance = frame.distances if signature.distance else query
        by_query, queries = _classes([*heights, *(side(query) for side in signature.query)])
        by_key, keys = _classes([*widths, *(side(key) for side in signature.key)])
        by_distance, distances = _classes([side(distance) for side in signature.distance])
        self.size = queries * keys * distances
        self._query = by_query * (keys * distances) if queries > 1 else None
        self._key = by_key * distances if keys > 1 else None
        self._distance = by_distance if distances > 1 else None
        self._columns, self._middle = frame.columns, frame.columns - 1
        self._meetings = [(one.meet, one.side(query), one.side(key)) for one in signature.meeting]
        self._pieces: Int[np.ndarray, "R 4"] | None = None
        if self._meetings and all(one.by_piece for one in signature.meeting):
            self._pieces = _pieces([(query[:2], key[:2]) for _, query, key in self._meetings])

    @property
    def places(self) -> int:
        """``told`` gives integers below this."""
        return 2 * self.size

    def code(self, row: Positions, column: Positions) -> Positions:
        """An integer in [0, size) for what rows, columns and diagonals decide."""
        found = None if self._distance is None else self._distance[row - column + self._middle]
        for table, place in ((self._query, row), (self._key, column)):
            if table is not None:
                found = table[place] if found is None else found + table[place]
        return np.zeros_like(row) if found is None else found

    def parts(self, row: Positions, column: Positions) -> list[Positions]:
        """The code, and what meetings add."""
        found = [self.code(row, column)]
        for meet, query, key in self._meetings:
            found += meet(tuple(x[row] for x in query), tuple(x[column] for x in key))
        return found

    def told(self, row: Positions, column: Positions) -> tuple[Positions, Int[np.ndarray, "n"]]:
        """An integer for each of these blocks, sorted by row, then column: equal where masks are, save for the blocks
        that are listed beside it."""
        code = self.code(row, column)
        if not self._meetings:
            return code, np.zeros(0, np.int64)
        if self._pieces is None:
            return code, np.arange(len(row))
        rows = np.arange(row[0], row[-1] + 1)
        cells = row * self._columns + column
        edges = self._pieces[rows] + (rows * self._columns)[:, None]
        first, inside, outside, last = np.searchsorted(cells, edges).T
        code[spans(inside, outside - inside)] += self.size
        begin, count = np.stack([first, outside], 1), np.stack([inside - first, last - outside], 1)
        return code, spans(begin.ravel(), count.ravel())


def _pieces(meetings: Sequence[tuple[Sides, Sides]]) -> Int[np.ndarray, "R 4"]:
    """Of each row: the first column with a piece in common, the first that lies wholly in the row's only piece, the
    first behind those, and the first behind all."""
    first = reduce(np.minimum, (np.searchsorted(key[1], query[0]) for query, key in meetings))
    last = reduce(np.maximum, (np.searchsorted(key[0], query[1], side="right") for query, key in meetings))
    inside, outside = first, first
    if len(meetings) == 1:
        ((query, key),) = meetings
        begin, end = np.searchsorted(key[0], query[0]), np.searchsorted(key[1], query[1], side="right")
        some = (query[0] == query[1]) & (begin < end)
        inside, outside = np.where(some, begin, first), np.where(some, end, first)
    return np.stack([first, inside, outside, np.maximum(first, last)], 1)


def _classes(columns: Sequence[Positions]) -> tuple[Positions, int]:
    if not columns or not len(columns[0]):
        return np.zeros(0, np.int64), 1
    size, which = combined(list(columns))
    return which, size
