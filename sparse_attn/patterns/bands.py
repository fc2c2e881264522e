"""Patterns of the distance between query and key: everything, the past, windows, strides."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import clamp
from sparse_attn.patterns.base import Pattern, at_least
from sparse_attn.reach import Comb, Positions, Reach, Reaches, everything, interval
from sparse_attn.signature import Signature


@dataclass(frozen=True)
class _Full(Pattern):
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return torch.ones_like(query_pos + key_pos, dtype=torch.bool)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return everything(first, key_end)

    def signature(self, block: int) -> Signature:
        return Signature()

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return "full()"


@dataclass(frozen=True)
class _Causal(Pattern):
    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return key_pos <= query_pos

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return interval(np.zeros_like(last), last + 1)

    def signature(self, block: int) -> Signature:
        return Signature(distance=(lambda distance: clamp(distance, -block, block),))

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

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return interval(first - self.window + 1, last + self.window)

    def signature(self, block: int) -> Signature:
        return Signature(distance=(lambda distance: _in_band(distance, self.window, block),))

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return next_query - key_pos < self.window

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"sliding_window({self.window})"


@dataclass(frozen=True)
class _Dilated(Pattern):
    window: int
    dilation: int

    @property
    def _span(self) -> int:
        """Distances below this may be visible."""
        return (self.window - 1) * self.dilation + 1

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        distance = query_pos - key_pos
        return (distance.abs() < self._span) & (distance % self.dilation == 0)

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return _lattice(first, last, key_end, self.dilation, most=self.window)

    def signature(self, block: int) -> Signature:
        return Signature(
            distance=(
                lambda distance: _in_band(distance, self._span, block),
                lambda distance: _remainder(distance, self.dilation, block),
            )
        )

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        return next_query - key_pos < self._span

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"dilated({self.window}, {self.dilation})"


@dataclass(frozen=True)
class _Multiples(Pattern):
    stride: int

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (query_pos - key_pos) % self.stride == 0

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        return _lattice(first, last, key_end, self.stride)

    def signature(self, block: int) -> Signature:
        return Signature(distance=(lambda distance: _remainder(distance, self.stride, block),))

    @property
    def is_relative(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"multiples({self.stride})"


def _lattice(first: Positions, last: Positions, key_end: int, step: int, *, most: int | None = None) -> Reaches:
    """Keys of [0, key_end) at whole steps, fewer than ``most``, from a query in [first, last]: an interval, and a comb
    if the steps part."""
    if not len(first):
        return everything(first, key_end)
    count = max(int(last.max()), key_end - int(first.min()), 0) // step + 1
    count = count if most is None else min(count, most)
    farthest = (count - 1) * step
    reach = Reach((first - farthest)[:, None], (last + farthest + 1)[:, None])
    if step <= int((last - first).max()) + 1:
        return (reach,)
    shift = np.arange(1 - count, count) * step
    return (Reach(reach.start, reach.stop, (Comb(shift, shift + 1, moves=True),)),)


def _in_band(distance: Positions, window: int, block: int) -> Positions:
    """Distances between block starts, with all that lie wholly inside, and wholly outside, the window made one."""
    inside = np.abs(distance) < window - block + 1
    return np.where(inside, 0, clamp(distance, -window - block, window + block))


def _remainder(distance: Positions, step: int, block: int) -> Positions:
    """Distances between block starts by ``step``, with all between whose keys no multiple lies made one."""
    remainder = distance % step
    return np.where((remainder >= block) & (remainder <= step - block), -1, remainder)


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
    return _SlidingWindow(at_least("window", window, 1))


def dilated(window: int, dilation: int) -> Pattern:
    """Query i sees keys with i - j = m·dilation, |m| < window: a window with gaps of dilation - 1 keys.

    ``dilated(w, 1)`` sees what ``sliding_window(w)`` sees. Beltagy et al. 2020, §3.1 (arXiv:2004.05150).
    Raises: ValueError if window or dilation < 1.
    """
    at_least("window", window, 1)
    at_least("dilation", dilation, 1)
    at_least("(window - 1) * dilation", (window - 1) * dilation, 0)
    return _Dilated(window, dilation)


def multiples(stride: int) -> Pattern:
    """Query i sees keys with (i - j) mod stride = 0: its column, when positions are written in rows of ``stride``.

    The second head of the strided pattern of Child et al. 2019 (arXiv:1904.10509).
    Raises: ValueError if stride < 1.
    """
    return _Multiples(at_least("stride", stride, 1))


def strided(stride: int) -> Pattern:
    """``sliding_window(stride) | multiples(stride)``: the last ``stride`` keys, and every stride-th one before.

    Both heads of the strided pattern in one: with ``causal() &``, A¹ = {i-stride … i} and A² = {j: (i-j) mod stride
    = 0} of Child et al. 2019, §4.2 (arXiv:1904.10509). Good for data with a period, such as images.
    Raises: ValueError if stride < 1.

    >>> (causal() & strided(2)).layout(4, block=4).to_mask().int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    """
    return sliding_window(at_least("stride", stride, 1)) | multiples(stride)
