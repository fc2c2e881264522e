"""Query blocks gathered with the key blocks that they visit, several to one product where their keys are much alike."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from torch import Tensor

from sparse_attn.arrays import distinct, occurring, spans, tensor
from sparse_attn.layout import HIDDEN, BlockLayout

# What copying a key block costs, in computing it for one query block; shared by the query blocks of a cluster.
COPY = 0.5
# What a cluster costs beside its blocks, in the same unit.
CALL = 2.0
# Heights of clusters and distances between their query blocks that are tried.
SHAPES = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2))


@dataclass(frozen=True, eq=False)
class Gather:
    """R clusters of m whole query blocks (by index), each with n whole key blocks; mask -2: that pair sees nothing."""

    rows: Int[Tensor, "R m"]
    blocks: Int[Tensor, "R n"]
    masks: Int[Tensor, "R m n"]


@dataclass(frozen=True, eq=False)
class _Clusters:
    """Visit i lies in cluster[i], row slot[i], column[i] of it; cluster c has height[c] rows and width[c] columns."""

    place: Int[np.ndarray, "V"]
    cluster: Int[np.ndarray, "V"]
    slot: Int[np.ndarray, "V"]
    column: Int[np.ndarray, "V"]
    height: Int[np.ndarray, "C"]
    width: Int[np.ndarray, "C"]


def gathers(layout: BlockLayout, rows: Int[np.ndarray, "S"]) -> list[Gather]:
    """The cheapest clusters of these query blocks, those of about the same width side by side."""
    if not len(rows):
        return []
    # Shapes beyond twice the query blocks give what smaller ones give.
    shapes = [shape for shape in SHAPES if shape == (1, 1) or shape[0] * shape[1] < 2 * len(rows)]
    count = np.diff(layout.row_start.numpy())[rows]
    place = spans(layout.row_start.numpy()[rows], count)
    groups = (_groups(rows, *shape) for shape in shapes)
    group = min(groups, key=lambda group: _cost(layout, group, count, place)) if len(shapes) > 1 else next(groups)
    best = _clusters(layout, group, count, place)
    shape = np.stack([best.height, best.width], 1).tolist()
    order = sorted(range(len(shape)), key=shape.__getitem__)
    found: list[Gather] = []
    start = 0
    while start < len(order):
        height, least = shape[order[start]]
        stop = start
        while stop < len(order) and shape[order[stop]][0] == height and shape[order[stop]][1] <= least + least // 6:
            stop += 1
        found.append(_gather(layout, best, np.array(sorted(order[start:stop]))))
        start = stop
    return found


def _groups(rows: Int[np.ndarray, "S"], tall: int, period: int) -> Int[np.ndarray, "S"]:
    """Up to ``tall`` query blocks to a cluster, ``period`` apart."""
    code = rows // (tall * period) * period + rows % period
    return distinct(code, int(code[-1]) + tall * period)[1]


def _cost(
    layout: BlockLayout, group: Int[np.ndarray, "S"], count: Int[np.ndarray, "S"], place: Int[np.ndarray, "V"]
) -> float:
    """Blocks that clusters compute and copy."""
    height, columns = np.bincount(group), -(-layout.kv_len // layout.block)
    cells = occurring(group.repeat(count) * columns + layout.key_block.numpy()[place], len(height) * columns)
    width = np.bincount(cells // columns)
    return float((width * (height + COPY) + CALL).sum())


def _clusters(
    layout: BlockLayout, group: Int[np.ndarray, "S"], count: Int[np.ndarray, "S"], place: Int[np.ndarray, "V"]
) -> _Clusters:
    """Query block i is in cluster group[i] and has count[i] of the visits at ``place``, in a row."""
    height = np.bincount(group)
    # Rows ascend inside a group: the rank in a stable sort by group, less the rows of earlier groups.
    order = group.argsort(kind="stable")
    slot = np.empty_like(order)
    slot[order] = np.arange(len(group)) - (height.cumsum() - height)[group[order]]
    cluster = group.repeat(count)
    columns = -(-layout.kv_len // layout.block)
    cells, which = distinct(cluster * columns + layout.key_block.numpy()[place], len(height) * columns)
    width = np.bincount(cells // columns)
    column = which - (width.cumsum() - width)[cluster]
    return _Clusters(place, cluster, slot.repeat(count), column, height, width)


def _gather(layout: BlockLayout, all_clusters: _Clusters, chosen: Int[np.ndarray, "R"]) -> Gather:
    """The records of some clusters of equal height."""
    found = all_clusters
    new = np.full_like(found.height, -1)
    new[chosen] = np.arange(len(chosen))
    mine = (new[found.cluster] >= 0).nonzero()[0]
    cluster, slot, column, place = new[found.cluster[mine]], found.slot[mine], found.column[mine], found.place[mine]
    height, width = int(found.height[chosen[0]]), int(found.width[chosen].max())
    rows = np.zeros((len(chosen), height), np.int64)
    rows[cluster, slot] = layout.query_block.numpy()[place]
    blocks = np.zeros((len(chosen), width), np.int64)
    blocks[cluster, column] = layout.key_block.numpy()[place]
    masks = np.full((len(chosen), height, width), HIDDEN)
    masks[cluster, slot, column] = layout.mask_index.numpy()[place]
    return Gather(tensor(rows), tensor(blocks), tensor(masks))
