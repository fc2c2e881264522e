"""Patterns that show a query only keys at multiples of a step: each remainder is a sequence of its own, and denser.

Position i = step·i' + c sees only keys j = step·j' + c. So the queries of remainder c, side by side, are attention over
their own keys with the blocks of i' and j': a dilated window of 256 at step 4 is a window of 64 over a quarter of the
length, four times. The remainders are copied side by side, as if they were so many heads.
"""

from dataclasses import replace
from math import gcd

import numpy as np
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sparse_attn.arrays import all_of, any_of, distinct, occurring, starts, tensor
from sparse_attn.layout import FULL, BlockLayout


def by_remainder(layout: BlockLayout) -> tuple[int, BlockLayout]:
    """The greatest step that divides every visible i - j, and the layout of one remainder; 1 and the layout itself if
    there is none, if the lengths are no multiples of it, or if the remainders differ."""
    step = _step(layout)
    even = not any(size % step for size in (layout.q_len, layout.kv_len, layout.offset - layout.key_offset))
    if step == 1 or not even:
        return 1, layout
    cell, combination = _combinations(layout, step)
    found: dict[bytes, int] = {}
    which = np.array([found.setdefault(one.tobytes(), len(found)) for one in combination])
    distinct_ones = np.array([np.frombuffer(one, combination.dtype) for one in found]).reshape(-1, step, step)
    # -1 is the last row: an old block that is not visited.
    table = np.concatenate([layout.masks.numpy(), np.zeros((1, layout.block, layout.block), bool)])
    masks = _of_remainder(table, distinct_ones, 0, step)
    if any(not np.array_equal(masks, _of_remainder(table, distinct_ones, c, step)) for c in range(1, step)):
        return 1, layout
    columns = _count(layout.kv_len // step, layout.block)
    kinds = np.where(all_of(masks, 1, 2), FULL, np.arange(len(masks)))
    seen = any_of(masks, 1, 2)[which]
    rows = _count(layout.q_len // step, layout.block)
    row_start = starts(np.bincount(cell[seen] // columns, minlength=rows))
    inner = replace(
        layout,
        q_len=layout.q_len // step,
        kv_len=layout.kv_len // step,
        offset=(layout.offset - layout.key_offset) // step,
        key_offset=0,
        row_start=tensor(row_start),
        key_block=tensor(cell[seen] % columns),
        mask_index=tensor(kinds[which[seen]]),
        masks=tensor(masks),
    )
    return step, inner


def split(x: Shaped[Tensor, "B H L d"], step: int, axis: int) -> Shaped[Tensor, "b h l d"]:
    """Copy with the remainders as sequences (axis 0) or heads (axis 1), those of one remainder side by side."""
    return x.unflatten(2, (-1, step)).permute(0, 3, 1, 2, 4).flatten(axis, axis + 1).contiguous()


def join(x: Shaped[Tensor, "b h l d"], step: int, axis: int) -> Shaped[Tensor, "B H L d"]:
    """Back: a copy."""
    return x.unflatten(axis, (-1, step) if axis == 0 else (step, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _step(layout: BlockLayout) -> int:
    kind = layout.mask_index.numpy()
    if not len(kind) or int(kind.min()) < 0:
        return 1
    used = occurring(kind, len(layout.masks))
    query, key = layout.masks.numpy()[used].any(0).nonzero()
    return gcd(layout.block, int(np.gcd.reduce(query - key)))


def _combinations(layout: BlockLayout, step: int) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n step step"]]:
    """The visits of a remainder, ascending, and the masks of the step² blocks that each is made of; -1: not visited."""
    row, column = layout.query_block.numpy(), layout.key_block.numpy()
    rows, columns = (_count(size // step, layout.block) for size in (layout.q_len, layout.kv_len))
    cells, place = distinct(row // step * columns + column // step, rows * columns)
    made = np.full((len(cells), step, step), -1)
    made[place, row % step, column % step] = layout.mask_index.numpy()
    return cells, made


def _of_remainder(
    table: Bool[np.ndarray, "U block block"], combination: Int[np.ndarray, "n step step"], c: int, step: int
) -> Bool[np.ndarray, "n block block"]:
    part = table[:, c::step, c::step][combination]
    return part.transpose(0, 1, 3, 2, 4).reshape(len(part), *table.shape[1:])


def _count(length: int, block: int) -> int:
    return -(-length // block)
