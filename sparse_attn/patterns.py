"""Which keys a query sees, as small hashable records that combine with ``&`` and ``|``.

>>> pattern = causal() & (sliding_window(256) | sinks(4))
>>> str(pattern)
'causal() & (sliding_window(256) | sinks(4))'

A pattern is geometry over absolute positions. It knows the truth for a pair of positions (``visible``), the key
intervals a block of queries can reach, what decides the mask of a block (see ``layout``), and which cached keys a
later query can still see (``retained``). Combinations derive all four from their parts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from math import isqrt

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.layout import BlockLayout, build_layout

Intervals = tuple[Int[Tensor, "N M"], Int[Tensor, "N M"]]


class Pattern(ABC):
    """A set of (query position, key position) pairs. Combine with ``&`` (both) and ``|`` (either)."""

    @abstractmethod
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The truth for each pair of positions, broadcast."""

    @abstractmethod
    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        """Half-open key intervals holding every key in [0, key_end) that a query in [first, last] sees (maybe more)."""

    @abstractmethod
    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        """Integers that determine the block×block mask that starts at (query, key)."""

    @abstractmethod
    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        """Keys that a query at ``next_query`` or later may see; the others can be dropped from a cache."""

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """True when no query sees a key at a later position, whatever the length."""

    @property
    def is_relative(self) -> bool:
        """True when what is visible depends on the distance i − j alone: padding on the left then changes nothing."""
        return False

    def layout(
        self, q_len: int, kv_len: int | None = None, *, block: int = 64, offset: int | None = None, key_offset: int = 0
    ) -> BlockLayout:
        """Blocks to visit. kv_len: q_len if None. offset: position of query 0; None puts the last query at the last
        key, as ``attend`` does. key_offset: position of key 0. Raises: ValueError on a negative length or block < 1."""
        keys = q_len if kv_len is None else kv_len
        first = key_offset + keys - q_len if offset is None else offset
        return build_layout(self, q_len, keys, block=block, offset=first, key_offset=key_offset)

    def visible_pairs(self, q_len: int, kv_len: int | None = None) -> int:
        """Exact number of visible pairs when the last query sits at the last key; for FLOPs and density.

        >>> (causal() & sliding_window(2)).visible_pairs(4)
        7
        """
        # Blocks of about √L keep both the number of blocks and the size of a mask near L.
        block = max(16, isqrt(max(q_len, kv_len or 0)))
        return self.layout(q_len, kv_len, block=block).visible_pairs()

    def __and__(self, other: "Pattern") -> "Pattern":
        return _And(_parts(self, _And) + _parts(other, _And)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: "Pattern") -> "Pattern":
        return _Or(_parts(self, _Or) + _parts(other, _Or)) if isinstance(other, Pattern) else NotImplemented


def _parts(pattern: Pattern, kind: type) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, _And | _Or) and isinstance(pattern, kind) else (pattern,)


@dataclass(frozen=True)
class _And(Pattern):
    parts: tuple[Pattern, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_and, (part.visible(query_pos, key_pos) for part in self.parts))

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        return reduce(_intersect, (part.reach(first, last, key_end) for part in self.parts))

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return [column for part in self.parts for column in part.signature(query, key, block)]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return reduce(torch.logical_and, (part.retained(key_pos, next_query) for part in self.parts))

    @property
    def is_causal(self) -> bool:
        return any(part.is_causal for part in self.parts)

    @property
    def is_relative(self) -> bool:
        return all(part.is_relative for part in self.parts)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, _Or) else str(part) for part in self.parts)


@dataclass(frozen=True)
class _Or(Pattern):
    parts: tuple[Pattern, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_or, (part.visible(query_pos, key_pos) for part in self.parts))

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        reaches = [part.reach(first, last, key_end) for part in self.parts]
        return torch.cat([start for start, _ in reaches], 1), torch.cat([stop for _, stop in reaches], 1)

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return [column for part in self.parts for column in part.signature(query, key, block)]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return reduce(torch.logical_or, (part.retained(key_pos, next_query) for part in self.parts))

    @property
    def is_causal(self) -> bool:
        return all(part.is_causal for part in self.parts)

    @property
    def is_relative(self) -> bool:
        return all(part.is_relative for part in self.parts)

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.parts)


def _intersect(
    left: Intervals, right: tuple[Int[Tensor, "N K"], Int[Tensor, "N K"]]
) -> tuple[Int[Tensor, "N MK"], Int[Tensor, "N MK"]]:
    start = torch.maximum(left[0][:, :, None], right[0][:, None, :]).flatten(1)
    stop = torch.minimum(left[1][:, :, None], right[1][:, None, :]).flatten(1)
    return start, stop


def _everything(first: Int[Tensor, "N"], key_end: int) -> Intervals:
    return torch.zeros_like(first)[:, None], torch.full_like(first, key_end)[:, None]


@dataclass(frozen=True)
class _Full(Pattern):
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return torch.ones_like(query_pos + key_pos, dtype=torch.bool)

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        return _everything(first, key_end)

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return []

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return torch.ones_like(key_pos, dtype=torch.bool)

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return "full()"


@dataclass(frozen=True)
class _Causal(Pattern):
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return key_pos <= query_pos

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        return torch.zeros_like(last)[:, None], last[:, None] + 1

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return [(query - key).clamp(-block, block)]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return torch.ones_like(key_pos, dtype=torch.bool)

    @property
    def is_causal(self) -> bool:
        return True

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return "causal()"


@dataclass(frozen=True)
class _SlidingWindow(Pattern):
    window: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (query_pos - key_pos).abs() < self.window

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        return (first - self.window + 1)[:, None], (last + self.window)[:, None]

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return [_band_signature(query - key, self.window, block)]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return next_query - key_pos < self.window

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"sliding_window({self.window})"


def _band_signature(distance: Int[Tensor, "N"], window: int, block: int) -> Int[Tensor, "N"]:
    """Distances between block starts, with all that lie wholly inside, and wholly outside, the window made one."""
    inside = distance.abs() + block - 1 < window
    return torch.where(inside, 0, distance.clamp(-window - block, window + block))


@dataclass(frozen=True)
class _Sinks(Pattern):
    count: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (key_pos < self.count).expand(torch.broadcast_shapes(query_pos.shape, key_pos.shape))

    def reach(self, first: Int[Tensor, "N"], last: Int[Tensor, "N"], key_end: int) -> Intervals:
        return _everything(first, self.count)

    def signature(self, query: Int[Tensor, "N"], key: Int[Tensor, "N"], block: int) -> list[Int[Tensor, "N"]]:
        return [(self.count - key).clamp(0, block)]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return key_pos < self.count

    @property
    def is_causal(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"sinks({self.count})"


def full() -> Pattern:
    """Every query sees every key (the encoder's pattern)."""
    return _Full()


def causal() -> Pattern:
    """Query i sees keys j ≤ i."""
    return _Causal()


def sliding_window(window: int) -> Pattern:
    """Query i sees keys with |i - j| < window: itself and window - 1 keys on each side.

    With ``causal() &`` it is the decoder's window: exactly ``window`` keys, the query's own included.
    Child et al. 2019 (arXiv:1904.10509), Beltagy et al. 2020 (arXiv:2004.05150).
    Raises: ValueError if window < 1.
    """
    return _SlidingWindow(_at_least("window", window, 1))


def sinks(count: int) -> Pattern:
    """Every query sees the first ``count`` positions (attention sinks, Xiao et al. 2023, arXiv:2309.17453).

    It says nothing about the order: in a decoder write ``causal() & (sliding_window(w) | sinks(n))``.
    Raises: ValueError if count < 1.
    """
    return _Sinks(_at_least("count", count, 1))


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    return value
