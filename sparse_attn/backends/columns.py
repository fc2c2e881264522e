"""Lists of consecutive query blocks and the single keys that any of them sees: sinks, global keys, summaries."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64
from torch import Tensor

from sparse_attn.arrays import all_of, any_of, distinct, tensor
from sparse_attn.backends.parts import Extras
from sparse_attn.backends.thin import Shown, Thin, places
from sparse_attn.layout import BlockLayout

# Heights in blocks of the lists that share a set of columns, and what each list costs beside its pairs, in blocks.
HEIGHTS, CALL, COPY = (4, 8, 16, 32), 4.0, 0.5
# Fewer keys than this do not get a call of their own.
FEW = 64
# Entries of the largest mask.
LARGEST = 1 << 24


@dataclass(frozen=True, eq=False)
class _Cells:
    """Which columns of key block ``column[c]`` list ``group[c]`` reads, in bits; sorted by list, then key block."""

    group: Int[np.ndarray, "C"]
    column: Int[np.ndarray, "C"]
    bits: UInt64[np.ndarray, "C words"]

    def shown(self, block: int) -> Bool[np.ndarray, "C block"]:
        """The bits apart."""
        return np.unpackbits(self.bits.view(np.uint8), axis=1, count=block).view(bool)

    def merged(self, group: Int[np.ndarray, "C"], columns: int) -> "_Cells":
        """The cells of lists that are merged to ``group``, of at most ``columns`` key blocks."""
        cell, which = distinct(group * columns + self.column, (int(group[-1]) + 1) * columns)
        bits = np.zeros((self.bits.shape[1], len(cell)), np.uint64)
        for some, given in zip(bits, self.bits.T, strict=True):
            np.bitwise_or.at(some, which, given)
        return _Cells(cell // columns, cell % columns, np.ascontiguousarray(bits.T))


def thin_columns(layout: BlockLayout, extras: Extras) -> list[Thin]:
    """Lists of as many query blocks as is cheapest, and the keys that any of them sees by columns."""
    broad = any_of(extras.parts.columns, 1)
    some = any_of(broad, 1)[extras.mask]
    if not some.any():
        return []
    extras, block = extras.only(some), layout.block
    bits = _bits(broad)[extras.mask]
    over = layout.kv_len % block
    if over:
        bits[extras.column == layout.kv_len // block] &= _bits(np.arange(block)[None] < over)
    height, cells = _cheapest(layout, _Cells(extras.row, extras.column, bits))
    group = extras.row // height
    seen, shown = _Seen(layout, extras), cells.shown(block)
    found = []
    for one in np.unique(group).tolist():
        visits, mine = (slice(*np.searchsorted(x, (one, one + 1)).tolist()) for x in (group, cells.group))
        found.append(seen.listed(visits, cells.column[mine], shown[mine]))
    return found


def _bits(shown: Bool[np.ndarray, "n block"]) -> UInt64[np.ndarray, "n words"]:
    packed = np.packbits(shown, axis=1)
    padded = np.zeros((len(packed), -(-packed.shape[1] // 8) * 8), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view(np.uint64)


def _cheapest(layout: BlockLayout, visits: _Cells) -> tuple[int, _Cells]:
    """Query blocks to a list, in blocks computed, copied and called, and the cells of such lists."""
    columns, before, cells = -(-layout.kv_len // layout.block), 1, visits
    least, best = float("inf"), (1, visits)
    for height in (*HEIGHTS, max(layout.num_query_blocks, 1)):
        cells, before = cells.merged(cells.group * before // height, columns), height
        width = np.bincount(cells.group, cells.shown(layout.block).sum(1))
        cost = float((width * (height + COPY) / layout.block + CALL * (width > 0)).sum())
        fits = width.max() * height * layout.block <= LARGEST or height == HEIGHTS[0]
        if cost < least and fits:
            least, best = cost, (height, cells)
    return best


class _Seen:
    """What the queries of a list see, looked up by the masks of its visits."""

    def __init__(self, layout: BlockLayout, extras: Extras) -> None:
        self.layout, self.extras = layout, extras
        columns = extras.parts.columns
        self.hidden = len(columns)
        self.columns = np.concatenate([columns, np.zeros_like(columns[:1])])
        # Columns that all queries of a block see; those of the last block where it is cut.
        self.whole = all_of(self.columns, 1)
        self.masks: dict[tuple[bytes, bytes], Tensor] = {}
        self.cut = all_of(self.columns[:, : layout.q_len % layout.block or layout.block], 1)

    def listed(self, visits: slice, blocks: Int[np.ndarray, "C"], union: Bool[np.ndarray, "C block"]) -> Thin:
        """The list of these visits, whose key blocks show the columns of ``union``."""
        size, row = self.layout.block, self.extras.row[visits]
        first, last = int(row[0]), int(row[-1])
        kind = np.full((last - first + 1, len(blocks)), self.hidden)
        kind[row - first, np.searchsorted(blocks, self.extras.column[visits])] = self.extras.mask[visits]
        everyone = union & all_of(self.whole[kind[:-1]], 0)
        everyone &= (self.cut if last == self.layout.num_query_blocks - 1 else self.whole)[kind[-1]]
        if everyone.sum() < FEW and not np.array_equal(everyone, union):
            everyone[:] = False
        queries = np.arange(first * size, min((last + 1) * size, self.layout.q_len))
        keys = blocks[:, None] * size + np.arange(size)
        shown = [Shown(places(keys[everyone][None]), None)] if everyone.any() else []
        rest = union & ~everyone
        if rest.any():
            shown.append(Shown(places(keys[rest][None]), self._mask(kind, rest)[None, : len(queries)]))
        return Thin(places(queries[None]), tuple(shown))

    def _mask(self, kind: Int[np.ndarray, "R C"], chosen: Bool[np.ndarray, "C block"]) -> Bool[Tensor, "m n"]:
        """The truth for all queries of these visits and the chosen columns; lists that see alike share it."""
        blocks, columns = any_of(chosen, 1), any_of(chosen, 0)
        key = (kind[:, blocks].tobytes(), chosen[blocks].tobytes())
        if key not in self.masks:
            self.masks[key] = tensor(self._laid(kind[:, blocks], chosen[blocks], columns))
        return self.masks[key]

    def _laid(
        self, kind: Int[np.ndarray, "R C"], chosen: Bool[np.ndarray, "C block"], columns: Bool[np.ndarray, "block"]
    ) -> Bool[np.ndarray, "m n"]:
        seen = self.columns[:, :, columns][kind].transpose(0, 2, 1, 3)
        seen = seen.reshape(seen.shape[0] * seen.shape[1], -1)
        some = chosen[:, columns].ravel()
        return seen if some.all() else seen[:, some]
