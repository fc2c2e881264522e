"""Query blocks gathered with the key blocks that they visit, several to one product where their keys are much alike."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_attn.layout import BlockLayout

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

    place: Int[Tensor, "V"]
    cluster: Int[Tensor, "V"]
    slot: Int[Tensor, "V"]
    column: Int[Tensor, "V"]
    height: Int[Tensor, "C"]
    width: Int[Tensor, "C"]

    @property
    def cost(self) -> float:
        """Blocks computed and copied."""
        return float((self.width * (self.height + COPY) + CALL).sum())


def gathers(layout: BlockLayout, rows: Int[Tensor, "S"]) -> list[Gather]:
    """The cheapest clusters of these query blocks, those of about the same width side by side."""
    if not rows.numel():
        return []
    # Shapes beyond twice the query blocks give what smaller ones give.
    shapes = [shape for shape in SHAPES if shape == (1, 1) or shape[0] * shape[1] < 2 * len(rows)]
    best = min((_clusters(layout, rows, *shape) for shape in shapes), key=lambda clusters: clusters.cost)
    shape = torch.stack([best.height, best.width], 1).tolist()
    order = sorted(range(len(shape)), key=shape.__getitem__)
    found: list[Gather] = []
    start = 0
    while start < len(order):
        height, least = shape[order[start]]
        stop = start
        while stop < len(order) and shape[order[stop]][0] == height and shape[order[stop]][1] <= least + least // 6:
            stop += 1
        found.append(_gather(layout, best, torch.tensor(sorted(order[start:stop]))))
        start = stop
    return found


def _clusters(layout: BlockLayout, rows: Int[Tensor, "S"], tall: int, period: int) -> _Clusters:
    """Up to ``tall`` query blocks to a cluster, ``period`` apart."""
    group = torch.unique(rows // (tall * period) * period + rows % period, return_inverse=True)[1]
    height = torch.bincount(group)
    # Rows ascend inside a group: the rank in a stable sort by group, less the rows of earlier groups.
    order = group.argsort(stable=True)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(rows)) - (height.cumsum(0) - height)[group[order]]
    count = layout.row_start.diff()[rows]
    within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    place = layout.row_start[rows].repeat_interleave(count) + within
    cluster = group.repeat_interleave(count)
    columns = -(-layout.kv_len // layout.block)
    cells, which = torch.unique(cluster * columns + layout.key_block[place], return_inverse=True)
    width = torch.bincount(cells // columns)
    column = which - (width.cumsum(0) - width)[cluster]
    return _Clusters(place, cluster, slot.repeat_interleave(count), column, height, width)


def _gather(layout: BlockLayout, all_clusters: _Clusters, chosen: Int[Tensor, "R"]) -> Gather:
    """The records of some clusters of equal height."""
    found = all_clusters
    new = torch.full_like(found.height, -1)
    new[chosen] = torch.arange(len(chosen))
    mine = (new[found.cluster] >= 0).nonzero().flatten()
    cluster, slot, column, place = new[found.cluster[mine]], found.slot[mine], found.column[mine], found.place[mine]
    height, width = int(found.height[chosen[0]]), int(found.width[chosen].max())
    rows = torch.zeros(len(chosen), height, dtype=torch.long)
    rows[cluster, slot] = layout.query_block[place]
    blocks = torch.zeros(len(chosen), width, dtype=torch.long)
    blocks[cluster, column] = layout.key_block[place]
    masks = torch.full((len(chosen), height, width), -2)
    masks[cluster, slot, column] = layout.mask_index[place]
    return Gather(rows, blocks, masks)
