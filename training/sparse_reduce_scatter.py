"""Σ over ranks of sparse vectors, a shard for each rank: an entry goes to the rank in whose shard it lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from training.sparse_exchange import Sent, Traffic


@dataclass(frozen=True)
class Shards:
    """How FSDP2 lays out a group of parameters on ``ranks`` ranks: parameter p, of sizes[p] entries, in runs of
    widths[p], the last of them shorter or empty; row r holds run r of every parameter, one behind the other."""

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: int

    @property
    def row(self) -> int:
        """Entries of one rank, with what fills up short runs."""
        return sum(self.widths)

    def whole(self, laid_out: Float[Tensor, "ranks*row"]) -> list[Float[Tensor, "_"]]:
        """Each parameter's entries in its own order, flat."""
        columns = laid_out.view(self.ranks, -1).split(self.widths, dim=1)
        return [column.reshape(-1)[:size] for column, size in zip(columns, self.sizes, strict=True)]

    def places(self, index: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        """Rank and place in its row of entries that are numbered through all parameters, one behind the other.

        >>> Shards(sizes=(5, 2), widths=(3, 1), ranks=2).places(torch.tensor([0, 4, 6]))
        (tensor([0, 1, 1]), tensor([0, 1, 3]))
        """
        ends = torch.tensor(list(accumulate(self.sizes)), device=index.device)
        owner = torch.bucketize(index, ends, right=True)
        widths = torch.tensor(self.widths, device=index.device)
        first = widths.cumsum(0) - widths
        within = index - (ends - torch.tensor(self.sizes, device=index.device))[owner]
        width = widths[owner]
        return within // width, first[owner] + within % width


@dataclass(frozen=True)
class _Group:
    """Entries of one group sorted by the rank that they go to, and how many go to and come from each."""

    index: Int[Tensor, "n"]
    values: Float[Tensor, "n"]
    row: int
    sent: list[int]
    received: list[int]
    same_index: bool

    @property
    def wide(self) -> torch.dtype:
        return torch.int32 if self.row < 2**31 else torch.int64

    def dense(self, count: int) -> bool:
        """Whether so many entries would weigh as much as the row."""
        width = self.values.element_size()
        return not self.same_index and count * (self.wide.itemsize + width) >= self.row * width

    def weight(self, count: int) -> int:
        """Bytes of so many entries on the wire."""
        width = self.values.element_size()
        if self.dense(count):
            return self.row * width
        return count * (width + (0 if self.same_index else self.wide.itemsize))

    def parts(self) -> list[Sent]:
        """The entries for each rank."""
        pairs = zip(self.index.split(self.sent), self.values.split(self.sent), strict=True)
        return [Sent(index, values, self.row) for index, values in pairs]

    def pack(self, part: Sent) -> list[Tensor]:
        """The row itself, or indices and values, or values alone, as bytes."""
        if self.dense(part.index.numel()):
            return [_dense(part).view(torch.uint8)]
        indices = [] if self.same_index else [part.index.to(self.wide).view(torch.uint8)]
        return [*indices, part.values.contiguous().view(torch.uint8)]

    def add(self, into: Float[Tensor, "row"], packed: Tensor, count: int, own: Sent) -> None:
        """Add what :meth:`pack` of another rank made of ``count`` entries. own: this rank's, for the same places."""
        # cloned: values need not begin at a multiple of their width
        if self.dense(count):
            into.add_(packed.clone().view(into.dtype))
            return
        if self.same_index:
            into.index_add_(0, own.index, packed.clone().view(into.dtype))
            return
        index, values = (part.clone() for part in packed.split([count * self.wide.itemsize, count * into.itemsize]))
        into.index_add_(0, index.view(self.wide).long(), values.view(into.dtype))


def sparse_reduce_scatter(
    several: Sequence[Sent],
    layouts: Sequence[Shards],
    *,
    same_index: bool = False,
    group: Any = None,
    traffic: Traffic | None = None,
) -> list[Float[Tensor, "row"]]:
    """This rank's row of Σ over ranks of each sparse vector. Every rank gives the same layouts.

    One exchange of numbers, then one of entries: to each other rank (int32 or int64 place in its row, value), or that
    rank's whole row where this is not longer. same_index: every rank sends the same places, so that values alone go and
    no numbers. Bytes sent by a rank: Σ over other ranks and vectors of min(n·(4 or 8 + bytes of a value), row), and 8
    for each number; of a dense reduce-scatter (R − 1)·row.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    groups = _exchange_numbers(several, layouts, same_index=same_index, group=group)
    parts = [one.parts() for one in groups]
    others = [other for other in range(ranks) if other != rank]
    to = [sum(one.weight(one.sent[other]) for one in groups) if other != rank else 0 for other in range(ranks)]
    come = [sum(one.weight(one.received[other]) for one in groups) if other != rank else 0 for other in range(ranks)]
    packed = [
        piece for other in others for one, mine in zip(groups, parts, strict=True) for piece in one.pack(mine[other])
    ]
    stream = torch.cat(packed) if packed else several[0].values.new_empty(0, dtype=torch.uint8)
    arrived = stream.new_empty(sum(come))
    dist.all_to_all_single(arrived, stream, come, to, group=group)
    if traffic is not None:
        traffic.sent += sum(to) + (0 if same_index else 8 * len(groups) * (ranks - 1))
        traffic.dense += sum(one.row * one.values.element_size() for one in groups) * (ranks - 1)
    rows = [_dense(mine[rank]) for mine in parts]
    for other, piece in zip(range(ranks), arrived.split(come), strict=True):
        if other != rank:
            shares = piece.split([one.weight(one.received[other]) for one in groups])
            for one, mine, row, share in zip(groups, parts, rows, shares, strict=True):
                one.add(row, share, one.received[other], mine[rank])
    return rows


def _exchange_numbers(
    several: Sequence[Sent], layouts: Sequence[Shards], *, same_index: bool, group: Any
) -> list[_Group]:
    """Entries of each vector by the rank that they go to: with the numbers of what comes, one wait for the device."""
    ranks, sorted_, numbers = dist.get_world_size(group), [], []
    for sent, shards in zip(several, layouts, strict=True):
        owner, place = shards.places(sent.index)
        order = owner.argsort(stable=True)
        sorted_.append((place[order], sent.values[order], shards.row))
        numbers.append(owner.bincount(minlength=ranks))
    going = torch.stack(numbers, dim=1)
    # of the same places every rank sends as many to this one as it has for itself
    coming = going[dist.get_rank(group)].expand_as(going).contiguous() if same_index else torch.empty_like(going)
    if not same_index:
        dist.all_to_all_single(coming, going, group=group)
    going_to, coming_from = torch.stack([going, coming]).transpose(1, 2).tolist()
    return [
        _Group(index, values, row, to, come, same_index)
        for (index, values, row), to, come in zip(sorted_, going_to, coming_from, strict=True)
    ]


def _dense(part: Sent) -> Float[Tensor, "row"]:
    return part.values.new_zeros(part.size).index_add_(0, part.index, part.values)
