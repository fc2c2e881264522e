"""Several documents in one sequence, which do not see each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate, pairwise
from operator import and_

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import starts
from sparse_attn.patterns.bands import full
from sparse_attn.patterns.base import Pattern, at_least, integers, parts_of
from sparse_attn.reach import Positions, Reaches, interval
from sparse_attn.signature import Meeting, Sides, Signature


@dataclass(frozen=True)
class _Documents(Pattern):
    lengths: tuple[int, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self._document(query_pos) == self._document(key_pos)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        edges = self._edges
        stops = np.append(edges, max(key_end, int(edges[-1])))
        start = np.where(first < 0, -(1 << 40), edges[np.maximum(self._index(first), 0)])
        return interval(start, stops[self._index(last) + 1])

    def signature(self, block: int) -> Signature:
        def side(start: Positions) -> Sides:
            first, last = self._index(start), self._index(start + (block - 1))
            return first, last, self._cut(start, (first, last), block)

        def meet(query: Sides, key: Sides) -> list[Positions]:
            # Blocks without a document in common are alike; others by where they are cut, and by which is ahead.
            apart = (query[1] < key[0]) | (key[1] < query[0])
            ahead = np.where(apart, block + 1, query[0] - key[0])
            return [np.where(apart, -1, query[2]), np.where(apart, -1, key[2]), ahead]

        return Signature(meeting=(Meeting(side, meet, by_piece=True),))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return self._document(key_pos) >= self._document(torch.tensor(next_query, device=key_pos.device))

    def _ends(self, like: Tensor) -> Int[Tensor, "M"]:
        return torch.from_numpy(self._edges)[1:].to(like.device)

    def _document(self, position: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Index of the document of a position; -1 before the first."""
        document = torch.searchsorted(self._ends(position), position.contiguous(), right=True)
        return torch.where(position < 0, -1, document)

    @cached_property
    def _edges(self) -> Int[np.ndarray, "M"]:
        """Where each document begins, and what lies behind the last one."""
        return starts(np.array(self.lengths))

    def _index(self, position: Positions) -> Positions:
        """Index of the document of a position; -1 before the first."""
        return np.searchsorted(self._edges, position, side="right") - 1

    def _cut(self, start: Positions, span: tuple[Positions, Positions], block: int) -> Positions:
        """Where in a block the edge between two documents lies, or the block itself if there are more; -1: none."""
        first, last = span
        edges = self._edges
        place = edges[np.minimum(first + 1, len(edges) - 1)] - start
        return np.where(first == last, -1, np.where(last - first == 1, place, block + np.abs(start)))

    def __str__(self) -> str:
        return f"documents({', '.join(map(str, self.lengths))})"


def documents(*lengths: int | Iterable[int]) -> Pattern:
    """Documents of these lengths, packed one behind the other: a query sees the keys of its own document.

    Give lengths one by one or as a list: ``documents(100, 28)``, ``documents([100, 28])``. What lies behind the last
    one is one more document. For a causal model write ``causal() & documents(…)``. A batch of unequal sequences packed
    into one row this way costs no padding. Raises: ValueError without lengths or for one below 1.

    >>> documents(2, 1).layout(4, block=4).to_mask().int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    """
    sizes = integers("lengths", lengths)
    if not sizes:
        raise ValueError("lengths must hold at least one length, got none")
    found = _Documents(tuple(at_least("lengths", size, 1) for size in sizes))
    at_least("the sum of lengths", sum(sizes), 1)
    return found


def split_documents(pattern: Pattern, length: int) -> tuple[tuple[int, ...], Pattern] | None:
    """The documents' lengths within ``length`` positions, and what each sees inside itself, as if it were alone.

    None unless the pattern is ``documents(…)``, alone or in an intersection with patterns of distance alone (causal, a
    window, dilation): those look the same from the start of a document.
    """
    parts = parts_of(pattern)
    found = [part for part in parts if isinstance(part, _Documents)]
    rest = [part for part in parts if not isinstance(part, _Documents)]
    if len(found) != 1 or not all(part.is_relative for part in rest):
        return None
    ends = [0, *(min(end, length) for end in accumulate(found[0].lengths)), length]
    sizes = tuple(end - start for start, end in pairwise(ends) if end > start)
    return sizes, reduce(and_, rest) if rest else full()
