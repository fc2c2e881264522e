"""Which keys a block of queries may see, told without looking at pairs: intervals, and combs that leave keys out.

More than is seen may be told: what a block really shows is in its mask. A tuple of these records is their union.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sparse_attn.arrays import spans

Positions = Int[np.ndarray, "N"]


@dataclass(frozen=True, eq=False)
class Comb:
    """Half-open intervals, ascending and apart: of key positions or, where the comb ``moves``, of key - query."""

    start: Int[np.ndarray, "G"]
    stop: Int[np.ndarray, "G"]
    moves: bool

    def blocks(self, size: int, offset: int, key_offset: int) -> Int[np.ndarray, "n"]:
        """Ascending key blocks of ``size`` that hold some; where the comb moves, key block - query block."""
        shift, wide = (offset - key_offset, size - 1) if self.moves else (-key_offset, 0)
        low, high = (self.start + shift) // size, -(-(self.stop + shift + wide) // size)
        low[1:] = np.maximum(low[1:], high[:-1])
        return spans(low, np.maximum(high - low, 0))

    def teeth(
        self, first: Positions, start: Int[np.ndarray, "N M"], stop: Int[np.ndarray, "N M"]
    ) -> Int[np.ndarray, "N M"]:
        """At most so many intervals meet [start, stop) for the queries from ``first`` on."""
        shift = first[:, None] if self.moves else 0
        return np.searchsorted(self.start, stop - shift) - np.searchsorted(self.stop, start - shift)


@dataclass(frozen=True, eq=False)
class Reach:
    """Block n sees no keys but those in one of [start[n, m], stop[n, m]) that all combs hold too."""

    start: Int[np.ndarray, "N M"]
    stop: Int[np.ndarray, "N M"]
    combs: tuple[Comb, ...] = ()

    def __and__(self, other: "Reach") -> "Reach":
        start = np.maximum(self.start[:, :, None], other.start[:, None, :])
        stop = np.minimum(self.stop[:, :, None], other.stop[:, None, :])
        size = (len(start), self.start.shape[1] * other.start.shape[1])
        return Reach(start.reshape(size), stop.reshape(size), self.combs + other.combs)

    def keys(self, first: Positions, last: Positions, key_end: int) -> Positions:
        """At most so many keys of [0, key_end) for the queries first[n] … last[n]."""
        start, stop = np.maximum(self.start, 0), np.minimum(self.stop, key_end)
        most = np.maximum(stop - start, 0)
        for comb in self.combs:
            wide = (last - first)[:, None] if comb.moves else 0
            size = int((comb.stop - comb.start).max(initial=0)) + wide
            most = np.minimum(most, np.maximum(comb.teeth(first, start - wide, stop), 0) * size)
        return most.sum(1)


Reaches = tuple[Reach, ...]


def everything(first: Positions, key_end: int) -> Reaches:
    """The reach of queries that may see all keys below ``key_end``."""
    return (Reach(np.zeros((len(first), 1), np.int64), np.full((len(first), 1), key_end)),)


def interval(start: Positions, stop: Positions) -> Reaches:
    """One interval for each block of queries."""
    return (Reach(start[:, None], stop[:, None]),)


def within(left: Reaches, right: Reaches) -> Reaches:
    """What both reach."""
    return tuple(a & b for a in left for b in right)
