"""How the folded backend walks a layout: query blocks that read their keys alike are computed together.

Neighbouring query blocks whose key runs have the same lengths and masks, and whose starts all stand still (sinks) or
all move on by one block (windows), form one strip: their keys are an overlapping strided view. The other query blocks
keep a strip of their own when they read few runs, or are gathered with blocks of about the same number of visits.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_attn.layout import BlockLayout

# More runs than this and a query block is gathered rather than read run by run.
MAX_RUNS = 2


@dataclass(frozen=True)
class Run:
    """``length`` consecutive keys from ``start + row·step`` for each row of a strip."""

    start: int
    step: int
    length: int


@dataclass(frozen=True)
class Strip:
    """``rows`` query blocks of ``height`` queries from query ``first``. All see the same runs, shifted.

    partial: (column, width, mask) marks columns of the joined runs that need a row of ``layout.masks``.
    blind: some query of each block sees none of the keys.
    """

    first: int
    rows: int
    height: int
    runs: tuple[Run, ...]
    partial: tuple[tuple[int, int, int], ...]
    blind: bool

    @property
    def width(self) -> int:
        """Keys that each query block reads."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True, eq=False)
class Gather:
    """Whole query blocks (by index) with as many whole key blocks each, padded by visits whose mask is -2 (nothing)."""

    rows: Int[Tensor, "R"]
    blocks: Int[Tensor, "R n"]
    masks: Int[Tensor, "R n"]


@dataclass(frozen=True, eq=False)
class Plan:
    """All the work of a layout: every query block is in exactly one strip or gather, or sees nothing."""

    layout: BlockLayout
    strips: tuple[Strip, ...]
    gathers: tuple[Gather, ...]

    @property
    def covers(self) -> bool:
        """Whether every query block visits something."""
        rows = sum(strip.rows for strip in self.strips) + sum(len(gather.rows) for gather in self.gathers)
        return rows == self.layout.num_query_blocks


def make_plan(layout: BlockLayout) -> Plan:
    """Strips first, gathers for what is left."""
    visits = _visits(layout)
    strips: list[Strip] = []
    scattered: list[int] = []
    row = 0
    while row < len(visits):
        if not visits[row]:
            row += 1
            continue
        stop, runs = _alike(layout, visits, row), len(_runs(visits[row]))
        if runs <= MAX_RUNS or stop - row > runs or _ragged(layout, visits, row):
            strips.append(_strip(layout, visits, row, stop))
        else:
            scattered += range(row, stop)
        row = stop
    return Plan(layout, tuple(strips), tuple(_gathers(layout, scattered)))


def _visits(layout: BlockLayout) -> list[list[tuple[int, int]]]:
    """For each query block its (key block, mask) pairs."""
    bounds = layout.row_start.tolist()
    pairs = list(zip(layout.key_block.tolist(), layout.mask_index.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(bounds)]


def _runs(visits: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Consecutive key blocks as (first block, count)."""
    runs: list[tuple[int, int]] = []
    for block, _ in visits:
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def _steps(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> tuple[int, ...] | None:
    """By how much each run moves from one query block to the next; None unless all keep still or move one block."""
    if [count for _, count in before] != [count for _, count in after]:
        return None
    steps = tuple(new - old for (old, _), (new, _) in zip(before, after, strict=True))
    return steps if set(steps) <= {0, 1} else None


def _alike(layout: BlockLayout, visits: list[list[tuple[int, int]]], row: int) -> int:
    """End of the stretch of query blocks from ``row`` that can share a strip."""
    if _ragged(layout, visits, row):
        return row + 1
    runs, masks, steps = _runs(visits[row]), [mask for _, mask in visits[row]], None
    stop = row + 1
    while stop < len(visits) and not _ragged(layout, visits, stop):
        following = _runs(visits[stop])
        moved = _steps(runs, following)
        if moved is None or steps not in (None, moved) or [mask for _, mask in visits[stop]] != masks:
            break
        runs, steps, stop = following, moved, stop + 1
    return stop


def _ragged(layout: BlockLayout, visits: list[list[tuple[int, int]]], row: int) -> bool:
    """Whether this query block, or a key block that it visits, ends beyond the length."""
    beyond = bool(visits[row]) and (visits[row][-1][0] + 1) * layout.block > layout.kv_len
    return beyond or (row + 1) * layout.block > layout.q_len


def _strip(layout: BlockLayout, visits: list[list[tuple[int, int]]], row: int, stop: int) -> Strip:
    size = layout.block
    steps = _steps(_runs(visits[row]), _runs(visits[row + 1])) if stop - row > 1 else None
    masks = dict(visits[row])
    runs: list[Run] = []
    partial: list[tuple[int, int, int]] = []
    column = 0
    for index, (block, count) in enumerate(_runs(visits[row])):
        length = min((block + count) * size, layout.kv_len) - block * size
        tail = masks[block + count - 1]
        if tail >= 0:  # keys behind the last visible one need not be read: 4 sinks cost 4 keys, not a block
            length = (count - 1) * size + int(layout.masks[tail].any(0).nonzero().max()) + 1
        for place in range(count):
            if masks[block + place] >= 0:
                partial.append((column + place * size, min(size, length - place * size), masks[block + place]))
        runs.append(Run(block * size, size * (steps[index] if steps else 0), length))
        column += length
    height = min(size, layout.q_len - row * size)
    return Strip(row * size, stop - row, height, tuple(runs), tuple(partial), _blind(layout, visits[row], height))


def _blind(layout: BlockLayout, visits: list[tuple[int, int]], height: int) -> bool:
    """Whether one of the first ``height`` queries of a block sees none of the visited keys."""
    masks = [mask for _, mask in visits]
    return min(masks) >= 0 and not layout.masks[masks].any(-1).any(0)[:height].all()


def _gathers(layout: BlockLayout, rows: list[int]) -> list[Gather]:
    """Rows of about the same number of visits side by side, padded by at most a quarter."""
    count = layout.row_start.diff()
    order = sorted(rows, key=lambda row: int(count[row]))
    gathers: list[Gather] = []
    while order:
        least = int(count[order[0]])
        taken = [row for row in order if int(count[row]) <= least + least // 4]
        order = order[len(taken) :]
        gathers.append(_gather(layout, torch.tensor(sorted(taken)), int(count[taken[-1]])))
    return gathers


def _gather(layout: BlockLayout, rows: Int[Tensor, "R"], width: int) -> Gather:
    place = layout.row_start[rows][:, None] + torch.arange(width)
    real = place < layout.row_start[rows + 1][:, None]
    place = place.clamp(max=layout.visited_blocks - 1)
    blocks = torch.where(real, layout.key_block[place], 0)
    return Gather(rows, blocks, torch.where(real, layout.mask_index[place], -2))
