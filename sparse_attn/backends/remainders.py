"""Patterns that show a query only keys at multiples of a step: each remainder is a sequence of its own, and denser.

Position i = step·i' + c sees only keys j = step·j' + c. So the queries of remainder c, side by side, are attention over
their own keys with the blocks of i' and j': a dilated window of 256 at step 4 is a window of 64 over a quarter of the
length, four times. The remainders are copied side by side, as if they were so many heads.
"""

from dataclasses import replace
from math import gcd

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from sparse_attn.layout import BlockLayout


def by_remainder(layout: BlockLayout) -> tuple[int, BlockLayout]:
    """The greatest step that divides every visible i - j, and the layout of one remainder; 1 and the layout itself if
    there is none, if the lengths are no multiples of it, or if the remainders differ."""
    step = _step(layout)
    even = not any(size % step for size in (layout.q_len, layout.kv_len, layout.offset - layout.key_offset))
    if step == 1 or not even:
        return 1, layout
    cell, combination = _combinations(layout, step)
    distinct, which = torch.unique(combination, dim=0, return_inverse=True)
    # -1 is the last row: an old block that is not visited.
    table = torch.cat([layout.masks, layout.masks.new_zeros(1, layout.block, layout.block)])
    masks = _of_remainder(table, distinct, 0, step)
    if any(not torch.equal(masks, _of_remainder(table, distinct, c, step)) for c in range(1, step)):
        return 1, layout
    columns = _count(layout.kv_len // step, layout.block)
    full, seen = masks.flatten(1).all(1), masks.flatten(1).any(1)
    keep = seen[which]
    kind = torch.where(full, -1, torch.arange(len(masks)))[which[keep]]
    rows = _count(layout.q_len // step, layout.block)
    row_start = torch.zeros(rows + 1, dtype=torch.long)
    row_start[1:] = torch.bincount(cell[keep] // columns, minlength=rows).cumsum(0)
    inner = replace(
        layout,
        q_len=layout.q_len // step,
        kv_len=layout.kv_len // step,
        offset=(layout.offset - layout.key_offset) // step,
        key_offset=0,
        row_start=row_start,
        key_block=cell[keep] % columns,
        mask_index=kind,
        masks=masks,
    )
    return step, inner


def split(x: Shaped[Tensor, "B H L d"], step: int, axis: int) -> Shaped[Tensor, "b h l d"]:
    """Copy with the remainders as sequences (axis 0) or heads (axis 1), those of one remainder side by side."""
    return x.unflatten(2, (-1, step)).permute(0, 3, 1, 2, 4).flatten(axis, axis + 1).contiguous()


def join(x: Shaped[Tensor, "b h l d"], step: int, axis: int) -> Shaped[Tensor, "B H L d"]:
    """Back: a copy."""
    return x.unflatten(axis, (-1, step) if axis == 0 else (step, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _step(layout: BlockLayout) -> int:
    if not layout.visited_blocks or bool((layout.mask_index < 0).any()):
        return 1
    query, key = layout.masks[layout.mask_index.unique()].any(0).nonzero(as_tuple=True)
    return gcd(layout.block, *(query - key).unique().tolist())


def _combinations(layout: BlockLayout, step: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "n step step"]]:
    """The visits of a remainder, ascending, and the masks of the step² blocks that each is made of; -1: not visited."""
    row, column = layout.query_block, layout.key_block
    cell = row // step * _count(layout.kv_len // step, layout.block) + column // step
    cells, place = torch.unique(cell, return_inverse=True)
    made = torch.full((len(cells), step, step), -1)
    made[place, row % step, column % step] = layout.mask_index
    return cells, made


def _of_remainder(
    table: Shaped[Tensor, "U block block"], combination: Int[Tensor, "n step step"], c: int, step: int
) -> Shaped[Tensor, "n block block"]:
    part = table[:, c::step, c::step][combination]
    return part.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _count(length: int, block: int) -> int:
    return -(-length // block)
