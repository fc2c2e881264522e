"""Patterns of whole blocks: any table of blocks, blocks at random, BigBird."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.arrays import distinct, tensor
from sparse_attn.patterns.bands import sliding_window
from sparse_attn.patterns.base import Pattern, at_least, integers
from sparse_attn.patterns.tokens import global_tokens
from sparse_attn.reach import Positions, Reach, Reaches, interval
from sparse_attn.signature import Meeting, Sides, Signature, crossing

# Choices of a row up to which each is compared with every key.
SCANNED = 32
# Draws that are worked on together.
DRAWN = 1 << 20


class _Blocks(Pattern):
    """Query block r, ``size`` positions tall, sees the key blocks ``chosen(r)``."""

    size: int

    @property
    def grain(self) -> int:
        return self.size

    def chosen(self, row: Positions) -> Int[np.ndarray, "N C"]:
        """Key blocks of these query blocks; -1 fills up."""
        raise NotImplementedError

    def visible(self, query_pos: Int[Tensor, "..."], key_pos: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        rows, place = torch.unique(query_pos // self.size, return_inverse=True)
        seen, key_block = tensor(self.chosen(rows.cpu().numpy())).to(rows.device), key_pos // self.size
        result = torch.zeros(
            torch.broadcast_shapes(query_pos.shape, key_pos.shape), dtype=torch.bool, device=key_pos.device
        )
        # -1 stands for no choice
        key_block = torch.where(key_block < 0, -2, key_block)
        if seen.shape[1] > SCANNED:
            return _listed(seen, place, key_block).expand(result.shape)
        for choice in seen.unbind(1):
            result |= choice[place] == key_block
        return result

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        found = np.concatenate([self.chosen(rows) for rows in self._touched(first, last)], 1)
        start = found * self.size
        return (Reach(start, np.where(found < 0, start, start + self.size)),)

    def signature(self, block: int) -> Signature:
        def side(start: Positions) -> Sides:
            return (start,)

        def meet(query: Sides, key: Sides) -> list[Positions]:
            (query_start,), (key_start,) = query, key
            found = [crossing(query_start, self.size, block), crossing(key_start, self.size, block)]
            columns = self._touched(key_start, key_start + block - 1)
            for row in self._touched(query_start, query_start + block - 1):
                found += self._shown(row, columns)
            return found

        return Signature(meeting=(Meeting(side, meet, by_piece=False),))

    def _touched(self, first: Positions, last: Positions) -> list[Positions]:
        """The first, second, … own block that each stretch of positions touches; some may lie behind its end."""
        most = int((last // self.size - first // self.size).max()) + 1 if len(first) else 1
        return [first // self.size + shift for shift in range(most)]

    def _shown(self, row: Positions, columns: list[Positions]) -> list[Int[np.ndarray, "N"]]:
        """1 where row[n] sees columns[m][n], for each m; 0 elsewhere."""
        if not len(row):
            return columns
        least = int(row.min())
        values, place = distinct(row - least, int(row.max()) - least + 1)
        seen, span = self.chosen(values + least), max(int(column.max()) for column in columns) + 2
        # each row's choices behind those of the row before; what is no choice, or lies behind all columns, comes last
        inside = np.where((seen >= 0) & (seen < span), seen, span - 1)
        listed = np.append(np.sort(inside + np.arange(len(values))[:, None] * span, 1).ravel(), -1)
        codes = [place * span + column for column in columns]
        return [(listed[np.searchsorted(listed[:-1], code)] == code).astype(np.int64) for code in codes]


@dataclass(frozen=True)
class _BlockSparse(_Blocks):
    rows: tuple[tuple[int, ...], ...]
    size: int

    def chosen(self, row: Positions) -> Int[np.ndarray, "N C"]:
        width = max((len(r) for r in self.rows), default=0)
        table = [list(r) + [-1] * (width - len(r)) for r in self.rows] + [[-1] * width]
        inside = (row >= 0) & (row < len(self.rows))
        filled = np.array(table, np.int64).reshape(len(table), width)
        return filled[np.where(inside, row, len(self.rows))]

    def retained(self, key_pos: Int[Tensor, "S"], next_query: int) -> Bool[Tensor, "S"]:
        ahead = {block for row in self.rows[max(next_query, 0) // self.size :] for block in row}
        return torch.isin(key_pos // self.size, torch.tensor(sorted(ahead), dtype=torch.long, device=key_pos.device))

    def __str__(self) -> str:
        return f"block_sparse([{', '.join(str(list(row)) for row in self.rows)}], {self.size})"


@dataclass(frozen=True)
class _RandomBlocks(_Blocks):
    count: int
    size: int
    seed: int
    length: int | None

    def chosen(self, row: Positions) -> Int[np.ndarray, "N C"]:
        open_blocks = self._open(row)
        width = min(self.count, int(open_blocks.max(initial=0)))
        every = np.arange(width)
        found = np.where(every < open_blocks[:, None], every, -1)
        (choosing,) = (open_blocks > width).nonzero()
        step = max(1, DRAWN // max(1, width))
        for part in np.split(choosing, range(step, len(choosing), step)):
            # the c-th choice is uniform over the blocks that the earlier ones left: sampling without replacement
            pick = _hashed(self.seed, row[part], width) % (open_blocks[part, None] - every)
            found[part] = _without_replacement(pick)
        return found

    def reach(self, first: Positions, last: Positions, key_end: int) -> Reaches:
        open_blocks = self._open(last // self.size)
        if int(open_blocks.max(initial=0)) > self.count:
            return super().reach(first, last, key_end)
        return interval(np.zeros_like(last), open_blocks * self.size)

    def _open(self, row: Positions) -> Positions:
        """The blocks that a row draws from are those before this one."""
        open_blocks = row + 1 if self.length is None else np.full_like(row, -(-self.length // self.size))
        return np.where(row < 0, 0, open_blocks)

    def __str__(self) -> str:
        length = "" if self.length is None else f", {self.length}"
        return f"random_blocks({self.count}, {self.size}, {self.seed}{length})"


def _without_replacement(pick: Int[np.ndarray, "N C"]) -> Int[np.ndarray, "N C"]:
    """What is taken where the c-th draw takes number pick[n, c] of what the earlier ones left; ascending.

    Draws are merged two by two, then four by four, …: to the later half, number k is number k + j of all, where j of
    the earlier half lie at or before it. These are the elements s_i, ascending, with s_i - i <= k.
    """
    rows, width = pick.shape
    none = (1 << 62) - 1
    found = np.full((rows, 1 << max(width - 1, 0).bit_length(), 1), none)
    found[:, :width, 0] = pick
    while found.shape[1] > 1:
        earlier, later = found[:, ::2], found[:, 1::2]
        shifted = np.where(earlier == none, none, earlier - np.arange(earlier.shape[2]))
        # of equal numbers the earlier half first
        merged = np.sort(np.concatenate([shifted << 1, later << 1 | 1], 2), axis=2)
        of_earlier = ~merged & 1
        found = np.minimum((merged >> 1) + of_earlier.cumsum(2) - of_earlier, none)
    return found[:, 0, :width]


def _listed(seen: Int[Tensor, "R C"], place: Int[Tensor, "..."], key_block: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Whether seen[place] holds the key block, by searching: for many choices."""
    keys, column = torch.unique(key_block, return_inverse=True)
    found = torch.searchsorted(keys, seen).clamp(max=max(len(keys) - 1, 0))
    code = torch.arange(len(seen), device=seen.device)[:, None] * len(keys) + found
    listed = code[keys[found] == seen].sort().values if len(keys) else code.flatten()[:0]
    return torch.isin(place * len(keys) + column, listed)


def _hashed(seed: int, row: Positions, draws: int) -> Int[np.ndarray, "N C"]:
    """63 bits for each row and draw, from the finaliser of SplitMix64 (Steele et al. 2014): the same on every device
    and in every process."""
    x = (row[:, None] * 0x1000003 + np.arange(draws)) ^ (seed * 0x5851F42D4C957F2D + 0x14057B7EF767814F) % (1 << 62)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # an arithmetic shift would copy the sign
        x = (x ^ (x >> shift & (1 << (64 - shift)) - 1)) * factor
    return x & (1 << 63) - 1


def block_sparse(rows: Sequence[Iterable[int]], block: int = 64) -> Pattern:
    """Query block r sees the key blocks ``rows[r]``, blocks of ``block`` positions; rows beyond the table see nothing.

    Any layout: ``block_sparse([[0], [0, 1], [2]], 16)``. Raises: ValueError for a negative block or block < 1.
    """
    table = tuple(tuple(sorted(set(integers("rows", (row,))))) for row in rows)
    at_least("block", block, 1)
    for row in table:
        if row:
            at_least("rows", row[0], 0)
            at_least("(rows + 1) * block", (row[-1] + 1) * block, 1)
    return _BlockSparse(table, block)


def random_blocks(
    count: int,
    block: int = 64,
    seed: int = 0,
    length: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Pattern:
    """Each query block sees ``count`` key blocks drawn without replacement, blocks of ``block`` positions.

    The draw is a function of (seed, query block): the same in training, evaluation and decoding, in every process.
    length: draw from all blocks of a sequence of this length; None: from the query's own block and earlier ones, all
    that a causal model can use. generator: draws the seed. A block with fewer to choose from sees them all.
    Zaheer et al. 2020 (arXiv:2007.14062). Raises: ValueError if count, block or length < 1 or seed < 0.
    """
    if generator is not None:
        seed = int(torch.randint(1 << 31, (), generator=generator))
    if length is not None:
        at_least("length", length, 1)
    return _RandomBlocks(
        at_least("count", count, 1), at_least("block", block, 1), at_least("seed", seed, 0, most=None), length
    )  # fmt: skip


def bigbird(
    window: int,
    num_global: int,
    num_random: int,
    block: int = 64,
    seed: int = 0,
    length: int | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Pattern:
    """``sliding_window(window) | global_tokens(0 … num_global - 1) | random_blocks(num_random, block, seed, length)``.

    Zaheer et al. 2020 (arXiv:2007.14062), the internal transformer construction: some of the first tokens are global.
    A random block may be one that the window or a global token shows as well; the authors' code draws among the others.
    num_global or num_random of 0 leaves that part out. seed, length, generator: of :func:`random_blocks`.
    Raises: ValueError for sizes out of range.
    """
    pattern = sliding_window(window)
    if at_least("num_global", num_global, 0):
        pattern = pattern | global_tokens(range(num_global))
    if at_least("num_random", num_random, 0):
        pattern = pattern | random_blocks(num_random, block, seed, length, generator=generator)
    return pattern
