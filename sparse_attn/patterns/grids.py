"""Patterns of positions written row by row on a grid: rows, columns, and the last columns of each row."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import clamp
from sparse_attn.patterns.bands import multiples
from sparse_attn.patterns.base import Intervals, Pattern, Positions, at_least, everything


@dataclass(frozen=True)
class _SameRow(Pattern):
    width: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return query_pos // self.width == key_pos // self.width

    def reach(self, first: Positions, last: Positions, key_end: int) -> Intervals:
        return (first // self.width * self.width)[:, None], ((last // self.width + 1) * self.width)[:, None]

    def signature(self, query: Positions, key: Positions, block: int) -> list[Positions]:
        # Blocks so far apart share no row of the grid.
        far = (block - 1) // self.width + 2
        apart = clamp(query // self.width - key // self.width, -far, far)
        return [_crossing(query, self.width, block), _crossing(key, self.width, block), apart]

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

    def reach(self, first: Positions, last: Positions, key_end: int) -> Intervals:
        if self.width <= int((last - first).max() if len(first) else 0) + 1:
            return everything(first, key_end)
        stop = np.arange(self.width, max(key_end, 0) + self.width, self.width)
        stop = np.broadcast_to(stop, (len(first), len(stop)))
        return stop - self.columns, stop

    def signature(self, query: Positions, key: Positions, block: int) -> list[Positions]:
        return [key % self.width]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return key_pos % self.width >= self.width - self.columns

    def __str__(self) -> str:
        return f"last_columns({self.width}, {self.columns})"


def _crossing(start: Positions, width: int, block: int) -> Positions:
    """Where in its row a block starts, or -1 for all blocks that lie in one row."""
    place = start % width
    return np.where(place + block <= width, -1, place)


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
