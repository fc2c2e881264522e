"""The top-2 gate of GShard, whose second expert is used at random in proportion to its gate."""

import dataclasses
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.checks import positive
from moe.dispatch import limit_capacity
from moe.noise import Noise, Source, drawn
from moe.routers.linear import LinearRouter
from moe.routers.top_k import choose_top_k, draw_seed, require_replay_of, router_logits
from moe.routing import Routing

Second = Literal["random", "always"]


class Top2Router(LinearRouter):
    """p = softmax(W x) in float32; a token goes to its best expert, and to the second with probability min(1, 2·g₂).

    g₁, g₂ = p₁, p₂ divided by p₁ + p₂, whether or not the second is used.
    second: "random" draws in training, from a seed that ``generator`` gives and the record keeps; in evaluation, and
    always with "always", both experts are used: then it is ``TopKRouter(k=2)``, but for the balance loss.
    capacity_factor: an expert keeps at most ceil(2T / E · factor) assignments, T the real tokens; every token's first
    choice goes before any second one, then tokens go in order. None drops nothing.
    Load balancing counts first choices only: Routing.balance_first is set. GShard, algorithm 1 (arXiv:2006.16668).
    Raises: ValueError for fewer than two experts, another ``second`` or a capacity_factor that is not positive;
    FloatingPointError as :class:`TopKRouter`.
    """

    def __init__(
        self, dim: int, num_experts: int, *, second: Second = "random", capacity_factor: float | None = None
    ) -> None:
        if num_experts < 2:
            raise ValueError(f"num_experts must be >= 2, got {num_experts}")
        super().__init__(dim, num_experts, k=2)
        if second not in get_args(Second):
            raise ValueError(f"second must be one of {', '.join(get_args(Second))}, got {second!r}")
        if capacity_factor is not None:
            positive("capacity_factor", capacity_factor)
        self.second, self.capacity_factor = second, capacity_factor

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x. token_ids is not used; generator seeds the draw (default: torch's global CPU generator)."""
        logits = router_logits(x, self.weight, padding_mask)
        if replay is not None:
            return _replay_pairs(logits, replay, padding_mask)
        seed = draw_seed(None, generator, drawn=self.training and self.second == "random")
        routing = choose_top_k(logits, 2, renormalize=True, real=padding_mask, noise_seed=seed)
        routing = dataclasses.replace(routing, balance_first=True)
        if seed is not None:
            routing = _skip_seconds(routing, seed)
        if self.capacity_factor is None:
            return routing
        return limit_capacity(routing, self.capacity_factor, priority="choice")

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}"
        return f"{sizes}, second={self.second!r}, capacity_factor={self.capacity_factor}"


def _skip_seconds(routing: Routing, seed: int | Noise) -> Routing:
    """Keep each second assignment where 2 · weight > U(0, 1); first ones stay."""
    gates = routing.weight.detach().view(-1, 2)
    # keyed, padding has numbers too: what a token gets depends on its place in its sequence alone
    keyed = isinstance(seed, Noise)
    like = gates.new_empty(routing.num_tokens if keyed else len(gates))
    draw = drawn(seed, like, lambda part, generator: part.uniform_(generator=generator))
    keep = torch.ones_like(gates, dtype=torch.bool)
    keep[:, 1] = 2 * gates[:, 1] > (draw[routing.token[::2]] if keyed else draw)
    used = keep.view(-1)
    token, expert, weight = routing.token[used], routing.expert[used], routing.weight[used]
    skipped = used.shape[0] - token.shape[0]
    return dataclasses.replace(routing, token=token, expert=expert, weight=weight, skipped=skipped)


def _replay_pairs(logits: Float[Tensor, "T E"], replay: Routing, real: Bool[Tensor, "T"] | None) -> Routing:
    """The recorded assignments, weighted by p_e over the sum of the token's two.

    A record does not hold a second expert that was not used: the best other expert by these logits stands for it.
    """
    require_replay_of(logits, replay, real)
    scores = logits.softmax(-1)
    token = torch.cat([replay.token, replay.dropped[:, 0]])
    expert = torch.cat([replay.expert, replay.dropped[:, 1]])
    recorded = torch.zeros_like(scores, dtype=torch.bool).index_put((token, expert), torch.ones_like(token).bool())
    alone = recorded.sum(-1, keepdim=True) == 1
    rest = scores.masked_fill(recorded, 0.0)
    total = torch.where(recorded, scores, 0.0).sum(-1) + torch.where(alone, rest, 0.0).amax(-1)
    weight = scores[replay.token, replay.expert] / total[replay.token].clamp_min(torch.finfo(total.dtype).tiny)
    return dataclasses.replace(replay, weight=weight, logits=logits, scores=scores)
