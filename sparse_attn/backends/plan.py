"""How the folded backend walks a layout: query blocks that read their keys alike are computed together.

Neighbouring query blocks whose key runs have the same lengths and masks, and whose starts all stand still (sinks) or
all move on by one block (windows), form one strip: its keys are views. The other query blocks are gathered, several
with about the same key blocks to one product where that computes little in vain. The plan is made by operations over
all visits at once; Python sees strips and gathers only.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sparse_attn.backends.clusters import Gather, gathers
from sparse_attn.backends.remainders import by_remainder
from sparse_attn.backends.thin import Thin
from sparse_attn.backends.thinning import divide
from sparse_attn.layout import BlockLayout
from sparse_attn.once import untransformed

# Query blocks of a strip that are read as one: torch's CPU kernel takes 32 queries at once, from 192 on 64 and a fifth
# less time for a block. What they read in vain, as the window moves on, is at most a part in SPARE.
TALL, SPARE = 3, 8
# Pairs of a lone cluster that is read as a strip: the edge of a window of 256.
SMALL = 1 << 15


@dataclass(frozen=True)
class Run:
    """``length`` consecutive keys from ``start + row·step`` for each row of a strip.

    partial: (query, height, column, width, mask) marks a part that needs a row of ``layout.masks``, or with mask -2 one
    that is hidden.
    """

    start: int
    step: int
    length: int
    partial: tuple[tuple[int, int, int, int, int], ...]


@dataclass(frozen=True)
class Strip:
    """``rows`` query blocks of ``height`` queries from query ``first``. All see the same runs, shifted.

    The height is that of a layout's block, or of ``TALL`` of them read as one.
    """

    first: int
    rows: int
    height: int
    runs: tuple[Run, ...]

    @property
    def width(self) -> int:
        """Keys that each query block reads."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True, eq=False)
class Plan:
    """All the work of a layout. A query block is in at most one strip or gather; what comes ``late`` beside a regular
    band, and single queries and keys in ``thin`` parts, is merged into that.
    """

    layout: BlockLayout
    strips: tuple[Strip, ...]
    gathers: tuple[Gather, ...]
    late: tuple[Gather, ...]
    thin: tuple[Thin, ...]
    # Where keys are seen at multiples of a step only: the step and the plan of one remainder, instead of all the above.
    inner: "tuple[int, Plan] | None" = None

    @property
    def merges(self) -> bool:
        """Whether some queries are in several parts."""
        return bool(self.late or self.thin)

    @property
    def covers(self) -> bool:
        """Whether every query is in a strip or gather."""
        seen = sum(min(strip.rows * strip.height, self.layout.q_len - strip.first) for strip in self.strips)
        return seen + sum(gather.rows.numel() for gather in self.gathers) * self.layout.block == self.layout.q_len


@untransformed
def make_plan(layout: BlockLayout) -> Plan:
    """Strips where a stretch of alike query blocks is longer than its runs are many, gathers for what is left.

    Before that, what is cheaper by single queries and keys, or lies beside a regular band, is taken out.
    """
    step, remainder = by_remainder(layout)
    if step > 1:
        return Plan(layout, (), (), (), (), (step, make_plan(remainder)))
    parts = divide(layout)
    strips, loose = _blocks(parts.regular)
    late = () if parts.lone is None else gathers(parts.lone, np.diff(parts.lone.row_start.numpy()).nonzero()[0])
    return Plan(layout, strips, loose, tuple(late), parts.thin)


def _blocks(layout: BlockLayout) -> tuple[tuple[Strip, ...], tuple[Gather, ...]]:
    begins, ragged = _run_starts(layout), _ragged(layout)
    runs = np.bincount(layout.query_block.numpy()[begins], minlength=layout.num_query_blocks).tolist()
    counts = np.diff(layout.row_start.numpy()).tolist()
    ends, must = _stretch_ends(layout, ragged, begins).tolist(), ragged.tolist()
    strips: list[Strip] = []
    scattered: list[int] = []
    row = 0
    while row < len(counts):
        stop = ends[row] if counts[row] else row + 1
        if counts[row] and (must[row] or stop - row > runs[row]):
            strips += _taller(_strip(layout, row, stop))
        elif counts[row]:
            scattered += range(row, stop)
        row = stop
    loose: list[Gather] = []
    for gather in gathers(layout, np.array(scattered, np.int64)):
        strip = _as_strip(gather, layout.block)
        loose += [gather] if strip is None else []
        strips += [] if strip is None else [strip]
    return tuple(strips), tuple(loose)


def _run_starts(layout: BlockLayout) -> Bool[np.ndarray, "N"]:
    """Whether a visit begins a run of consecutive key blocks."""
    row_start, key_block = layout.row_start.numpy(), layout.key_block.numpy()
    begins = np.ones(len(key_block), bool)
    np.not_equal(key_block[1:], key_block[:-1] + 1, out=begins[1:])
    first = row_start[:-1]
    begins[first[first < row_start[1:]]] = True
    return begins


def _ragged(layout: BlockLayout) -> Bool[np.ndarray, "R"]:
    """Whether a query block, or a key block that it visits, ends beyond the length."""
    ragged = np.zeros(layout.num_query_blocks, bool)
    ragged[layout.q_len // layout.block :] = True
    if layout.kv_len % layout.block:
        ragged[layout.query_block.numpy()[layout.key_block.numpy() == layout.kv_len // layout.block]] = True
    return ragged


def _stretch_ends(
    layout: BlockLayout, ragged: Bool[np.ndarray, "R"], begins: Bool[np.ndarray, "N"]
) -> Int[np.ndarray, "R"]:
    """For each query block, the end of the stretch from there that can share a strip."""
    row, key_block, kind = layout.query_block.numpy(), layout.key_block.numpy(), layout.mask_index.numpy()
    size, count = layout.num_query_blocks, np.diff(layout.row_start.numpy())
    link = np.zeros(size, bool)
    link[:-1] = (count[:-1] == count[1:]) & ~(ragged[:-1] | ragged[1:])
    here = link[row].nonzero()[0]
    below = here + count[row[here]]
    move = np.full_like(key_block, -1)
    moved = key_block[below] - key_block[here]
    move[here] = moved
    alike = ((moved == 0) | (moved == 1)) & (begins[here] == begins[below]) & (kind[here] == kind[below])
    link[row[here[~alike]]] = False
    # A stretch goes on as long as every run keeps moving as it did.
    goes_on = np.zeros_like(link)
    goes_on[:-1] = link[:-1] & link[1:]
    onward = goes_on[row].nonzero()[0]
    turned = move[onward] != move[onward + count[row[onward]]]
    goes_on[row[onward[turned]]] = False
    rows = np.arange(size)
    last_link = np.minimum.accumulate(np.where(goes_on, size, rows)[::-1])[::-1]
    return np.where(link, last_link + 2, rows + 1)


def _strip(layout: BlockLayout, row: int, stop: int) -> Strip:
    size = layout.block
    start, end = int(layout.row_start[row]), int(layout.row_start[row + 1])
    blocks, masks = layout.key_block[start:end].tolist(), layout.mask_index[start:end].tolist()
    below = layout.key_block[end : 2 * end - start].tolist() if stop - row > 1 else blocks
    height = min(size, layout.q_len - row * size)
    runs: list[Run] = []
    place = 0
    while place < len(blocks):
        count = 1
        while place + count < len(blocks) and blocks[place + count] == blocks[place] + count:
            count += 1
        step = size * (below[place] - blocks[place])
        runs.append(_run(layout, blocks[place], step, masks[place : place + count]))
        place += count
    return Strip(row * size, stop - row, height, tuple(runs))


def _run(layout: BlockLayout, block: int, step: int, masks: list[int]) -> Run:
    size = layout.block
    length = min((block + len(masks)) * size, layout.kv_len) - block * size
    if masks[-1] >= 0:  # keys behind the last visible one need not be read: 4 sinks cost 4 keys, not a block
        length = (len(masks) - 1) * size + int(layout.masks.numpy()[masks[-1]].any(0).nonzero()[0][-1]) + 1
    partial = tuple(
        (0, size, place * size, min(size, length - place * size), mask) for place, mask in enumerate(masks) if mask >= 0
    )
    return Run(block * size, step, length, partial)


def _as_strip(gather: Gather, block: int) -> Strip | None:
    """A single small cluster of neighbouring query blocks and neighbouring key blocks: its keys are a view.

    A strip's row is computed at once, whereas the tiles of a gather may be cut.
    """
    height, width = gather.masks.shape[1:]
    if len(gather.rows) > 1 or height * width * block**2 > SMALL:
        return None
    if any(bool((x.diff() != 1).any()) for x in (gather.rows[0], gather.blocks[0])):
        return None
    partial = tuple(
        (row * block, block, column * block, block, mask)
        for row, masks in enumerate(gather.masks[0].tolist())
        for column, mask in enumerate(masks)
        if mask != -1
    )
    run = Run(int(gather.blocks[0, 0]) * block, 0, width * block, partial)
    return Strip(int(gather.rows[0, 0]) * block, 1, height * block, (run,))


def _taller(strip: Strip) -> list[Strip]:
    """``TALL`` query blocks as one where their keys are nearly the same, as in wide windows."""
    vain = (TALL - 1) * sum(run.step for run in strip.runs)
    count = strip.rows // TALL
    if not count or SPARE * vain > strip.width:
        return [strip]
    covered = count * TALL
    tall = Strip(strip.first, count, TALL * strip.height, tuple(_tall_run(run, strip.height) for run in strip.runs))
    if covered == strip.rows:
        return [tall]
    rest = tuple(Run(run.start + covered * run.step, run.step, run.length, run.partial) for run in strip.runs)
    return [tall, Strip(strip.first + covered * strip.height, strip.rows - covered, strip.height, rest)]


def _tall_run(run: Run, height: int) -> Run:
    length = run.length + (TALL - 1) * run.step
    partial: list[tuple[int, int, int, int, int]] = []
    for member in range(TALL):
        shift = member * run.step
        for start, stop in ((0, shift), (shift + run.length, length)):
            if stop > start:
                partial.append((member * height, height, start, stop - start, -2))
        partial += [
            (member * height, tall, column + shift, width, mask) for _, tall, column, width, mask in run.partial
        ]
    return Run(run.start, run.step * TALL, length, tuple(partial))
