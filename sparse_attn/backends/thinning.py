"""What of a layout is cheaper by single queries and keys than by blocks, found from its visits and distinct masks.

Blocks stay what they are where they form a band: at most distances between query and key block, all rows see the same.
Elsewhere a block is taken apart where it shows little: into a few rows (global queries), a few columns (sinks, global
keys, summaries) and a rest that must be single keys at distances of one step (strides). In the band itself, what a
block shows beyond the mask that is common at its distance is taken apart alike, so that the band stays regular.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_attn.backends.thin import Places, Shown, Thin, places
from sparse_attn.layout import BlockLayout

# Share of a block's columns, and of its rows, that single keys and queries may take.
MOST_COLUMNS, MOST_ROWS = 0.75, 0.125
# A row or column counts as one of its own from this share of its entries.
HEAVY = 0.25
# Blocks a mask's rest is worth at most, in rows of single pairs.
MOST_REST = 2
# Full blocks of one column that so many query blocks see are keys that stand still.
STANDING = 8
# Heights in blocks of the lists that share a set of columns, and what each list costs beside its pairs, in blocks.
HEIGHTS, CALL, COPY = (4, 8, 16, 32), 4.0, 0.5
# Fewer keys than this do not get a call of their own.
FEW = 64
# A band this many times as large as the rest is computed by itself.
BY_FAR = 2.5
# Queries of a list of rows; entries of the largest mask; the smallest step between single keys.
ROWS, LARGEST, LEAST_STEP = 64, 1 << 24, 16


@dataclass(frozen=True, eq=False)
class _Parts:
    """Masks taken apart: each visible pair is in exactly one of rows, columns and rest. thin: by parts is cheaper."""

    rows: Bool[Tensor, "E block block"]
    columns: Bool[Tensor, "E block block"]
    rest: Bool[Tensor, "E block block"]
    thin: Bool[Tensor, "E"]


@dataclass(frozen=True, eq=False)
class _Extras:
    """Pairs that may leave the blocks: those of mask ``mask[v]`` of ``parts`` do for a visit that is ``taken``."""

    row: Int[Tensor, "V"]
    column: Int[Tensor, "V"]
    mask: Int[Tensor, "V"]
    taken: Bool[Tensor, "V"]
    parts: _Parts

    def only(self, taken: Bool[Tensor, "V"]) -> "_Extras":
        """Some of the visits."""
        return _Extras(self.row[taken], self.column[taken], self.mask[taken], taken[taken], self.parts)


@dataclass(frozen=True, eq=False)
class Division:
    """What a layout shows, each pair in exactly one part.

    regular: blocks to be walked row by row; lone: blocks beside a regular band, or None; thin: single queries and keys.
    """

    regular: BlockLayout
    lone: BlockLayout | None
    thin: tuple[Thin, ...]


def divide(layout: BlockLayout) -> Division:
    """Takes apart what is cheaper by single queries and keys, then what lies beside a band that is the larger part."""
    if not layout.visited_blocks:
        return Division(layout, None, ())
    band, mode = _band(layout)
    if bool((band & (layout.mask_index == mode)).all()):
        return Division(layout, None, ())
    extras = _extras(layout, band, mode)
    step = _step(layout, extras)
    taken = extras.taken if step else extras.taken & ~extras.parts.rest.flatten(1).any(1)[extras.mask]
    usual = torch.where(taken & band, mode, layout.mask_index)
    keep = ~(taken & ~band)
    blocks, band, regular = replace(layout, mask_index=usual), band & keep, int((band & keep & (usual == mode)).sum())
    thin = _thin(layout, extras.only(taken), step) if bool(taken.any()) else ()
    lone = int(keep.sum() - band.sum())
    if not lone or regular < BY_FAR * (int(keep.sum()) - regular):
        return Division(_keep(blocks, keep), None, thin)
    return Division(_keep(blocks, band), _keep(blocks, keep & ~band), thin)


def _extras(layout: BlockLayout, band: Bool[Tensor, "N"], mode: Int[Tensor, "N"]) -> _Extras:
    """What each visit would show by single queries and keys, and whether that is cheaper.

    In the band: what goes beyond the mask that is common at its distance. Elsewhere: all that it shows.
    """
    kind, size = layout.mask_index, len(layout.masks)
    beyond = (band & (kind != mode) & (kind >= 0) & (mode >= 0)).nonzero().flatten()
    pair, which = torch.unique(kind[beyond] * max(size, 1) + mode[beyond], return_inverse=True)
    own, common = layout.masks[pair // max(size, 1)], layout.masks[pair % max(size, 1)]
    whole = torch.ones(1, layout.block, layout.block, dtype=torch.bool)
    parts = _take_apart(torch.cat([layout.masks, own & ~common, whole]))
    parts.thin[size : size + len(pair)] &= ~(common & ~own).flatten(1).any(1)
    mask = torch.full_like(kind, -1)
    mask[beyond] = size + which
    far = ~band & (kind >= 0)
    mask[far] = kind[far]
    taken = (mask >= 0) & parts.thin[mask]
    standing = _standing(layout, ~band & (kind < 0))
    mask[standing] = size + len(pair)
    return _Extras(layout.query_block, layout.key_block, mask, taken | standing, parts)


def _thin(layout: BlockLayout, extras: _Extras, step: int) -> tuple[Thin, ...]:
    residues = _residues(layout, extras, step) if step else []
    return (*_columns(layout, extras), *_rows(layout, extras), *residues)


def _band(layout: BlockLayout) -> tuple[Bool[Tensor, "N"], Int[Tensor, "N"]]:
    """Whether at a visit's distance most query blocks see the same, and the mask that is the most common there."""
    rows, columns, kinds = layout.num_query_blocks, -(-layout.kv_len // layout.block), len(layout.masks) + 1
    distance = layout.query_block - layout.key_block + columns
    code, count = torch.unique(distance * kinds + layout.mask_index + 1, return_counts=True)
    where, total = code // kinds, rows + columns + 1
    most = torch.zeros(total, dtype=torch.long).scatter_reduce_(0, where, count, "amax")
    mode = torch.full((total,), -1)
    best = count == most[where]
    mode[where[best]] = code[best] % kinds - 1
    apart = torch.arange(total) - columns
    possible = (columns + apart).clamp(max=rows) - apart.clamp(min=0)
    common = (2 * most > possible) & (most >= 3)
    weight = torch.cat([layout.masks.flatten(1).sum(1), torch.tensor([layout.block**2])])
    thick = common & (weight[mode] * 4 >= layout.block**2)
    beside = torch.zeros_like(thick)
    beside[1:] |= thick[:-1]
    beside[:-1] |= thick[1:]
    band = thick | (common & beside)
    return band[distance], mode[distance]


def _take_apart(masks: Bool[Tensor, "E block block"]) -> _Parts:
    block = masks.shape[1]
    heavy = masks.sum(2) >= HEAVY * block
    # Where most rows see much, they do so by columns.
    heavy &= (heavy.sum(1) <= MOST_ROWS * block)[:, None]
    rows = masks & heavy[:, :, None]
    left = masks & ~rows
    height = left.any(2).sum(1)
    broad = left.sum(1) >= (HEAVY * height).clamp(min=1)[:, None]
    columns = left & broad[:, None]
    rest = left & ~columns
    thin = (columns.any(1).sum(1) <= MOST_COLUMNS * block) & (rest.flatten(1).sum(1) <= MOST_REST * block)
    return _Parts(rows, columns, rest, thin)


def _standing(layout: BlockLayout, full: Bool[Tensor, "N"]) -> Bool[Tensor, "N"]:
    """Which of these full blocks are seen by many query blocks in a row, at least a quarter of all."""
    rows, chosen = layout.num_query_blocks, full.nonzero().flatten()
    order = chosen[(layout.key_block[chosen] * rows + layout.query_block[chosen]).argsort()]
    cell = layout.key_block[order] * (rows + 1) + layout.query_block[order]
    begins = torch.ones_like(order)
    begins[1:] = cell.diff() != 1
    chain = begins.cumsum(0) - 1
    length = torch.bincount(chain)[chain] if len(chain) else chain
    found = torch.zeros_like(full)
    found[order] = (length >= STANDING) & (4 * length >= rows)
    return found


def _keep(layout: BlockLayout, keep: Bool[Tensor, "N"]) -> BlockLayout:
    """Some of the visits."""
    row_start = torch.zeros_like(layout.row_start)
    row_start[1:] = torch.bincount(layout.query_block[keep], minlength=layout.num_query_blocks).cumsum(0)
    return replace(layout, row_start=row_start, key_block=layout.key_block[keep], mask_index=layout.mask_index[keep])


def _columns(layout: BlockLayout, extras: _Extras) -> list[Thin]:
    """Lists of consecutive query blocks and the keys that any of them sees."""
    broad = extras.parts.columns.any(1)
    visit, column = broad[extras.mask].nonzero(as_tuple=True)
    key = extras.column[visit] * layout.block + column
    inside = key < layout.kv_len
    visit, column, key = visit[inside], column[inside], key[inside]
    if not len(visit):
        return []
    row, mask = extras.row[visit], extras.mask[visit]
    height = _height(layout, row, key)
    group = row // height
    order = group.argsort(stable=True)
    by_query = extras.parts.columns.transpose(1, 2)
    found = []
    for some in order.split(torch.bincount(group)[group.unique()].tolist()):
        first, last = int(row[some].min()), int(row[some].max())
        keys, place = torch.unique(key[some], return_inverse=True)
        seen = torch.zeros(last - first + 1, len(keys), layout.block, dtype=torch.bool)
        seen[row[some] - first, place] = by_query[mask[some], column[some]]
        queries = torch.arange(first * layout.block, min((last + 1) * layout.block, layout.q_len))
        found.append(Thin(places(queries[None]), _shown(keys, seen.transpose(1, 2).flatten(0, 1)[: len(queries)])))
    return found


def _height(layout: BlockLayout, row: Int[Tensor, "V"], key: Int[Tensor, "V"]) -> int:
    """Query blocks to a list: the cheapest, in blocks computed, copied and called."""

    def cost(height: int) -> float:
        width = torch.bincount(torch.unique(row // height * layout.kv_len + key) // layout.kv_len)
        if int(width.max()) * height * layout.block > LARGEST:
            return float("inf")
        return float((width * (height + COPY) / layout.block + CALL * (width > 0)).sum())

    return min((*HEIGHTS, max(layout.num_query_blocks, 1)), key=cost)


def _rows(layout: BlockLayout, extras: _Extras) -> list[Thin]:
    """Lists of single queries and all keys that any of them sees."""
    heavy = extras.parts.rows.any(2)
    visit, within = heavy[extras.mask].nonzero(as_tuple=True)
    queries, place = torch.unique(extras.row[visit] * layout.block + within, return_inverse=True)
    found = []
    for start in range(0, len(queries), ROWS):
        some = ((place >= start) & (place < start + ROWS)).nonzero().flatten()
        chosen = queries[start : start + ROWS]
        blocks, where = torch.unique(extras.column[visit[some]], return_inverse=True)
        seen = torch.zeros(len(chosen), len(blocks), layout.block, dtype=torch.bool)
        seen[place[some] - start, where] = extras.parts.rows[extras.mask[visit[some]], within[some]]
        seen = seen.flatten(1)
        keys = (blocks[:, None] * layout.block + torch.arange(layout.block)).flatten()
        any_sees = seen.any(0)
        mask = seen[:, any_sees]
        shown = Shown(places(keys[any_sees][None]), None if bool(mask.all()) else mask[None])
        found.append(Thin(places(chosen[None]), (shown,)))
    return found


def _shown(keys: Int[Tensor, "n"], seen: Bool[Tensor, "m n"]) -> tuple[Shown, ...]:
    """The keys that all queries see apart from those that need a mask, where they are worth a call of their own."""
    everyone = seen.all(0)
    if not bool(everyone.all()) and int(everyone.sum()) < FEW:
        everyone = torch.zeros_like(everyone)
    shown = [Shown(places(keys[everyone][None]), None)] if bool(everyone.any()) else []
    if not bool(everyone.all()):
        shown.append(Shown(places(keys[~everyone][None]), seen[None, :, ~everyone]))
    return tuple(shown)


def _step(layout: BlockLayout, extras: _Extras) -> int:
    """The greatest step such that all pairs of the rests lie at distances of one remainder; 0 if it does not pay."""
    rest = extras.parts.rest
    has_rest = extras.taken & rest.flatten(1).any(1)[extras.mask]
    if not bool(has_rest.any()):
        return 0
    apart = _distances(layout, extras, has_rest)
    step = int(np.gcd.reduce((apart - apart[0]).numpy()))
    if step < LEAST_STEP or layout.q_len < step:
        return 0
    pairs = -(-layout.q_len // step) * -(-layout.kv_len // step)
    cost = step * (CALL / 16 + CALL * pairs / layout.block**2)
    return step if cost < int(has_rest.sum()) and step * pairs <= LARGEST else 0


def _distances(layout: BlockLayout, extras: _Extras, chosen: Bool[Tensor, "V"]) -> Int[Tensor, "P"]:
    """Every i - j that occurs in the rests of these visits."""
    block, size = layout.block, len(extras.parts.rest)
    mask, query, key = extras.parts.rest.nonzero(as_tuple=True)
    diagonals = torch.zeros(size, 2 * block, dtype=torch.bool)
    diagonals[mask, query - key + block] = True
    where = torch.unique((extras.row - extras.column)[chosen] * size + extras.mask[chosen])
    visit, diagonal = diagonals[where % size].nonzero(as_tuple=True)
    return where.div(size, rounding_mode="floor")[visit] * block + diagonal - block


def _residues(layout: BlockLayout, extras: _Extras, step: int) -> list[Thin]:
    """A list for each remainder of the query's place by ``step``: its queries, and the keys that they share."""
    visit, query, key = extras.parts.rest[extras.mask].nonzero(as_tuple=True)
    query, key = query + extras.row[visit] * layout.block, key + extras.column[visit] * layout.block
    shift = int(query[0] - key[0])
    lists = torch.arange(step)
    others = (lists - shift) % step
    height, width = -(-layout.q_len // step), -(-layout.kv_len // step)
    seen = torch.zeros(step, height, width, dtype=torch.bool)
    seen[query % step, query // step, key // step] = True
    # Lists of equal lengths side by side.
    code = (layout.q_len - 1 - lists) // step * (width + 1) + (layout.kv_len - 1 - others) // step
    found = []
    for one in code.unique().tolist():
        some = (code == one).nonzero().flatten()
        rows, columns = one // (width + 1) + 1, one % (width + 1) + 1
        if not rows or not columns:
            continue
        mask = seen[some, :rows, :columns]
        mask = mask[:1] if bool((mask == mask[:1]).all()) else mask
        queries = places(some[:, None] + step * torch.arange(rows))
        found.append(Thin(queries, (Shown(_places_of(others[some], step, columns), mask),)))
    return found


def _places_of(first: Int[Tensor, "R"], step: int, length: int) -> Places:
    return places(first[:, None] + step * torch.arange(length))
