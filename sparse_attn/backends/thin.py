"""Single queries against single keys: what few columns, few rows or a far diagonal of a block need, and no more.

A layout's block that shows one key of 64 would be computed for the other 63 in vain. Such pairs are attended here by
lists of queries and keys (``Thin``), and merged by their log-sum-exp into what the blocks gave.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sparse_attn.arrays import tensor


@dataclass(frozen=True, eq=False)
class Places:
    """R lists of n queries or keys, all different. grid = (first, across, step) where entry (r, j) is first + across·r
    + step·j, so that they are a view; None where they must be copied."""

    index: Int[Tensor, "R n"]
    grid: tuple[int, int, int] | None

    def read(self, x: Shaped[Tensor, "h S d"]) -> Shaped[Tensor, "h R n d"]:
        """Those rows of x: a view if they are a grid."""
        if self.grid is None:
            return x.index_select(1, self.index.flatten().to(x.device)).unflatten(1, self.index.shape)
        first, across, step = self.grid
        head, row, column = x.stride()
        size = (x.shape[0], *self.index.shape, x.shape[2])
        return x.as_strided(size, (head, across * row, step * row, column), x.storage_offset() + first * row)

    def write(self, x: Shaped[Tensor, "h S d"], value: Shaped[Tensor, "h R n d"]) -> None:
        """Store rows; a view of x that ``read`` gave is stored already."""
        if self.grid is not None:
            place = self.read(x)
            if value.data_ptr() != place.data_ptr():
                place.copy_(value)
            return
        x.index_copy_(1, self.index.flatten().to(x.device), value.flatten(1, 2).to(x.dtype))

    def add(self, x: Float[Tensor, "h S d"], value: Float[Tensor, "h R n d"]) -> None:
        """Add to rows."""
        if self.grid is not None:
            self.read(x).add_(value)
            return
        x.index_add_(1, self.index.flatten().to(x.device), value.flatten(1, 2).to(x.dtype))


def places(index: Int[np.ndarray, "R n"]) -> Places:
    """The lists, as a grid if they are one."""
    lists, length = index.shape
    first = int(index[0, 0])
    across = int(index[1, 0]) - first if lists > 1 else 0
    step = int(index[0, 1]) - first if length > 1 else 1
    grid = (first + across * np.arange(lists))[:, None] + step * np.arange(length)
    regular = across >= 0 and step > 0 and np.array_equal(grid, index)
    return Places(tensor(index), (first, across, step) if regular else None)


@dataclass(frozen=True, eq=False)
class Shown:
    """Keys of each list and which of them each query sees: r is R, or 1 where all lists are alike; None: all."""

    keys: Places
    seen: Bool[Tensor, "r m n"] | None


@dataclass(frozen=True, eq=False)
class Thin:
    """R lists of m queries that see single keys beside what the blocks show them."""

    queries: Places
    shown: tuple[Shown, ...]

    @property
    def pairs(self) -> int:
        """Scores that one head computes at most at once."""
        return self.queries.index.numel() * max(shown.keys.index.shape[1] for shown in self.shown)


@dataclass(frozen=True, eq=False)
class ThinTile:
    """Some keys of a thin piece."""

    piece: "ThinPiece"
    shown: Shown

    @property
    def batches(self) -> int:
        """b: products side by side."""
        return (self.piece.heads.stop - self.piece.heads.start) * len(self.shown.keys.index)

    def keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "b N d"]:
        """The keys of each list."""
        return self.wide_keys(x).flatten(0, 1)

    def wide_keys(self, x: Shaped[Tensor, "B Hkv S d"]) -> Shaped[Tensor, "h R N d"]:
        """The keys of each list: a view if they are a grid."""
        return self.shown.keys.read(x[self.piece.batch, self.piece.heads])

    def add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "b N d"]) -> None:
        """Add what each list contributes to its keys."""
        self.wide_add(x, value.unflatten(0, (-1, len(self.shown.keys.index))))

    def wide_add(self, x: Float[Tensor, "B Hkv S d"], value: Float[Tensor, "h R N d"]) -> None:
        """Add what each list contributes to its keys."""
        self.shown.keys.add(x[self.piece.batch, self.piece.heads], value)

    def wide_bias(self, bias: Float[Tensor, "U block block"], groups: int) -> Float[Tensor, "r 1 M N"] | None:
        """The mask of each list, to be added to its scores; None if all see all their keys."""
        if self.shown.seen is None:
            return None
        seen = self.shown.seen.to(bias.device)
        laid = bias.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return laid.repeat(1, groups, 1)[:, None]

    def hide(self, scores: Float[Tensor, "b M N"], bias: Float[Tensor, "U block block"], groups: int) -> None:
        """Put -inf where a pair is hidden."""
        if self.shown.seen is None:
            return
        lists, queries = self.piece.thin.queries.index.shape
        shaped = scores.view(-1, lists, groups, queries, scores.shape[-1])
        shaped.masked_fill_(~self.shown.seen.to(scores.device)[:, None], -torch.inf)

    def distance(self, offset: int, like: Tensor) -> Float[Tensor, "R m N"]:
        """|i - j| of each pair."""
        query = self.piece.thin.queries.index + offset
        return (query[:, :, None] - self.shown.keys.index[:, None]).abs().to(like)


@dataclass(frozen=True, eq=False)
class ThinPiece:
    """A thin part for the key heads ``heads`` of one sequence: ``number`` in its plan."""

    thin: Thin
    number: int
    batch: int
    heads: slice
    # Its queries have seen other keys before: results are merged, gradients added.
    late: bool = True

    @property
    def place(self) -> tuple[int, ...]:
        """Tells this piece from all others of a plan."""
        return self.batch, self.heads.start, 3, self.number, 0

    @property
    def height(self) -> int:
        """Queries of one head to a product."""
        return self.thin.queries.index.shape[1]

    @property
    def width(self) -> int:
        """Keys that each query reads, or queries that share them where those are fewer."""
        return min(self.thin.queries.index.shape[1], sum(shown.keys.index.shape[1] for shown in self.thin.shown))

    def tiles(self, groups: int) -> list[ThinTile]:
        """One for each set of keys."""
        return [ThinTile(self, shown) for shown in self.thin.shown]

    def queries(self, x: Float[Tensor, "B H L d"], groups: int) -> Float[Tensor, "h R G m d"]:
        """The piece's queries, or anything laid out like them."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        return self.thin.queries.read(x[self.batch, heads]).unflatten(0, (-1, groups)).transpose(1, 2)

    def write(self, x: Float[Tensor, "B H L d"], value: Float[Tensor, "h R M d"], groups: int) -> None:
        """Store one row for each query of the piece."""
        heads = slice(self.heads.start * groups, self.heads.stop * groups)
        by_head = value.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
        self.thin.queries.write(x[self.batch, heads], by_head)
