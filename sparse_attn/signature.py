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
        height, width = frame.heights(np.arange(frame.rows)), frame.widths(np.arange(frame.columns))
        by_query, queries = _classes([height, *(side(query) for side in signature.query)])
        by_key, keys = _classes([width, *(side(key) for side in signature.key)])
        by_distance, distances = _classes([side(frame.distances) for side in signature.distance])
        self.size = queries * keys * distances
        self._query = by_query * (keys * distances) if queries > 1 else None
        self._key = by_key * distances if keys > 1 else None
        self._distance = by_distance if distances > 1 else None
        self._columns, self._middle = frame.columns, frame.columns - 1
        self._meetings = [(one.meet, one.side(query), one.side(key)) for one in signature.meeting]
        self._bounds: tuple[Positions, Positions] | None = None
        if all(one.by_piece for one in signature.meeting) and self._meetings:
            begins, ends = zip(*(_meeting(query, key) for _, query, key in self._meetings), strict=True)
            self._bounds = reduce(np.minimum, begins), reduce(np.maximum, ends)

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

    def near(self, row: Positions, column: Positions) -> Int[np.ndarray, "n"]:
        """Which of these blocks, sorted by row, then column, are not told by their code alone."""
        if not self._meetings:
            return np.zeros(0, np.int64)
        if self._bounds is None:
            return np.arange(len(row))
        rows = np.arange(row[0], row[-1] + 1)
        cells = row * self._columns + column
        begin, end = (np.searchsorted(cells, rows * self._columns + side[rows]) for side in self._bounds)
        return spans(begin, np.maximum(end - begin, 0))


def _meeting(query: Sides, key: Sides) -> tuple[Positions, Positions]:
    """From which column on, and up to which, the blocks have a piece in common with each row's."""
    return np.searchsorted(key[1], query[0]), np.searchsorted(key[0], query[1], side="right")


def _classes(columns: Sequence[Positions]) -> tuple[Positions, int]:
    if not columns or not len(columns[0]):
        return np.zeros(0, np.int64), 1
    size, which = combined(list(columns))
    return which, size
