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

The host reads the numbers of step 1, once and together: they size what is received. Nothing else of the plan waits for
the device. The experts' product reads how many rows each of them got, as it does in one process (:mod:`moe.grouped`).
"""

import functools
import itertools
import operator
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
from moe.experts import Experts, output_of
from moe.grouped import expert_mixture
from moe.layer import MoE
from moe.routing import Routing, count_experts

# what a rank says along with its numbers of rows: gradients of rows and weights, or of its experts, are wanted
ROWS_LEARN, EXPERTS_LEARN = 1, 2


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
        found += [f"{prefix}experts.{name}" for name, _ in layer.experts.named_parameters(recurse=False)]
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

    up [E_here, D, G·F], down [E_here, D, F] and biases: as :class:`moe.experts.Experts`. num_experts counts those of
    all ranks, ``first`` is the index of the first one here. ``traffic`` tells what the last forward pass sent.
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
        self.up, self.down = self._own(experts.up), self._own(experts.down)
        biases = (experts.up_bias, experts.down_bias)
        self.up_bias, self.down_bias = (None if bias is None else self._own(bias) for bias in biases)
        self.traffic = Traffic(0, 0, 0, 0)
        self._mesh: DeviceMesh | None = None
        self._starts: Tensor | None = None

    def _own(self, weight: nn.Parameter) -> nn.Parameter:
        parameter = nn.Parameter(weight.detach()[self.first : self.bounds[self.rank + 1]].clone())
        if self.average:
            parameter.register_hook(lambda gradient: gradient / self.ranks)
        # last, as only what learns takes a hook, which then waits for the parameter to learn again
        parameter.requires_grad_(weight.requires_grad)
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
        plan = self._plan(routing, self._learning(x, routing))
        weight = routing.weight.index_select(0, plan.order)
        stays = plan.order[plan.leaving :]
        trip = _Trip(self.group, (plan.rows_out, plan.notes_out), (plan.rows_in, plan.notes_in))
        anchor = _anchor(x, learns=bool(plan.learning & ROWS_LEARN))
        left = _Leave.apply(trip, anchor, plan.row_token, x, weight[: plan.leaving])
        other = None if meanwhile is None else meanwhile()
        rows, weights = _Arrive.apply(trip, *left)
        token = torch.cat([routing.token[stays], len(x) + plan.received_row])
        expert = torch.cat([routing.expert[stays] - self.first, plan.received_expert])
        y = self._run(rows, token, expert, torch.cat([weight[plan.leaving :], weights]))
        trip, anchor = _Trip(self.group, (plan.rows_in,), (plan.rows_out,)), _anchor(x, learns=plan.learning > 0)
        y = _Combine.apply(trip, anchor, plan.row_token, y)
        out, returned = len(plan.row_token), len(rows) - len(x)
        notes = plan.leaving * (16 + routing.weight.element_size()) + 16 * (self.ranks - 1)
        self.traffic = Traffic(out, returned, (out + returned) * x.shape[1] * x.element_size(), notes)
        return y if other is None else y + other

    def _run(self, x: Tensor, token: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        if len(self.up) == 0:
            # nothing can have come; zeros, whatever padding holds, that keep the graph whole for the way back
            return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0.0)
        held = (self.up, self.down, self.activation, self.up_bias, self.down_bias)
        return expert_mixture(x, token, expert, weight, *held)

    def _learning(self, x: Tensor, routing: Routing) -> int:
        if not torch.is_grad_enabled():
            return 0
        experts = len(self.up) > 0 and any(parameter.requires_grad for parameter in self.parameters())
        return ROWS_LEARN * (x.requires_grad or routing.weight.requires_grad) | EXPERTS_LEARN * experts

    def _plan(self, routing: Routing, learning: int) -> "_Plan":
        """Which rows go where, and what comes. Assignments that leave are sorted by rank, then token; then come those
        that stay, by token."""
        if self._starts is None or self._starts.device != routing.expert.device:
            self._starts = torch.tensor(self.bounds, device=routing.expert.device)
        starts = self._starts
        owner = torch.searchsorted(starts, routing.expert, right=True) - 1
        rank = owner.masked_fill(owner == self.rank, self.ranks)  # where it goes; those that stay are last
        key, order = (rank * max(routing.num_tokens, 1) + routing.token).sort(stable=True)
        fresh = torch.ones_like(key)  # 1 where another row begins
        fresh[1:] = key[1:] != key[:-1]
        row_counts = torch.zeros_like(starts).scatter_add_(0, rank[order], fresh)[: self.ranks]
        counts = torch.stack([4 * row_counts + learning, count_experts(rank, self.ranks + 1)[: self.ranks]], 1)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        out, into = torch.stack([counts, arriving]).tolist()  # the one read of the host
        rows_out, rows_in = ([number >> 2 for number, _ in numbers] for numbers in (out, into))
        notes_out, notes_in = ([number for _, number in numbers] for numbers in (out, into))
        sent = order[: sum(notes_out)]
        place = (fresh.cumsum(0) - 1)[: len(sent)]
        notes = torch.stack([place - _before(row_counts)[owner[sent]], routing.expert[sent] - starts[owner[sent]]], 1)
        came = _all_to_all(notes, notes_out, notes_in, self.group)
        ends = arriving[:, 1].cumsum(0)
        sender = torch.searchsorted(ends, torch.arange(len(came), device=ends.device), right=True)
        wanted = functools.reduce(operator.or_, (number & 3 for number, _ in into))
        row_token = routing.token.new_zeros(sum(rows_out)).scatter_(0, place, routing.token[sent])
        return _Plan(
            row_token, order, len(sent), rows_out, rows_in, notes_out, notes_in,
            came[:, 0] + _before(arriving[:, 0] >> 2)[sender], came[:, 1], wanted,
        )  # fmt: skip

    def forward_one(self, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """f_expert on rows, unweighted, for an expert of this rank. Raises: IndexError for any other."""
        last = self.bounds[self.rank + 1]
        if not self.first <= expert < last:
            raise IndexError(f"expert must be in [{self.first}, {last}), those of rank {self.rank}, got {expert}")
        return output_of(self, expert - self.first, rows)

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
        bias = self.up_bias is not None
        experts = Experts(self.dim, self.hidden, self.num_experts, activation=self.activation, bias=bias).to(self.up)
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
    """row_token: token of each row that leaves; order: the assignments, first the ``leaving`` ones in the order of
    their notes, then those that stay.

    *_out, *_in: how many rows and notes go to, and come from, each rank. received_row, received_expert: for each note
    that came, its row among those that came and the expert here. learning: what the ranks together want.
    """

    row_token: Int[Tensor, "R"]
    order: Int[Tensor, "N"]
    leaving: int
    rows_out: list[int]
    rows_in: list[int]
    notes_out: list[int]
    notes_in: list[int]
    received_row: Int[Tensor, "M"]
    received_expert: Int[Tensor, "M"]
    learning: int


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
        self.joined: Tensor | None = None  # a rank's own rows, and behind them room for those that come
        self.returning: _Trip | None = None  # that of the gradients, while they travel

    def back(self) -> "_Trip":
        """The same the other way round."""
        return _Trip(self.group, self.into, self.out)

    def leave(self, *tensors: Tensor, room: Tensor | None = None) -> tuple[Tensor, ...]:
        """Start, in order. Returns what will be filled once :meth:`arrived` returns. room: memory for the first."""
        for rows, out, into in zip(tensors, self.out, self.into, strict=True):
            # zeros, as anomaly detection looks at what a backward pass returns before it arrives
            received = rows.new_zeros(sum(into), *rows.shape[1:]) if room is None else room
            room = None
            wire = _wire(received), _wire(rows.contiguous())
            self.works.append(dist.all_to_all_single(*wire, into, out, group=self.group, async_op=True))
            self.received.append(received)
            self.sent += wire
        return tuple(self.received)

    def spread(self, own: Tensor, row_token: Tensor, *more: Tensor) -> None:
        """Start with own[row_token], which what comes joins behind ``own``; ``own`` is copied meanwhile."""
        self.joined = own.new_empty(len(own) + sum(self.into[0]), own.shape[1])
        self.leave(own.index_select(0, row_token), *more, room=self.joined[len(own) :])
        self.joined[: len(own)] = own

    def gathered(self) -> Tensor:
        """What :meth:`spread` joins, once all of it is there."""
        assert self.joined is not None
        joined, self.joined = self.joined, None
        return joined

    def arrived(self) -> tuple[Tensor, ...]:
        """What came, once all of it has."""
        for work in self.works:
            work.wait()
        received = tuple(self.received)
        self.works, self.sent, self.received = [], [], []
        return received


class _Leave(torch.autograd.Function):
    """Starts the exchange of the rows x[row_token] and of the weights of what leaves; returns x and the weights for
    :class:`_Arrive` alone. Backward: the gradients of the rows came, and are added to those of x.

    anchor: learns if the tensors of any rank do, so that all take part in the exchange of gradients.
    """

    @staticmethod
    def forward(ctx: Any, trip: _Trip, anchor: Tensor, row_token: Tensor, x: Tensor, weight: Tensor) -> Any:
        ctx.trip, ctx.row_token = trip, row_token
        trip.spread(x, row_token, weight)
        return x.view_as(x), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor, d_weight: Tensor) -> Any:
        came, _ = ctx.trip.returning.arrived()
        ctx.trip.returning = None
        if ctx.needs_input_grad[3]:
            d_x.index_add_(0, ctx.row_token, came)  # in place: _Arrive made it, and nothing else has it
        return None, None, None, d_x, d_weight


class _Arrive(torch.autograd.Function):
    """Ends the exchange: x with the rows that came behind it, and their weights. Backward: starts that of gradients.

    The backward pass of nodes made between the two lies between theirs, so that it too runs while rows travel.
    """

    @staticmethod
    def forward(ctx: Any, trip: _Trip, x: Tensor, weight: Tensor) -> Any:
        ctx.trip, ctx.own = trip, len(x)
        _, weights = trip.arrived()
        return trip.gathered(), weights

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_weights: Tensor) -> Any:
        ctx.trip.returning = ctx.trip.back()
        _, d_weight = ctx.trip.returning.leave(d_rows[ctx.own :], d_weights)
        return None, d_rows[: ctx.own], d_weight


class _Combine(torch.autograd.Function):
    """Results of the rows that came go back, and those that come back are added to their tokens' own, in place; the
    rank's own ones are the first. Backward: the adjoint, which spreads the gradient as :class:`_Leave` does x."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, anchor: Tensor, row_token: Tensor, y: Tensor) -> Any:
        ctx.trip, ctx.row_token = trip, row_token
        own, others = y.split([len(y) - sum(trip.out[0]), sum(trip.out[0])])
        trip.leave(others)
        (came,) = trip.arrived()
        return own.index_add_(0, row_token, came).detach()  # detached: no view, so that it may be changed in place

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        trip = ctx.trip.back()
        trip.spread(d_y, ctx.row_token)
        trip.arrived()
        return None, None, None, trip.gathered()


def _anchor(x: Tensor, *, learns: bool) -> Tensor:
    return x.new_empty(0).requires_grad_(learns)


def _before(counts: Int[Tensor, "R"]) -> Int[Tensor, "R"]:
    """How many come before those of each rank."""
    return counts.cumsum(0) - counts


def _all_to_all(rows: Tensor, out: list[int], into: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """rows [Σ out, ...] → [Σ into, ...], those of each rank in the order of the ranks; without gradient."""
    trip = _Trip(group, (out,), (into,))
    trip.leave(rows)
    (received,) = trip.arrived()
    return received


def _wire(rows: Tensor) -> Tensor:
    """The same memory in a type that every backend sends: gloo does not know every half-precision one, but bytes."""
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return rows
    return rows.view(torch.uint8) if rows.numel() else rows.new_empty(len(rows), 0, dtype=torch.uint8)
