"""Routers that take the k most probable experts of a softmax: plain top-k and Switch."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.checks import below_one, positive
from moe.dispatch import limit_capacity
from moe.noise import Noise, Source, drawn
from moe.routers.linear import LinearRouter
from moe.routing import Routing


class TopKRouter(LinearRouter):
    """p = softmax(W x) in float32; each token goes to its k best experts.

    weight = p_e, divided by the sum over the k choices when ``renormalize`` (Mixtral), as it is otherwise (OLMoE).
    A renormalised top-1 weight is always 1 and gives the router no gradient: use :class:`SwitchRouter` for k = 1.
    Raises: ValueError for k outside [1, num_experts]; FloatingPointError for NaN or infinite logits of a real token
    (one reduction over the logits, a device synchronisation on CUDA; asynchronous under torch.compile).

    >>> routing = TopKRouter(8, 4, k=2)(torch.randn(3, 8))
    >>> routing.token.tolist()
    [0, 0, 1, 1, 2, 2]
    """

    def __init__(self, dim: int, num_experts: int, *, k: int, renormalize: bool = True) -> None:
        super().__init__(dim, num_experts, k=k)
        self.renormalize = renormalize

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x. token_ids and generator are not used: the choice depends on x alone, and nothing is drawn."""
        logits = router_logits(x, self.weight, padding_mask)
        return choose_top_k(logits, self.k, renormalize=self.renormalize, real=padding_mask, replay=replay)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, renormalize={self.renormalize}"


class SwitchRouter(LinearRouter):
    """Each token goes to its single best expert, weighted by p_e itself. Fedus et al. 2021 (arXiv:2101.03961).

    capacity_factor: an expert keeps at most ceil(T / E · factor) tokens, in token order; None drops nothing.
    Without jitter and capacity_factor it is ``TopKRouter(k=1, renormalize=False)``.
    jitter ε: in training the router sees x · U(1 − ε, 1 + ε); its seed is drawn from ``generator`` and recorded.
    Raises: as :class:`TopKRouter`; ValueError for jitter outside [0, 1) or a capacity_factor that is not positive.
    """

    def __init__(
        self, dim: int, num_experts: int, *, capacity_factor: float | None = None, jitter: float = 0.0
    ) -> None:
        super().__init__(dim, num_experts, k=1)
        below_one("jitter", jitter)
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        self.capacity_factor, self.jitter = capacity_factor, jitter

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x. token_ids is not used; generator seeds the jitter (default: torch's global CPU generator)."""
        seed = draw_seed(replay, generator, drawn=self.training and self.jitter > 0.0)
        if seed is not None:
            # in float32: a half-precision x near its largest number would overflow
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x * uniform_noise(x, self.jitter, seed)
        logits = router_logits(x, self.weight, padding_mask)
        routing = choose_top_k(logits, 1, renormalize=False, real=padding_mask, replay=replay, noise_seed=seed)
        if self.capacity_factor is None or replay is not None:
            return routing
        return limit_capacity(routing, self.capacity_factor)

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}"
        return f"{sizes}, capacity_factor={self.capacity_factor}, jitter={self.jitter}"


def router_logits(
    x: Float[Tensor, "T D"], weight: Float[Tensor, "E D"], real: Bool[Tensor, "T"] | None = None
) -> Float[Tensor, "T E"]:
    """W x in float32, or float64 if x is, whatever autocast says: bf16 ties would change the chosen expert.

    0 for padding (``real`` False), which is not looked at.
    Raises: ValueError for an x or a mask of another shape; FloatingPointError for non-finite logits of a real token.
    """
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have width dim={weight.shape[1]}, got {x.shape[1]}")
    if real is not None and real.dtype != torch.bool:
        raise ValueError(f"padding_mask must be bool, True for real tokens, got {real.dtype}")
    if real is not None and real.shape[0] != x.shape[0]:
        raise ValueError(f"padding_mask must have one entry for each of {x.shape[0]} tokens, got {real.shape[0]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if real is not None:
        # padding may hold anything: a finite row can overflow too, and 0 · NaN in the weight's gradient is NaN
        x = x.masked_fill(~real[:, None], 0.0)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), weight.to(dtype))
    elif x.shape[0] == 1 and torch.compiler.is_compiling():
        logits = (x.to(dtype) * weight.to(dtype)).sum(-1)[None]  # one fused loop; a product of one row takes longer
    else:
        logits = F.linear(x.to(dtype), weight.to(dtype))
    _require_finite(logits, real)
    return logits


def choose_top_k(
    logits: Float[Tensor, "T E"],
    k: int,
    *,
    renormalize: bool,
    real: Bool[Tensor, "T"] | None = None,
    replay: Routing | None = None,
    noise_seed: int | Noise | None = None,
) -> Routing:
    """The k best experts of each real token, or those of ``replay``, weighted by softmax(logits).

    A replay keeps the recorded assignments, dropped ones included, and takes the weights from these logits,
    so that gradients flow. Raises: ValueError for a replay of other tokens, experts or padding.
    """
    scores = logits.softmax(-1)
    if replay is not None:
        return replay_choice(logits, scores, scores, replay, real=real, renormalize=renormalize)
    # chosen on logits: distinct logits can underflow to equal probabilities
    expert = logits.detach().topk(k, dim=-1).indices
    weight = scores.gather(1, expert)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return record_choice(expert, weight, logits, scores, real=real, noise_seed=noise_seed)


def record_choice(
    expert: Int[Tensor, "T K"],
    weight: Float[Tensor, "T K"],
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    *,
    real: Bool[Tensor, "T"] | None,
    noise_seed: int | Noise | None = None,
) -> Routing:
    """The record of K choices a token, best first, without those of padding."""
    num_tokens, num_experts = logits.shape
    token = torch.arange(num_tokens, device=expert.device)
    if real is not None:
        token, expert, weight = token[real], expert[real], weight[real]
    return Routing(
        token.repeat_interleave(expert.shape[1]), expert.flatten(), weight.flatten(), logits, scores, num_experts,
        num_tokens, dropped=token.new_zeros(0, 2), real=real, noise_seed=noise_seed,
    )  # fmt: skip


def replay_choice(
    logits: Float[Tensor, "T E"],
    scores: Float[Tensor, "T E"],
    gates: Float[Tensor, "T E"],
    replay: Routing,
    *,
    real: Bool[Tensor, "T"] | None,
    renormalize: bool,
) -> Routing:
    """The assignments of ``replay`` with weights from ``gates``, divided by a token's sum over them if asked.

    Dropped choices count in that sum, as they did when they were made.
    Raises: ValueError for a replay of other tokens, experts or padding.
    """
    require_replay_of(logits, replay, real)
    weight = gates[replay.token, replay.expert]
    if renormalize:
        lost = replay.dropped[:, 0]
        total = gates.new_zeros(replay.num_tokens).index_add(0, replay.token, weight)
        total = total.index_add(0, lost, gates[lost, replay.dropped[:, 1]])
        # gates that moved far since the record can all underflow
        weight = weight / total[replay.token].clamp_min(torch.finfo(total.dtype).tiny)
    return dataclasses.replace(replay, weight=weight, logits=logits, scores=scores)


def require_replay_of(logits: Float[Tensor, "T E"], replay: Routing, real: Bool[Tensor, "T"] | None) -> None:
    """Raises: ValueError for a replay of other tokens, experts or padding than those of these logits, and for ids out
    of range or tokens that do not ascend; these are looked at on the CPU only, as elsewhere that waits for the device.
    """
    recorded = (replay.num_tokens, replay.num_experts)
    if recorded != tuple(logits.shape):
        raise ValueError(f"replay must hold (tokens, experts)={tuple(logits.shape)}, got {recorded}")
    _require_same_padding(real, replay)
    if replay.expert.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, ids in (("expert", replay.expert), ("dropped[:, 1]", replay.dropped[:, 1])):
            _require_within(f"replay.{name}", ids, "num_experts", replay.num_experts)
        for name, ids in (("token", replay.token), ("dropped[:, 0]", replay.dropped[:, 0])):
            _require_within(f"replay.{name}", ids, "num_tokens", replay.num_tokens)
        falls = (replay.token.diff() < 0).nonzero()
        if len(falls):
            at = int(falls[0])
            raise ValueError(f"replay.token must ascend, got {replay.token[at : at + 2].tolist()} at assignment {at}")


def _require_within(name: str, ids: Int[Tensor, "N"], bound_name: str, bound: int) -> None:
    if ids.numel():
        least, most = (int(end) for end in ids.aminmax())
        if least < 0 or most >= bound:
            raise ValueError(f"{name} must be in [0, {bound_name}={bound}), got {least if least < 0 else most}")


def draw_seed(replay: Routing | None, generator: Source | None, *, drawn: bool) -> int | Noise | None:
    """The seed of a router's noise, or the :class:`moe.Noise` that is given: the recorded one in a replay, else a new
    one if noise is ``drawn``, else None."""
    if replay is not None:
        return replay.noise_seed
    if not drawn:
        return None
    if isinstance(generator, Noise):
        return generator
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def repeat_draw(routing: Routing) -> None:
    """Move torch's generator on as choosing ``routing`` did, if its noise came from there: for a run that is computed
    again with that choice, and whose later draws must be those of the first."""
    if isinstance(routing.noise_seed, int):
        draw_seed(None, None, drawn=True)


def _require_same_padding(real: Bool[Tensor, "T"] | None, replay: Routing) -> None:
    if real is None or torch.compiler.is_compiling():
        return
    recorded = torch.ones_like(real) if replay.real is None else replay.real
    if recorded.shape == real.shape and not recorded.equal(real):
        raise ValueError(
            f"padding_mask must be the one that replay was recorded with ({replay.padding} padding tokens), "
            f"got one with {int((~real).sum())}"
        )


def uniform_noise(x: Float[Tensor, "T D"], width: float, seed: int | Noise) -> Float[Tensor, "T D"]:
    """U(1 − width, 1 + width) in the shape, dtype and device of x, the same for the same seed."""
    return drawn(seed, x, lambda part, generator: part.uniform_(1.0 - width, 1.0 + width, generator=generator))


def _require_finite(logits: Float[Tensor, "T E"], real: Bool[Tensor, "T"] | None) -> None:
    logits = logits.detach()
    compiling = torch.compiler.is_compiling()
    # one pass for what is nearly always so: a sum meets every NaN and infinity, though finite terms can overflow too
    if not compiling and real is None and math.isfinite(logits.sum().item()):
        return
    finite = logits.isfinite().all(-1)
    if real is not None:
        finite = finite | ~real
    if compiling:
        torch._assert_async(finite.all(), "router logits must be finite, got NaN or infinity")
    elif not finite.all():
        bad = int((~finite).sum())
        raise FloatingPointError(f"router logits must be finite, got NaN or infinity for {bad} of {len(finite)} tokens")
