"""Experts over the ranks of a process group: a token's row goes to the ranks that own its experts, once to each.

Each rank holds a run of consecutive experts and routes its own tokens with its own copy of the router. Forward:

1. the numbers of rows and of assignments go round (all-to-all of two integers a pair of ranks);
2. for every (token, other rank that owns one of its experts) one row of the width, and for every assignment there its
   expert and weight (uneven all-to-all); the shared expert of the layer runs while they are on their way, and its
   backward pass while their gradients are;
3. every rank runs its experts over its own tokens and the received ones together, weighted and summed by row;
4. one row for each that came goes back, and is added to its token.

Rows of a rank's own experts are never sent, and no rank sees all tokens. The backward pass makes the same exchanges
the other way round. So the wire carries 2 · Σ_t (other ranks of t) · D numbers in each pass, whatever K is.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe.checks import at_least
from moe.experts import Experts
from moe.grouped import expert_mixture
from moe.layer import MoE
from moe.nonlinearity import activate
from moe.routing import Routing


@dataclass(frozen=True)
class Traffic:
    """What one forward pass put on the wire from this rank.

    rows: token rows sent; returned: rows sent back to other ranks; row_bytes: bytes of both; note_bytes: bytes of the
    counts, experts and weights that go with them.
    """

    rows: int
    returned: int
    row_bytes: int
    note_bytes: int


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None, *, average: bool = True) -> list[str]:
    """Leave on this rank its run of the experts of every MoE layer of ``model``, in place; same outputs as before.

    Every rank calls it with the same model (same weights). Of E experts over R ranks the first E mod R ranks hold one
    more; a rank may hold none. Routers, shared experts and all else stay on every rank. Each rank then feeds its own
    tokens, any number of them, none too; all ranks must run the same layers in the same order.
    average: gradients of experts are sums over all ranks' losses; divided by R, as data parallel divides the others.
    Leave the names returned out of data-parallel averaging. group: None is the default group.
    Raises: RuntimeError without a process group; ValueError without an MoE layer, or if one is sharded already.
    """
    if not dist.is_initialized():
        raise RuntimeError("expert parallel needs a process group: start with torchrun and call init_process_group")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"{type(model).__name__} must have MoE layers to shard, got none")
    for name, layer in layers:
        if isinstance(layer.experts, ShardedExperts):
            raise ValueError(f"the experts of {name or 'the layer'} are sharded already")
    found = []
    for name, layer in layers:
        layer.set_submodule("experts", ShardedExperts(layer.experts, group, average=average))
        prefix = f"{name}." if name else ""
        found += [f"{prefix}experts.up", f"{prefix}experts.down"]
    return found


def gather_experts(model: nn.Module) -> None:
    """Undo :func:`shard_experts`: every rank holds all experts of every layer again, to save or export the model.

    Every rank must call it.
    """
    for layer in [module for module in model.modules() if isinstance(module, MoE)]:
        if isinstance(layer.experts, ShardedExperts):
            layer.set_submodule("experts", layer.experts.whole())


class ShardedExperts(nn.Module):
    """This rank's run of a layer's experts, and the exchange with the other ranks.

    up [E_here, D, G·F], down [E_here, D, F]: as :class:`moe.experts.Experts`. num_experts counts those of all ranks,
    ``first`` is the index of the first one here. ``traffic`` tells what the last forward pass sent.
    """

    exchanges = True  # forward takes ``meanwhile``

    def __init__(self, experts: Experts, group: dist.ProcessGroup | None = None, *, average: bool = True) -> None:
        super().__init__()
        self.group, self.average = group, average
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.dim, self.hidden, self.num_experts = experts.dim, experts.hidden, experts.num_experts
        self.activation = experts.activation
        self.bounds = shares(experts.num_experts, self.ranks)
        self.first = self.bounds[self.rank]
        here = slice(self.first, self.bounds[self.rank + 1])
        self.up = self._own(experts.up[here])
        self.down = self._own(experts.down[here])
        self.traffic = Traffic(0, 0, 0, 0)
        self._mesh: DeviceMesh | None = None

    def _own(self, weight: Tensor) -> nn.Parameter:
        parameter = nn.Parameter(weight.detach().clone())
        if self.average:
            parameter.register_hook(lambda gradient: gradient / self.ranks)
        return parameter

    @torch.compiler.disable(reason="the numbers of rows that ranks exchange are read on the host")
    def forward(
        self, x: Float[Tensor, "T D"], routing: Routing, *, meanwhile: Callable[[], Tensor] | None = None
    ) -> Float[Tensor, "T D"]:
        """y_t = Σ over the assignments of t of weight · f_expert(x_t), wherever the expert is.

        meanwhile: what to compute while rows are on their way, [T, D]; it is added.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bounds = torch.tensor(self.bounds, device=x.device)
        owner = torch.searchsorted(bounds, routing.expert, right=True) - 1
        here = owner == self.rank
        plan = self._plan(routing, owner, ~here, bounds)
        trip = _Trip(self.group, (plan.rows_out, plan.notes_out), (plan.rows_in, plan.notes_in))
        left = _Leave.apply(trip, x[plan.row_token], routing.weight[plan.order])
        other = None if meanwhile is None else meanwhile()
        rows, weights = _Arrive.apply(trip, *left)
        token = torch.cat([routing.token[here], len(x) + plan.received_row])
        expert = torch.cat([routing.expert[here] - self.first, plan.received_expert])
        weight = torch.cat([routing.weight[here], weights])
        y = self._run(torch.cat([x, rows]), token, expert, weight)
        back = _exchanged(y[len(x) :], _Trip(self.group, (plan.rows_in,), (plan.rows_out,)))
        row = x.shape[1] * x.element_size()
        notes = len(plan.order) * (16 + routing.weight.element_size()) + 16 * (self.ranks - 1)
        self.traffic = Traffic(len(plan.row_token), len(rows), (len(plan.row_token) + len(rows)) * row, notes)
        y = y[: len(x)].index_add(0, plan.row_token, back)
        return y if other is None else y + other

    def _run(self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        if len(self.up) == 0:
            return x * 0  # nothing can have come; the graph stays whole for the exchange backwards
        return expert_mixture(x, token, expert, weight, self.up, self.down, self.activation)

    def _plan(self, routing: Routing, owner: Tensor, remote: Tensor, bounds: Tensor) -> "_Plan":
        """Which rows go where, and what comes. Assignments that leave are sorted by rank, then token."""
        away = remote.nonzero().squeeze(1)
        key = owner[away] * max(routing.num_tokens, 1) + routing.token[away]
        order = key.argsort(stable=True)
        rows, place = torch.unique_consecutive(key[order], return_inverse=True)
        row_rank = rows // max(routing.num_tokens, 1)
        row_counts = torch.bincount(row_rank, minlength=self.ranks)
        note_counts = torch.bincount(owner[away], minlength=self.ranks)
        counts = torch.stack([row_counts, note_counts], 1)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        rows_out, notes_out = counts.T.tolist()
        rows_in, notes_in = arriving.T.tolist()
        starts = row_counts.cumsum(0) - row_counts
        sent = away[order]
        notes = torch.stack([place - starts[owner[sent]], routing.expert[sent] - bounds[owner[sent]]], 1)
        came = _all_to_all(notes, notes_out, notes_in, self.group)
        offsets = (arriving[:, 0].cumsum(0) - arriving[:, 0]).repeat_interleave(arriving[:, 1])
        return _Plan(
            rows % max(routing.num_tokens, 1), sent, rows_out, rows_in, notes_out, notes_in,
            came[:, 0] + offsets, came[:, 1],
        )  # fmt: skip

    def forward_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """f_expert on rows, unweighted, for an expert of this rank. Raises: IndexError for any other."""
        last = self.bounds[self.rank + 1]
        if not self.first <= expert < last:
            raise IndexError(f"expert must be in [{self.first}, {last}), those of rank {self.rank}, got {expert}")
        here = expert - self.first
        return activate(rows @ self.up[here], self.activation) @ self.down[here].mT

    def as_whole(self, part: Shaped[Tensor, "e *rest"]) -> DTensor:
        """A tensor of this rank's experts, such as ``up``, its gradient or a mask, as one of all experts [E, *rest]: a
        DTensor that shares its memory. Raises: ValueError unless every rank has as many experts."""
        if self.num_experts % self.ranks:
            raise ValueError(f"num_experts must be a multiple of the {self.ranks} ranks, got {self.num_experts}")
        if self._mesh is None:
            group = cast(dist.ProcessGroup, self.group or dist.group.WORLD)
            self._mesh = DeviceMesh.from_group(group, part.device.type)
        return DTensor.from_local(part.detach(), self._mesh, [Shard(0)], run_check=False)

    @torch.no_grad()
    def whole(self) -> Experts:
        """All experts, gathered from their ranks; every rank must call it."""
        experts = Experts(self.dim, self.hidden, self.num_experts, activation=self.activation).to(self.up)
        for name, full in experts.named_parameters():
            for rank, (start, stop) in enumerate(itertools.pairwise(self.bounds)):
                part = self.get_parameter(name).clone() if rank == self.rank else torch.empty_like(full[start:stop])
                if stop > start:
                    dist.broadcast(part, group=self.group, group_src=rank)
                full[start:stop] = part
            full.requires_grad_(self.get_parameter(name).requires_grad)
        return experts

    def extra_repr(self) -> str:
        here = f"{self.first}..{self.bounds[self.rank + 1] - 1}"
        return f"dim={self.dim}, hidden={self.hidden}, experts {here} of {self.num_experts}, rank {self.rank}"


@dataclass(frozen=True)
class _Plan:
    """row_token: token of each row that leaves; order: the assignments that leave, in the order of their notes.

    *_out, *_in: how many rows and notes go to, and come from, each rank. received_row, received_expert: for each note
    that came, its row among those that came and the expert here.
    """

    row_token: Int[Tensor, "R"]
    order: Int[Tensor, "N"]
    rows_out: list[int]
    rows_in: list[int]
    notes_out: list[int]
    notes_in: list[int]
    received_row: Int[Tensor, "M"]
    received_expert: Int[Tensor, "M"]


def shares(num_experts: int, ranks: int) -> list[int]:
    """Where each rank's experts start, and the end: consecutive runs, the first E mod R of them one longer.

    >>> shares(5, 3)
    [0, 2, 4, 5]
    """
    at_least("ranks", ranks, 1)
    size, longer = divmod(num_experts, ranks)
    return [0, *itertools.accumulate(size + (rank < longer) for rank in range(ranks))]


class _Trip:
    """Tensors between ranks: rows out[i][rank] of tensor i leave for each rank, into[i][rank] come.

    Holds what travels until :meth:`arrived`: torch.distributed does not.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, out: tuple[list[int], ...], into: tuple[list[int], ...]
    ) -> None:
        self.group, self.out, self.into = group, out, into
        self.works: list[dist.Work] = []
        self.sent: list[Tensor] = []
        self.received: list[Tensor] = []
        self.returning: _Trip | None = None  # that of the gradients, while they travel

    def back(self) -> "_Trip":
        """The same the other way round."""
        return _Trip(self.group, self.into, self.out)

    def leave(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Start, in order. Returns what will be filled by the time that :meth:`arrived` returns."""
        for rows, out, into in zip(tensors, self.out, self.into, strict=True):
            # zeros, as anomaly detection looks at what a backward pass returns before it arrives
            received, rows = rows.new_zeros(sum(into), *rows.shape[1:]), rows.contiguous()
            wire = _wire(received), _wire(rows)
            self.works.append(dist.all_to_all_single(*wire, into, out, group=self.group, async_op=True))
            self.received.append(received)
            self.sent += wire
        return tuple(self.received)

    def arrived(self) -> tuple[Tensor, ...]:
        """What came, once all of it has."""
        for work in self.works:
            work.wait()
        received = tuple(self.received)
        self.works, self.sent, self.received = [], [], []
        return received


class _Leave(torch.autograd.Function):
    """Starts the exchange of tensors, and returns them for :class:`_Arrive` alone. Backward: their gradients came."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *tensors: Tensor) -> Any:
        ctx.trip = trip
        trip.leave(tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.trip.returning.arrived()
        ctx.trip.returning = None
        return None, *gradients


class _Arrive(torch.autograd.Function):
    """Ends the exchange: what came. Backward: starts that of the gradients.

    The backward pass of nodes made between the two lies between theirs, so that it too runs while rows travel.
    """

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *left: Tensor) -> Any:
        ctx.trip = trip
        return trip.arrived()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.trip.returning = ctx.trip.back()
        return None, *ctx.trip.returning.leave(gradients)


def _exchanged(rows: Tensor, trip: _Trip) -> Tensor:
    """rows [Σ out, ...] → [Σ into, ...], those of each rank in the order of the ranks."""
    (received,) = _Arrive.apply(trip, *_Leave.apply(trip, rows))
    return received


def _all_to_all(rows: Tensor, out: list[int], into: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """:func:`_exchanged` of what has no gradient."""
    trip = _Trip(group, (out,), (into,))
    trip.leave((rows,))
    (received,) = trip.arrived()
    return received


def _wire(rows: Tensor) -> Tensor:
    """The same memory in a type that every backend sends: gloo does not know every half-precision one, but bytes."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return rows
    return rows.view(torch.uint8) if rows.numel() else rows.new_empty(len(rows), 0, dtype=torch.uint8)
