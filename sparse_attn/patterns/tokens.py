"""Patterns of single positions: sinks, prefixes, global tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import clamp, tensor
from sparse_attn.patterns.bands import causal
from sparse_attn.patterns.base import Pattern, at_least, integers
from sparse_attn.reach import Comb, Positions, Reach, Reaches, everything, interval
from sparse_attn.signature import Signature


@dataclass(frozen=True)
class _Sinks(Pattern):
    count: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (key_pos < self.count).expand(torch.broadcast_shapes(query_pos.shape, key_pos.shape))

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return everything(first, self.count)

    def signature(self, block: int) -> Signature:
        return Signature(key=(lambda key: clamp(self.count - key, 0, block),))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return key_pos < self.count

    def is_causal_after(self, prefix: int) -> bool:
        return self.count <= prefix

    def __str__(self) -> str:
        return f"sinks({self.count})"


@dataclass(frozen=True)
class _GlobalTokens(Pattern):
    positions: tuple[int, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self._holds(query_pos) | self._holds(key_pos)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        chosen = self._chosen
        begins = np.append(True, np.diff(chosen) > 1)
        ends = np.append(begins[1:], True)
        columns = Comb(chosen[begins], chosen[ends] + 1, moves=False)
        held, _ = self._held(first, last + 1)
        (everywhere,) = everything(first, key_end)
        rows = interval(np.zeros_like(first), np.where(held > 0, key_end, 0))
        return (Reach(everywhere.start, everywhere.stop, (columns,)), *rows)

    def signature(self, block: int) -> Signature:
        def where(start: Positions) -> Positions:
            return self._where(start, block)

        return Signature(query=(where,), key=(where,))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        if self.positions[-1] >= next_query:
            return torch.ones_like(key_pos, dtype=torch.bool)
        return self._holds(key_pos)

    @cached_property
    def _chosen(self) -> Int[np.ndarray, "G"]:
        return np.array(self.positions)

    def _holds(self, position: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether each of these is a global position."""
        chosen, position = tensor(self._chosen).to(position.device), position.long().contiguous()
        return chosen[torch.searchsorted(chosen, position).clamp_(max=len(chosen) - 1)] == position

    def _held(self, start: Positions, stop: Positions) -> tuple[Positions, Positions]:
        """How many global positions lie in [start, stop), and which of them is the first there."""
        chosen = self._chosen
        begin = np.searchsorted(chosen, start)
        return np.searchsorted(chosen, stop) - begin, begin

    def _where(self, start: Positions, block: int) -> Positions:
        """What tells apart blocks by the global positions that they hold: -1 for none, block for all, the place of a
        single one, and the block itself where there are several."""
        held, begin = self._held(start, start + block)
        place = self._chosen[np.minimum(begin, len(self.positions) - 1)] - start
        several = np.where(held == block, block, 2 * block + start)
        return np.where(held == 0, -1, np.where(held == 1, place, several))

    def __str__(self) -> str:
        return f"global_tokens({', '.join(map(str, self.positions))})"


def sinks(count: int) -> Pattern:
    """Every query sees the first ``count`` positions (attention sinks, Xiao et al. 2023, arXiv:2309.17453).

    It says nothing about the order: in a decoder write ``causal() & (sliding_window(w) | sinks(n))``.
    Raises: ValueError if count < 1.
    """
    return _Sinks(at_least("count", count, 1))


def prefix_lm(length: int) -> Pattern:
    """``causal() | sinks(length)``: the first ``length`` positions see each other, the rest see the past.

    Raffel et al. 2020, fig. 3 (arXiv:1910.10683). Not causal: the prefix must come in one piece, never token by token.
    Raises: ValueError if length < 1.
    """
    return causal() | sinks(at_least("length", length, 1))


def global_tokens(*positions: int | Iterable[int]) -> Pattern:
    """The tokens at these positions see every key, and every query sees them.

    Give positions one by one or as a list: ``global_tokens(0, 128)``, ``global_tokens(range(4))``. A position beyond
    the sequence has no effect. In a decoder write ``causal() & (sliding_window(w) | global_tokens(0))``.
    Beltagy et al. 2020, §3.1 (arXiv:2004.05150). Raises: ValueError without positions or for one below 0.
    """
    chosen = sorted(set(integers("positions", positions)))
    if not chosen:
        raise ValueError("positions must hold at least one position, got none")
    for end in (chosen[0], chosen[-1]):
        at_least("positions", end, 0)
    return _GlobalTokens(tuple(chosen))
