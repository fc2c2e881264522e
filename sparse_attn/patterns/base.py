"""Which keys a query sees, as small hashable records that combine with ``&``, ``|`` and ``~``.

>>> pattern = causal() & (sliding_window(256) | sinks(4))
>>> str(pattern)
'causal() & (sliding_window(256) | sinks(4))'

A pattern is geometry over absolute positions. It knows the truth for a pair of positions (``visible``), the key
intervals a block of queries can reach, what decides the mask of a block (see ``layout``), and which cached keys a
later query can still see (``retained``). Combinations derive all four from their parts. Sizes and positions are at most
2^62; a larger one is a ValueError.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isqrt
from operator import add
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.layout import BlockLayout, build_layout, count_pairs, touched_blocks
from sparse_attn.reach import Positions, Reaches, everything, within
from sparse_attn.signature import Signature

# query blocks times keys up to which the complement of a pattern is laid out
COMPLEMENT_CELLS = 1 << 26
# largest size or position of a pattern: twice as many still are int64
LARGEST = 1 << 62
# blocks that are counted one by one, unless the pattern has no grain to go by
COUNTED = 1 << 24


class Pattern(ABC):
    """A set of (query position, key position) pairs. Combine with ``&`` (both), ``|`` (either) and ``~`` (not)."""

    @abstractmethod
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The truth for each pair of positions, broadcast."""

    @abstractmethod
    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        """What holds every key in [0, key_end) that a query in [first, last] sees (maybe more)."""

    @abstractmethod
    def signature(self, block: int) -> Signature:
        """What determines the block×block mask that starts at a query and a key."""

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        """Keys that a query at ``next_query`` or later may see; the others can be dropped from a cache."""
        return torch.ones_like(key_pos, dtype=torch.bool)

    @property
    def is_causal(self) -> bool:
        """True when no query sees a key at a later position, whatever the length."""
        return False

    def is_causal_after(self, prefix: int) -> bool:
        """True when the only later keys that a query sees are among the first ``prefix``, whatever the length."""
        return self.is_causal

    @property
    def is_relative(self) -> bool:
        """True when what is visible depends on the distance i − j alone: padding on the left then changes nothing."""
        return False

    @property
    def grain(self) -> int:
        """Positions of the blocks that the pattern is made of; 1 if it is not."""
        return 1

    def layout(
        self, q_len: int, kv_len: int | None = None, *, block: int = 64, offset: int | None = None, key_offset: int = 0
    ) -> BlockLayout:
        """Blocks to visit. kv_len: q_len if None. offset: position of query 0; None puts the last query at the last
        key, as ``attend`` does. key_offset: position of key 0. Raises: ValueError on a negative
        length or key_offset, or block < 1."""
        keys = q_len if kv_len is None else kv_len
        first = key_offset + keys - q_len if offset is None else offset
        return build_layout(self, q_len, keys, block=block, offset=first, key_offset=key_offset)

    def visible_pairs(self, q_len: int, kv_len: int | None = None) -> int:
        """Exact number of visible pairs when the last query sits at the last key; for FLOPs and density.

        >>> (causal() & sliding_window(2)).visible_pairs(4)
        7
        """
        return int(self.block_pairs(q_len, kv_len)[3].sum())

    def block_pairs(
        self, q_len: int, kv_len: int | None = None, *, most: int | None = None
    ) -> tuple[int, Positions, Positions, Positions]:
        """A size of blocks, at most ``most``, and of every block that shows anything its row, column and visible pairs.

        Blocks of about √L keep both their number and the size of a mask near L; those of a pattern that is made of
        blocks are its own, since others would differ from each other. Memory is that of the counts.
        Raises: ValueError on a negative length.
        """
        keys = q_len if kv_len is None else kv_len
        for name, length in (("q_len", q_len), ("kv_len", keys)):
            if length < 0:
                raise ValueError(f"{name} must be >= 0, got {length}")
        block = max(16, isqrt(max(q_len, keys)))
        if self.grain > 1:
            small = self.grain * -(-16 // self.grain)
            while small > block and not small % 2:
                small //= 2
            small = min(small, max(block, q_len, keys))
            while small < block and touched_blocks(self, q_len, keys, block=small, offset=keys - q_len) > COUNTED:
                small *= 2
            block = small
        block = block if most is None else min(block, most)
        return block, *count_pairs(self, q_len, keys, block=block, offset=keys - q_len)

    def __and__(self, other: "Pattern") -> "Pattern":
        return _combined(self, other, _And) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: "Pattern") -> "Pattern":
        return _combined(self, other, _Or) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> "Pattern":
        if isinstance(self, PerHead):
            return PerHead(tuple(~head for head in self.heads))
        return self.part if isinstance(self, _Not) else _Not(self)

    def density(self, q_len: int, kv_len: int | None = None) -> float:
        """Share of the pairs that are visible; 0 where there are none.

        >>> causal().density(4)
        0.625
        """
        pairs = q_len * (q_len if kv_len is None else kv_len)
        return self.visible_pairs(q_len, kv_len) / pairs if pairs else 0.0

    def flops(self, q_len: int, kv_len: int | None = None, *, head_dim: int, num_heads: int = 1) -> int:
        """Matrix FLOPs of the forward pass over the visible pairs: 4·d for each pair and head, 2·d a product."""
        return 4 * head_dim * num_heads * self.visible_pairs(q_len, kv_len)

    def plot(self, q_len: int = 64, kv_len: int | None = None, *, ax: Any = None) -> Any:
        """Draw the visible pairs (see :func:`sparse_attn.plotting.plot_pattern`); returns the matplotlib Axes."""
        from sparse_attn.plotting import plot_pattern

        return plot_pattern(self, q_len, kv_len, ax=ax)


def _combined(left: Pattern, right: Pattern, kind: "type[_And | _Or]") -> Pattern:
    """Head by head where a side has a pattern for each."""
    if isinstance(left, PerHead) or isinstance(right, PerHead):
        heads = left.heads if isinstance(left, PerHead) else ()
        others = right.heads if isinstance(right, PerHead) else (right,) * len(heads)
        heads = heads or (left,) * len(others)
        if len(heads) != len(others):
            raise ValueError(f"per_head patterns must have equally many heads, got {len(heads)} and {len(others)}")
        return PerHead(tuple(_combined(a, b, kind) for a, b in zip(heads, others, strict=True)))
    return kind(_parts(left, kind) + _parts(right, kind))


def _finest(parts: tuple[Pattern, ...]) -> int:
    return min((part.grain for part in parts if part.grain > 1), default=1)


def _parts(pattern: Pattern, kind: type) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, _And | _Or) and isinstance(pattern, kind) else (pattern,)


@dataclass(frozen=True)
class _And(Pattern):
    parts: tuple[Pattern, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_and, (part.visible(query_pos, key_pos) for part in self.parts))

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        # a complement may see anything: the other parts bound it
        parts = [part for part in self.parts if not isinstance(part, _Not)]
        reached = reduce(within, (part.reach(first, last, key_end) for part in parts or self.parts))
        if 0 < len(parts) < len(self.parts):
            _check_reached(self, reached, first, last, key_end)
        return reached

    def signature(self, block: int) -> Signature:
        return reduce(add, (part.signature(block) for part in self.parts))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return reduce(torch.logical_and, (part.retained(key_pos, next_query) for part in self.parts))

    @property
    def grain(self) -> int:
        return _finest(self.parts)

    @property
    def is_causal(self) -> bool:
        return any(part.is_causal for part in self.parts)

    def is_causal_after(self, prefix: int) -> bool:
        return any(part.is_causal_after(prefix) for part in self.parts)

    @property
    def is_relative(self) -> bool:
        return all(part.is_relative for part in self.parts)

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, _Or) else str(part) for part in self.parts)


def parts_of(pattern: Pattern) -> tuple[Pattern, ...]:
    """The members of an intersection; any other pattern alone."""
    return pattern.parts if isinstance(pattern, _And) else (pattern,)


@dataclass(frozen=True)
class _Or(Pattern):
    parts: tuple[Pattern, ...]

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(torch.logical_or, (part.visible(query_pos, key_pos) for part in self.parts))

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return tuple(reach for part in self.parts for reach in part.reach(first, last, key_end))

    def signature(self, block: int) -> Signature:
        return reduce(add, (part.signature(block) for part in self.parts))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return reduce(torch.logical_or, (part.retained(key_pos, next_query) for part in self.parts))

    @property
    def grain(self) -> int:
        return _finest(self.parts)

    @property
    def is_causal(self) -> bool:
        return all(part.is_causal for part in self.parts)

    def is_causal_after(self, prefix: int) -> bool:
        return all(part.is_causal_after(prefix) for part in self.parts)

    @property
    def is_relative(self) -> bool:
        return all(part.is_relative for part in self.parts)

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.parts)


@dataclass(frozen=True)
class _Not(Pattern):
    part: Pattern

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return ~self.part.visible(query_pos, key_pos)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        if len(first) * key_end > COMPLEMENT_CELLS:
            raise ValueError(
                f"~{self.part} looks at every block: query blocks x keys must be <= {COMPLEMENT_CELLS}"
                f" (65,536 positions in blocks of 64), got {len(first)} x {key_end}"
            )
        return everything(first, key_end)

    def signature(self, block: int) -> Signature:
        return self.part.signature(block)

    @property
    def grain(self) -> int:
        return self.part.grain

    @property
    def is_relative(self) -> bool:
        return self.part.is_relative

    def __str__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, _And | _Or) else f"~{self.part}"


@dataclass(frozen=True)
class PerHead(Pattern):
    """One pattern for each query head. As geometry it is the union: what a cache keeps, what any head may see."""

    heads: tuple[Pattern, ...]

    @property
    def union(self) -> Pattern:
        """Visible to some head."""
        distinct = tuple(dict.fromkeys(self.heads))
        return distinct[0] if len(distinct) == 1 else reduce(lambda a, b: _combined(a, b, _Or), distinct)

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Visible to some head."""
        return self.union.visible(query_pos, key_pos)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        """What some head reaches."""
        return self.union.reach(first, last, key_end)

    def signature(self, block: int) -> Signature:
        """Of the union of the heads."""
        return self.union.signature(block)

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        """What some head may still see."""
        return self.union.retained(key_pos, next_query)

    def flops(self, q_len: int, kv_len: int | None = None, *, head_dim: int, num_heads: int = 1) -> int:
        """Of all heads, each by its own pairs. Raises: ValueError unless num_heads is their number, or 1."""
        if num_heads not in (1, len(self.heads)):
            raise ValueError(f"num_heads must be {len(self.heads)}, the heads of the pattern, got {num_heads}")
        return sum(head.flops(q_len, kv_len, head_dim=head_dim) for head in self.heads)

    @property
    def grain(self) -> int:
        """The finest of the heads."""
        return _finest(self.heads)

    def keep(self, heads: Sequence[int]) -> "PerHead":
        """The pattern of these query heads alone."""
        return PerHead(tuple(self.heads[head] for head in heads))

    @property
    def is_causal(self) -> bool:
        """True when no head sees a later key."""
        return all(head.is_causal for head in self.heads)

    def is_causal_after(self, prefix: int) -> bool:
        """True when no head sees a later key past the first ``prefix``."""
        return all(head.is_causal_after(prefix) for head in self.heads)

    @property
    def is_relative(self) -> bool:
        """True when every head goes by the distance alone."""
        return all(head.is_relative for head in self.heads)

    def __str__(self) -> str:
        return f"per_head({', '.join(map(str, self.heads))})"


def per_head(*patterns: Pattern) -> Pattern:
    """Query head h sees by ``patterns[h]``. Combines head by head: ``causal() & per_head(a, b)``.

    visible_pairs, density and layout are those of the union; ``.heads`` has the parts.
    Raises: ValueError without patterns, for anything else than patterns, or where one is itself per head.

    >>> str(causal() & per_head(sliding_window(64), sinks(4)))
    'per_head(causal() & sliding_window(64), causal() & sinks(4))'
    """
    if not patterns:
        raise ValueError("per_head must get one pattern for each query head, got none")
    for pattern in patterns:
        if not isinstance(pattern, Pattern) or isinstance(pattern, PerHead):
            raise ValueError(f"per_head must get patterns that are not per head themselves, got {pattern!r}")
    return PerHead(patterns)


def _check_reached(pattern: Pattern, reached: Reaches, first: Positions, last: Positions, key_end: int) -> None:
    """Raises: ValueError where what bounds a complement leaves both too many keys and more than an eighth of all."""
    sizes = sum((reach.keys(first, last, key_end) for reach in reached), np.zeros(len(first), np.int64))
    rows, keys = len(first), int(np.minimum(sizes, key_end).sum())
    most = max(COMPLEMENT_CELLS, rows * key_end // 8)
    if keys > most:
        raise ValueError(
            f"{pattern} looks at every block that is left beside ~: the keys of all query blocks must be <= {most}"
            f" ({COMPLEMENT_CELLS}, or an eighth of {rows} x {key_end}), got {keys}: shorten it, or bound ~ by a window"
        )


def integers(name: str, values: tuple[Any, ...]) -> list[int]:
    """The integers of ``f(1, 2)``, or of ``f([1, 2])``. Raises: TypeError for anything else."""
    items = list(values[0]) if len(values) == 1 and isinstance(values[0], Iterable) else list(values)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name} must be ints, got {item!r}")
    return items


def at_least(name: str, value: int, least: int, *, most: int | None = LARGEST) -> int:
    """``value``. Raises: TypeError if it is no int, ValueError if it is below ``least`` or above ``most``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be <= {most}, got {value}")
    return value
