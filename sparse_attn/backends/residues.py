"""Single pairs at distances of one remainder by a step: a list for each remainder of the query's place (strides)."""

import numpy as np
from jaxtyping import Bool, Int

from sparse_attn.arrays import any_of, occurring, spans, starts, tensor
from sparse_attn.backends.parts import Extras
from sparse_attn.backends.thin import Shown, Thin, places
from sparse_attn.layout import BlockLayout

# What a list costs beside its pairs, in blocks; entries of the largest mask; the smallest step between single keys.
CALL, LARGEST, LEAST_STEP = 4.0, 1 << 24, 16


def step_of(layout: BlockLayout, extras: Extras) -> tuple[int, int]:
    """The greatest step such that all i - j of the rests have one remainder, and that; (0, 0) if it does not pay."""
    rest = any_of(extras.parts.rest, 1, 2)
    if not rest.any():
        return 0, 0
    has_rest = extras.taken & rest[extras.mask]
    count = int(has_rest.sum())
    if not count:
        return 0, 0
    apart = _distances(layout, extras, has_rest)
    step = int(np.gcd.reduce(apart - apart[0]))
    if step < LEAST_STEP or layout.q_len < step:
        return 0, 0
    pairs = -(-layout.q_len // step) * -(-layout.kv_len // step)
    cost = step * (CALL / 16 + CALL * pairs / layout.block**2)
    return (step, int(apart[0]) % step) if cost < count and step * pairs <= LARGEST else (0, 0)


def _distances(layout: BlockLayout, extras: Extras, chosen: Bool[np.ndarray, "V"]) -> Int[np.ndarray, "P"]:
    """Every i - j that occurs in the rests of these visits."""
    block, size = layout.block, len(extras.parts.rest)
    rows, columns = layout.num_query_blocks, -(-layout.kv_len // layout.block)
    mask, query, key = extras.parts.rest.nonzero()
    diagonals = np.zeros((size, 2 * block), bool)
    diagonals[mask, query - key + block] = True
    code = (extras.row - extras.column + columns)[chosen] * size + extras.mask[chosen]
    where = occurring(code, (rows + columns) * size)
    visit, diagonal = diagonals[where % size].nonzero()
    return (where // size - columns)[visit] * block + diagonal - block


def residues(layout: BlockLayout, extras: Extras, step: int, shift: int) -> list[Thin]:
    """A list for each remainder of the query's place by ``step``: its queries, and the keys that they share."""
    lists = np.arange(step)
    others = (lists - shift) % step
    height, width = -(-layout.q_len // step), -(-layout.kv_len // step)
    aligned = step % layout.block == 0
    tables, which = (_by_blocks if aligned else _by_pairs)(layout, extras, step, others, (height, width))
    # Lists of equal lengths side by side.
    code = (layout.q_len - 1 - lists) // step * (width + 1) + (layout.kv_len - 1 - others) // step
    found = []
    for one in np.unique(code).tolist():
        some = (code == one).nonzero()[0]
        rows, columns = one // (width + 1) + 1, one % (width + 1) + 1
        if not rows or not columns:
            continue
        used, place = np.unique(which[some], return_inverse=True)
        seen = tables[used, :rows, :columns]
        seen = seen[:1] if (seen == seen[:1]).all() else seen[place]
        queries = places(some[:, None] + step * np.arange(rows))
        keys = places(others[some][:, None] + step * np.arange(columns))
        found.append(Thin(queries, (Shown(keys, tensor(seen)),)))
    return found


def _by_blocks(
    layout: BlockLayout, extras: Extras, step: int, others: Int[np.ndarray, "S"], size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "T height width"], Int[np.ndarray, "S"]]:
    """What the lists see, each different table once, and which each has, where the step is some blocks: all queries of
    a list then lie at one place of their blocks, and so do its keys."""
    block, tall = layout.block, step // layout.block
    hidden = len(extras.parts.rest)
    kinds = np.full((size[0] * tall, size[1] * tall), hidden)
    kinds[extras.row, extras.column] = extras.mask
    lists = np.arange(step)
    shows = np.zeros((step, hidden + 1), bool)
    shows[:, :hidden] = extras.parts.rest[:, lists % block, others % block].T
    place = np.stack([lists // block, others // block], 1)
    found: dict[tuple[bytes, bytes], int] = {}
    which = [found.setdefault((a.tobytes(), b.tobytes()), len(found)) for a, b in zip(place, shows, strict=True)]
    tables = []
    for one in np.unique(which, return_index=True)[1].tolist():
        row, column = place[one].tolist()
        tables.append(shows[one][kinds[row::tall, column::tall]])
    return np.stack(tables), np.array(which)


def _by_pairs(
    layout: BlockLayout, extras: Extras, step: int, others: Int[np.ndarray, "S"], size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "S height width"], Int[np.ndarray, "S"]]:
    """What each list sees, pair by pair."""
    mask, query, key = extras.parts.rest.nonzero()
    each = np.bincount(mask, minlength=len(extras.parts.rest))
    count = each[extras.mask]
    pair = spans(starts(each)[extras.mask], count)
    query = query[pair] + (extras.row * layout.block).repeat(count)
    key = key[pair] + (extras.column * layout.block).repeat(count)
    seen = np.zeros((step, *size), bool)
    seen[query % step, query // step, key // step] = True
    return seen, np.arange(step)
