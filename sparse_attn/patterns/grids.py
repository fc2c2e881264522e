"""Patterns of positions written row by row on a grid: rows, columns, and the last columns of each row."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.patterns.bands import multiples
from sparse_attn.patterns.base import Pattern, at_least
from sparse_attn.reach import Comb, Positions, Reach, Reaches, everything, interval
from sparse_attn.signature import Meeting, Sides, Signature, crossing


@dataclass(frozen=True)
class _SameRow(Pattern):
    width: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return query_pos // self.width == key_pos // self.width

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return interval(first // self.width * self.width, (last // self.width + 1) * self.width)

    def signature(self, block: int) -> Signature:
        most = (block - 1) // self.width + 1
        crossings = min(self.width, block)

        def side(start: Positions) -> Sides:
            return start // self.width, (start + (block - 1)) // self.width, crossing(start, self.width, block)

        def meet(query: Sides, key: Sides) -> list[Positions]:
            # blocks that share no row of the grid are alike
            apart = (query[1] < key[0]) | (key[1] < query[0])
            code = (query[2] * crossings + key[2]) * (2 * most + 1) + (query[0] - key[0] + most)
            return [np.where(apart, -1, code)]

        return Signature(meeting=(Meeting(side, meet, by_piece=True),))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return key_pos // self.width >= next_query // self.width

    def __str__(self) -> str:
        return f"same_row({self.width})"


@dataclass(frozen=True)
class _LastColumns(Pattern):
    width: int
    columns: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        seen = key_pos % self.width >= self.width - self.columns
        return seen.expand(torch.broadcast_shapes(query_pos.shape, key_pos.shape))

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        (reach,) = everything(first, key_end)
        if self.width - self.columns <= int((last - first).max(initial=0)):
            return (reach,)
        stop = np.arange(self.width, max(key_end, 0) + self.width, self.width)
        return (Reach(reach.start, reach.stop, (Comb(stop - self.columns, stop, moves=False),)),)

    def signature(self, block: int) -> Signature:
        def where(key: Positions) -> Positions:
            place, first = key % self.width, self.width - self.columns
            inside = (place >= first) & (place + block <= self.width)
            return np.where(inside, -1, np.where(place + block <= first, -2, place))

        return Signature(key=(where,))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return key_pos % self.width >= self.width - self.columns

    def __str__(self) -> str:
        return f"last_columns({self.width}, {self.columns})"


def same_row(width: int) -> Pattern:
    """Query i sees keys with ⌊i / width⌋ = ⌊j / width⌋: its own row of the grid, or block of the text.

    Raises: ValueError if width < 1.
    """
    return _SameRow(at_least("width", width, 1))


def last_columns(width: int, columns: int) -> Pattern:
    """Every query sees the keys with j mod width ≥ width - columns: the last columns of every row.

    Raises: ValueError unless 1 ≤ columns ≤ width.
    """
    at_least("columns", columns, 1)
    if columns > at_least("width", width, 1):
        raise ValueError(f"columns must be in [1, width={width}], got {columns}")
    return _LastColumns(width, columns)


def fixed(stride: int, summary: int) -> Pattern:
    """``same_row(stride) | last_columns(stride, summary)``: the own block, and the last keys of every block.

    Both heads of the fixed pattern in one: with ``causal() &``, A¹ = {j: ⌊j/stride⌋ = ⌊i/stride⌋} and
    A² = {j: j mod stride ≥ stride - summary} of Child et al. 2019, §4.2 (arXiv:1904.10509), who took stride 128 or 256
    and a summary of 8, 16 or 32. Raises: ValueError unless 1 ≤ summary ≤ stride.
    """
    at_least("summary", summary, 1)
    if summary > at_least("stride", stride, 1):
        raise ValueError(f"summary must be in [1, stride={stride}], got {summary}")
    return same_row(stride) | last_columns(stride, summary)


def axial(width: int) -> Pattern:
    """``same_row(width) | multiples(width)``: the keys of the query's row and of its column, on a grid ``width`` wide.

    Both axes in one head; give ``same_row(width)`` to one layer or head and ``multiples(width)`` to the next for the
    paper's sequence of axes. Ho et al. 2019 (arXiv:1912.12180). Raises: ValueError if width < 1.
    """
    return same_row(width) | multiples(width)
