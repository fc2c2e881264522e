"""A block selection turned round: for each key block the queries that chose it, in chunks of equal size.

Equal chunks make the products of many key blocks one batched product. Pairs of a query and a block all of whose keys
it sees are kept apart from those that need a mask: the block that the query itself stands in, a ragged last block, a
block with padding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.selection.record import BlockSelection

# Rows of a chunk are a multiple of it where a block was chosen so often: other products are slower.
ROWS = 64


@dataclass(frozen=True, eq=False)
class Chunks:
    """c chunks of m queries for one key block each, ascending in the block.

    queries: rows of queries, the number of all queries where a place in the chunk is empty. first: each block's first
    chunk. slots: for each query and choice its place chunk · m + row, -1 where the choice is not among these pairs.
    """

    queries: Int[Tensor, "c m"]
    blocks: Int[Tensor, "c"]
    first: Int[Tensor, "pC"]
    slots: Int[Tensor, "pL n"]


@dataclass(frozen=True, eq=False)
class Visits:
    """The pairs of p sequences and key heads: number i of them has queries i·L … and blocks i·C ….

    whole: pairs that see every key of the block. partial: those that do not see the keys behind ``limit`` (each
    query's last visible position; one more for an empty place) and the keys that ``real`` denies.
    """

    whole: Chunks
    partial: Chunks
    limit: Int[Tensor, "pL_1"]
    real: Bool[Tensor, "pC block"] | None
    columns: int
    block: int

    def hidden(self, queries: Int[Tensor, "c m"], blocks: Int[Tensor, "c"]) -> Bool[Tensor, "c m 1 block"]:
        """Whether a key of a chunk's block is hidden from its queries."""
        keys = (blocks % self.columns * self.block)[:, None] + torch.arange(self.block, device=blocks.device)
        behind = keys[:, None] > self.limit[queries][..., None]
        return (behind if self.real is None else behind | ~self.real[blocks][:, None]).unsqueeze(2)


def turn_round(selection: BlockSelection, places: slice, key_mask: Bool[Tensor, "B S"] | None = None) -> Visits:
    """The visits of some of the B · Hkv sequences and key heads. Pairs that see no key at all are left out."""
    size, keys = selection.block, selection.kv_len
    # long: a narrow type that holds the blocks' numbers need not hold their keys'
    blocks = selection.blocks.flatten(0, 1)[places].long()
    count, length, _ = blocks.shape
    columns = -(-keys // size)
    at = torch.arange(length, device=blocks.device) + selection.offset
    limit = at.clamp(max=keys - 1) if selection.causal else torch.full_like(at, keys - 1)
    real = None if key_mask is None else _real(selection, key_mask)[places].flatten(0, 1)
    row = (blocks + columns * torch.arange(count, device=blocks.device)[:, None, None]).where(blocks >= 0, 0)
    if real is None:
        start = blocks * size
        seen, end = (blocks >= 0) & (start <= limit[:, None]), start + size - 1
    else:
        opening, complete = _seen_from(real, columns, keys)
        seen, end = (blocks >= 0) & (opening[row] <= limit[:, None]), complete[row]
    whole = seen & (end <= limit[:, None])
    return Visits(
        _chunks(row, whole, count * columns),
        _chunks(row, seen & ~whole, count * columns),
        # an empty place sees all, so that nothing there is infinite
        torch.cat([limit.repeat(count), limit.new_full((1,), keys)]),
        real,
        columns,
        size,
    )


def _real(selection: BlockSelection, key_mask: Bool[Tensor, "B S"]) -> Bool[Tensor, "P C block"]:
    """The mask in blocks, False beyond the last key."""
    by_block = pad(key_mask, (0, -key_mask.shape[1] % selection.block)).unflatten(1, (-1, selection.block))
    return by_block.repeat_interleave(selection.blocks.shape[1], 0)


def _seen_from(real: Bool[Tensor, "pC block"], columns: int, keys: int) -> tuple[Tensor, Tensor]:
    """Each block's first real key, and its last key; S where it has none, or not only real ones."""
    start = torch.arange(len(real), device=real.device) % columns * real.shape[1]
    opening = (start + real.byte().argmax(1)).where(real.any(1), keys)
    return opening, (start + real.shape[1] - 1).where(real.all(1), keys)


def _chunks(row: Int[Tensor, "p L n"], taken: Bool[Tensor, "p L n"], count: int) -> Chunks:
    """The chunks of the taken pairs; row: the block of each, of ``count``."""
    places, length, width = row.shape
    pair = taken.flatten().nonzero().squeeze(1)
    key, order = row.flatten()[pair].int().sort(stable=True)
    pair = pair[order]
    found = torch.bincount(key, minlength=count)
    rows = _rows(found)
    each = (found + (rows - 1)) // rows
    first = each.cumsum(0) - each
    slot = torch.arange(len(pair), device=row.device) + (first * rows - (found.cumsum(0) - found))[key]
    blocks = torch.repeat_interleave(torch.arange(count, device=row.device), each)
    queries = torch.full((len(blocks) * rows,), places * length, dtype=torch.int32, device=row.device)
    queries[slot] = (pair // max(width, 1)).int()
    slots = torch.full((places * length * width,), -1, dtype=torch.int32, device=row.device)
    slots[pair] = slot.int()
    return Chunks(queries.view(-1, rows), blocks, first, slots.view(places * length, width))


def _rows(found: Int[Tensor, "pC"]) -> int:
    """A quarter of the queries that a block has on average, in whole ROWS: about an eighth of the places is empty."""
    chosen = int((found > 0).sum())
    if not chosen:
        return 1
    average = int(found.sum()) // chosen
    return min(int(found.max()), -(-average // 4 // ROWS) * ROWS or ROWS)
