"""fairscale's GShard layer, both ways: this library's routers as its gates, its weights in this library's layer."""

import copy
import dataclasses
from collections.abc import Callable
from itertools import permutations
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe import noise as draws
from moe.checks import positive
from moe.dispatch import Priority, expert_capacity, group_by_expert, limit_capacity, limit_rows
from moe.experts import Experts
from moe.layer import MoE
from moe.losses import load_balancing_loss
from moe.nonlinearity import Activation
from moe.routers.hash import HashRouter
from moe.routers.linear import LinearRouter
from moe.routers.top_k import draw_seed, record_choice, require_replay_of, router_logits
from moe.routing import Routing

Noise = Literal["always", "training", "never"]
Dropout = Literal["refuse", "leave_out"]
_PROBES = 24  # rows on which an expert and its copy are compared


class FairscaleGate(nn.Module):
    """A router of this library as the ``gate`` of ``fairscale.nn.MOELayer``.

    forward(x [S, M]) → (l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C]): entry (s, e, c) says with what
    weight token s sits in place c of expert e. C is the largest load, over the ranks of ``group`` where there are
    several (one all-reduce), for all ranks must exchange blocks of one shape.
    router: for all experts of all ranks. It sees no padding mask and no token ids: a hash router cannot serve.
    capacity_factor, drop_priority: as in :class:`moe.MoE`; None keeps every assignment. loss: of the routing, l_aux.
    The routing of the last call stays in ``.routing``, with its graph, for further losses; a copy of the gate has none.
    Raises: ValueError for a hash router, or a capacity_factor that is not finite and positive.

    >>> layer = MOELayer(FairscaleGate(TopKRouter(8, 4, k=2)), nn.ModuleList(experts))
    """

    def __init__(
        self,
        router: nn.Module,
        *,
        capacity_factor: float | None = None,
        drop_priority: Priority = "first_come",
        loss: Callable[[Routing], Tensor] = load_balancing_loss,
        group: Any = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        if any(isinstance(module, HashRouter) for module in router.modules()):
            raise ValueError(
                "router must choose by x alone, all that fairscale's MOELayer gives its gate, "
                "got HashRouter, which reads token_ids: use it in moe.MoE"
            )
        self.router, self.capacity_factor, self.drop_priority = router, capacity_factor, drop_priority
        self.loss, self.group = loss, group
        self.routing: Routing | None = None

    def forward(
        self, x: Float[Tensor, "S M"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "S E C"], Bool[Tensor, "S E C"]]:
        """Route x and lay the assignments out by expert and place."""
        routing = self.router(x)
        if self.capacity_factor is not None:
            routing = limit_capacity(routing, self.capacity_factor, priority=self.drop_priority)
        self.routing = routing
        place = _places(routing)
        shape = (routing.num_tokens, routing.num_experts, self._capacity(routing))
        where = (routing.token, routing.expert, place)
        combine = x.new_zeros(shape).index_put(where, routing.weight.to(x.dtype))
        dispatch = x.new_zeros(shape, dtype=torch.bool).index_put(where, x.new_ones((), dtype=torch.bool))
        return self.loss(routing).to(x.dtype), combine, dispatch

    def __getstate__(self) -> dict[str, Any]:
        # the last routing holds a graph, which nothing can copy: a copy starts without one
        return self.__dict__ | {"routing": None}

    def _capacity(self, routing: Routing) -> int:
        most = routing.loads().max().clamp_min(1)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size(self.group) > 1:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(most)

    def extra_repr(self) -> str:
        return f"capacity_factor={self.capacity_factor}, drop_priority={self.drop_priority!r}"


def _places(routing: Routing) -> Int[Tensor, "N"]:
    """How many assignments of the same expert stand before each."""
    groups = group_by_expert(routing.token, routing.expert, routing.num_experts)
    starts = groups.counts.cumsum(0) - groups.counts
    rows = torch.arange(groups.order.shape[0], device=groups.order.device)
    return torch.empty_like(rows).scatter_(0, groups.order, rows - starts[routing.expert[groups.order]])


class GumbelTop2Router(LinearRouter):
    """fairscale's ``Top2Gate``: the best expert, and a second one drawn in proportion to the others' probabilities.

    p = softmax(W x); e₁ = argmax p; e₂ = argmax over e ≠ e₁ of logit_e + Gumbel(0, 1), so that P(e₂ = e) =
    p_e / (1 − p_e₁). An expert keeps ceil(2T / E · capacity_factor) assignments, every first choice before any second
    one (None: all). The weights are then p over the sum of what the token *kept*, unlike :class:`moe.Top2Router`,
    which divides by both choices, takes the second best, and leaves it out by chance.
    noise: "always" draws in evaluation too, as fairscale does; "training" or "never" take the second best instead.
    Load balancing counts first choices; fairscale's l_aux is load_balancing_loss(routing) / E².
    Raises: ValueError for fewer than two experts, another ``noise`` or a capacity_factor that is not positive;
    FloatingPointError as :class:`moe.TopKRouter`.
    """

    def __init__(
        self, dim: int, num_experts: int, *, capacity_factor: float | None = 1.0, noise: Noise = "always"
    ) -> None:
        if num_experts < 2:
            raise ValueError(f"num_experts must be >= 2, got {num_experts}")
        super().__init__(dim, num_experts, k=2)
        if noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {noise!r}")
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        self.capacity_factor, self.noise = capacity_factor, noise

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: draws.Source | None = None,
    ) -> Routing:
        """Route x. token_ids is not used; generator seeds the draw (default: torch's global CPU generator)."""
        logits = router_logits(x, self.weight, padding_mask)
        scores = logits.softmax(-1)
        if replay is not None:
            require_replay_of(logits, replay, padding_mask)
            return _weighted(dataclasses.replace(replay, logits=logits, scores=scores))
        drawn = self.noise == "always" or (self.noise == "training" and self.training)
        seed = draw_seed(None, generator, drawn=drawn)
        pair = _choose_pair(logits.detach(), seed)
        routing = record_choice(pair, scores.new_zeros(pair.shape), logits, scores, real=padding_mask, noise_seed=seed)
        routing = dataclasses.replace(routing, balance_first=True)
        if self.capacity_factor is not None:
            rows = expert_capacity(routing.token.shape[0], self.num_experts, self.capacity_factor)
            routing = limit_rows(routing, rows, priority="choice")
        return _weighted(routing)

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}"
        return f"{sizes}, capacity_factor={self.capacity_factor}, noise={self.noise!r}"


def gumbel_noise(like: Float[Tensor, "T E"], seed: int | draws.Noise) -> Float[Tensor, "T E"]:
    """−ln(−ln U) in the shape, type and device of ``like``, the same for the same seed."""
    return -draws.drawn(seed, like, lambda part, generator: part.exponential_(generator=generator)).log()


def _choose_pair(logits: Float[Tensor, "T E"], seed: int | draws.Noise | None) -> Int[Tensor, "T 2"]:
    first = logits.argmax(-1, keepdim=True)
    noisy = logits if seed is None else logits + gumbel_noise(logits, seed)
    second = noisy.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)
    return torch.cat([first, second], dim=1)


def _weighted(routing: Routing) -> Routing:
    """p_e over the token's sum of p over the assignments that it kept."""
    gate = routing.scores[routing.token, routing.expert]
    total = gate.new_zeros(routing.num_tokens).index_add(0, routing.token, gate)
    return dataclasses.replace(routing, weight=gate / total[routing.token].clamp_min(torch.finfo(total.dtype).eps))


@torch.no_grad()
def from_fairscale(
    layer: nn.Module,
    *,
    capacity_factor: float | None = 1.0,
    noise: Noise = "always",
    dropout: Dropout = "refuse",
) -> MoE:
    """A :class:`moe.MoE` with copies of the weights of a ``fairscale.nn.MOELayer``, equal to it in output.

    layer: all experts in one process, gated by ``Top2Gate`` (or :class:`FairscaleGate`, whose router and capacity are
    taken over). Each expert is a module of two Linears that computes down(act(up x)), act being exact GELU, ReLU, SiLU
    or ReLU², or of three, down(silu(gate x) ⊙ up x), whatever their names; which Linear is which, and the activation,
    are found by comparing float64 copies with random weights on random rows. The Linears may have biases: if one has,
    all experts get them, and those that there are not start as zeros and learn. Experts of another function, such as
    tanh-GELU or a lone Linear, are refused.
    dropout: :class:`moe.Experts` has none. Experts that drop in training (p > 0) are refused, or with "leave_out" read
    without it: the same in evaluation, not in training.
    capacity_factor 1 is fairscale's own capacity 2S/E: what is dropped, and the weights of what is kept, are the same
    too. None drops nothing. noise: see :class:`GumbelTop2Router`. The draws come from other generators: outputs are
    equal where the second experts are, as they always are with two experts.
    Raises: ImportError without fairscale; TypeError for another layer; ValueError for a gate or expert without an
    equal here, for dropout, and for experts on several ranks.
    """
    if dropout not in get_args(Dropout):
        raise ValueError(f"dropout must be one of {', '.join(get_args(Dropout))}, got {dropout!r}")
    if not isinstance(layer, _moe_layer_class()):
        raise TypeError(f"layer must be a fairscale.nn.MOELayer, got {type(layer).__name__}")
    gate, experts = cast(nn.Module, layer.gate), list(cast(nn.ModuleList, layer.experts))
    router, options = _read_gate(gate, capacity_factor, noise)
    if router.num_experts != len(experts):
        raise ValueError(
            f"layer must hold all num_experts={router.num_experts} experts of its gate, got {len(experts)}: "
            f"gather those of the other ranks first"
        )
    dim = cast(int, router.dim)
    read = [_read_expert(expert, dim, f"experts.{index}", dropout) for index, expert in enumerate(experts)]
    sizes = {(e.hidden, e.activation) for e in read}
    if len(sizes) > 1:
        raise ValueError(f"experts must be alike in hidden neurons and activation, got {sorted(sizes)}")
    first, bias = read[0], any(e.up_bias is not None for e in read)
    moe = MoE(dim, first.hidden, len(read), router, activation=first.activation, bias=bias, **options).to(first.up)
    for name, stacked in moe.experts.named_parameters():
        for expert, one in zip(stacked, read, strict=True):
            values = getattr(one, name)
            expert.copy_(torch.zeros_like(expert) if values is None else values[0])
    return moe.train(layer.training)


def _moe_layer_class() -> type[nn.Module]:
    try:
        from fairscale.nn import MOELayer
    except ImportError as error:
        raise ImportError("fairscale is missing: pip install 'sparse-transformers[fairscale]'") from error
    return MOELayer


def _read_gate(gate: nn.Module, capacity_factor: float | None, noise: Noise) -> tuple[nn.Module, dict[str, Any]]:
    """The router, and what the layer needs to know of its capacity."""
    if isinstance(gate, FairscaleGate):
        limits = {"capacity_factor": gate.capacity_factor, "drop_priority": gate.drop_priority}
        return copy.deepcopy(gate.router), limits
    weight = getattr(getattr(gate, "wg", None), "weight", None)
    if type(gate).__name__ != "Top2Gate" or weight is None:
        raise ValueError(f"gate must be fairscale's Top2Gate or a FairscaleGate, got {type(gate).__name__}")
    router = GumbelTop2Router(weight.shape[1], weight.shape[0], capacity_factor=capacity_factor, noise=noise)
    router.weight.copy_(weight)
    return router, {}


def _read_expert(expert: nn.Module, dim: int, name: str, dropout: Dropout) -> Experts:
    """One expert as stacked weights, [1, D, …]. Raises: ValueError if it computes something else, or drops."""
    linears = _linears(expert)
    known = {id(parameter) for linear in linears for parameter in linear.parameters()}
    others = [where for where, parameter in expert.named_parameters() if id(parameter) not in known]
    if others or len(linears) not in (2, 3):
        found = f"{len(linears)} Linears" + (f" and {', '.join(others)}" if others else "")
        raise ValueError(f"{name} must consist of two or three Linears and an activation between them, got {found}")
    generator = torch.Generator().manual_seed(0)
    drawn = copy.deepcopy(expert).double().eval()
    # the function is told by weights that no training has shaped: all matrices that are 0 would look alike
    for parameter in drawn.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    rows = torch.randn(_PROBES, dim, generator=generator, dtype=torch.float64) * torch.logspace(0, 1, _PROBES)[:, None]
    rows = rows.to(linears[0].weight.device)
    if dropout == "refuse":
        _require_no_dropout(drawn, rows, name)
    for order in permutations(range(len(linears))):
        for activation in ("swiglu",) if len(linears) == 3 else ("gelu", "relu", "silu", "relu2"):
            copied = _stacked([_linears(drawn)[i] for i in order], dim, cast(Activation, activation))
            if copied is None:
                continue
            again = copied.forward_one(0, rows)
            if torch.allclose(drawn(rows), again, rtol=1e-9, atol=1e-9 * float(again.abs().max())):
                return cast(Experts, _stacked([linears[i] for i in order], dim, cast(Activation, activation)))
    raise ValueError(
        f"{name} must be down(act(up x)), act being exact GELU, ReLU, SiLU or ReLU², or down(silu(gate x) ⊙ up x): got "
        f"another function of its {len(linears)} Linears"
    )


def _linears(expert: nn.Module) -> list[nn.Linear]:
    return [module for module in expert.modules() if isinstance(module, nn.Linear)]


def _require_no_dropout(expert: nn.Module, rows: Float[Tensor, "n D"], name: str) -> None:
    """Raises: ValueError for a dropout module with p > 0, or outputs that differ in training (functional dropout)."""
    more = "pass dropout='leave_out' for a layer that computes as this one does in evaluation"
    for where, module in expert.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{name}.{where} must not drop, as moe.Experts has no dropout, got p={module.p}: {more}")
    if not torch.allclose(copy.deepcopy(expert).train()(rows), expert(rows)):
        raise ValueError(f"{name} must compute the same in training and in evaluation, got other outputs: {more}")


def _stacked(linears: list[nn.Linear], dim: int, activation: Activation) -> Experts | None:
    """The expert whose gate, up and down (or up and down) these Linears are; None where their shapes forbid it."""
    *ups, down = linears
    hidden = ups[0].out_features
    if any(up.weight.shape != (hidden, dim) for up in ups) or down.weight.shape != (dim, hidden):
        return None
    bias = any(linear.bias is not None for linear in linears)
    experts = Experts(dim, hidden, 1, activation=activation, bias=bias).to(down.weight)
    experts.up.copy_(torch.cat([up.weight for up in ups]).mT[None])
    experts.down.copy_(down.weight[None])
    if experts.up_bias is not None and experts.down_bias is not None:
        experts.up_bias.copy_(torch.cat([_bias(up) for up in ups])[None])
        experts.down_bias.copy_(_bias(down)[None])
    return experts


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
