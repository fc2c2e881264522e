"""Several documents in one sequence, which do not see each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import and_

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.patterns.bands import full
from sparse_attn.patterns.base import Intervals, Pattern, at_least, integers, parts_of


@dataclass(frozen=True)
class _Documents(Pattern):
    lengths: tuple[int, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self._document(query_pos) == self._document(key_pos)

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        ends = self._ends(first)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), max(key_end, int(ends[-1])))])
        start = torch.where(first < 0, torch.full_like(first, -(1 << 40)), edges[self._document(first).clamp(min=0)])
        return start[:, None], edges[(self._document(last) + 1)][:, None]

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        apart = (self._document(query) - self._document(key)).clamp(-block - 1, block + 1)
        return [self._edges_within(query, block), self._edges_within(key, block), apart]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return self._document(key_pos) >= self._document(torch.tensor(next_query, device=key_pos.device))

    def _ends(self, like: Tensor) -> Int[Tensor, "M"]:
        return torch.tensor(list(accumulate(self.lengths)), device=like.device)

    def _document(self, position: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """Index of the document of a position; -1 before the first."""
        document = torch.searchsorted(self._ends(position), position.contiguous(), right=True)
        return torch.where(position < 0, -1, document)

    def _edges_within(self, start: Int[Tensor, "N"], block: int) -> Int[Tensor, "N"]:
        """What tells apart the blocks that hold an edge between documents: where it is, or the block if there are more.

        -1 for all blocks inside one document.
        """
        first, last = self._document(start), self._document(start + block - 1)
        edges = torch.cat([start.new_zeros(1), self._ends(start)])
        place = edges[(first + 1).clamp(max=len(edges) - 1)] - start
        return torch.where(first == last, -1, torch.where(last - first == 1, place, block + start.abs()))

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
    return _Documents(tuple(at_least("lengths", size, 1) for size in sizes))


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
