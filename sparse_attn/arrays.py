"""Operations on integer arrays that layouts and plans are built by.

numpy, not torch: the arrays hold one number a block or a mask, an operation on them costs numpy a third of what it
costs torch, and numpy never waits for a thread pool that a busy machine does not run.
"""

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor, from_numpy

# Entries of a table that are worth as much as sorting one number.
TABLE = 16
# Rows for which a dictionary is faster than arrays.
FEW = 128


def distinct(code: Int[np.ndarray, "N"], size: int) -> tuple[Int[np.ndarray, "D"], Int[np.ndarray, "N"]]:
    """The values that occur, ascending, and for each entry which of them it is. Entries lie in [0, size).

    >>> distinct(np.array([7, 2, 7]), 10)
    (array([2, 7]), array([1, 0, 1]))
    """
    if size > TABLE * (len(code) + 64):
        values, which = np.unique(code, return_inverse=True)
        return values, which
    values = occurring(code, size)
    rank = np.empty(size, np.int64)
    rank[values] = np.arange(len(values))
    return values, rank[code]


def occurring(code: Int[np.ndarray, "N"], size: int) -> Int[np.ndarray, "D"]:
    """The values that occur, ascending. Entries lie in [0, size)."""
    if size > TABLE * (len(code) + 64):
        return np.unique(code)
    present = np.zeros(size, bool)
    present[code] = True
    return present.nonzero()[0]


def combined(parts: list[Int[np.ndarray, "N"]]) -> tuple[int, Int[np.ndarray, "N"]]:
    """How many different rows (parts[0][n], parts[1][n], …) there are, and which of them each n has."""
    if len(parts[0]) <= FEW:
        known: dict[tuple[int, ...], int] = {}
        rows = zip(*(part.tolist() for part in parts), strict=True)
        which = np.array([known.setdefault(row, len(known)) for row in rows], np.int64)
        return len(known), which
    code, size = np.zeros(len(parts[0]), np.int64), 1
    for part in parts:
        least, most = int(part.min()), int(part.max())
        if least == most:
            continue
        span = most - least + 1
        if span > TABLE * (len(code) + 64):
            values, part = np.unique(part, return_inverse=True)
            least, span = 0, len(values)
        code, size = code * span + (part - least), size * span
        if size > TABLE * (len(code) + 64):
            values, code = distinct(code, size)
            size = len(values)
    values, code = distinct(code, size)
    return len(values), code


def spans(start: Int[np.ndarray, "N"], count: Int[np.ndarray, "N"]) -> Int[np.ndarray, "M"]:
    """start[0], start[0] + 1, … (count[0] of them), start[1], …: all stretches in a row."""
    ends = count.cumsum()
    return np.arange(int(ends[-1]) if len(ends) else 0) + (start - ends + count).repeat(count)


def starts(count: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N_plus_1"]:
    """0, count[0], count[0] + count[1], …"""
    found = np.zeros(len(count) + 1, np.int64)
    np.cumsum(count, out=found[1:])
    return found


def clamp(x: Int[np.ndarray, "..."], low: int, high: int) -> Int[np.ndarray, "..."]:
    """x within [low, high]; np.clip takes five times as long for few numbers."""
    return np.minimum(np.maximum(x, low), high)


def any_of(x: Bool[np.ndarray, "..."], *axes: int) -> Bool[np.ndarray, "..."]:
    """x.any(axes), without the wrapper around it."""
    found: np.ndarray = np.logical_or.reduce(x, axes)
    return found


def all_of(x: Bool[np.ndarray, "..."], *axes: int) -> Bool[np.ndarray, "..."]:
    """x.all(axes), without the wrapper around it."""
    found: np.ndarray = np.logical_and.reduce(x, axes)
    return found


def tensor(x: Int[np.ndarray, "..."] | Bool[np.ndarray, "..."]) -> Tensor:
    """The same memory as a tensor."""
    return from_numpy(x)
