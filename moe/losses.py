"""Side losses of a router. They are returned values: the caller adds them to the loss with a coefficient."""

import math
from typing import Literal, get_args

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from moe.routing import Routing, count_experts, mean_over_real

Scope = Literal["micro_batch", "sequence", "global"]


def load_balancing_loss(
    routing: Routing,
    *,
    scope: Scope = "micro_batch",
    sequences: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """L = E · Σ_e f_e P_e, equal to 1 under uniform routing and up to E under collapse.

    f_e: share of the choices that fell on e, counted before capacity drops any, so that Σ f_e = 1 for every K; first
    choices only where the router asks for that (``routing.balance_first``, GShard, arXiv:2006.16668).
    P_e: mean router probability of e. Padding counts in neither. Only P carries a gradient.
    Fedus et al. 2021, eq. 4-6 (arXiv:2101.03961). 0 where no token is real.

    scope: what f and P are taken over. "micro_batch": these tokens. "sequence": each of ``sequences`` equal runs of
    tokens, then the mean over those with a real token (DeepSeek-V3, eq. 17-20, arXiv:2412.19437).
    "global": the tokens of every process of ``group`` (default: all), with f summed over them (arXiv:2501.11873);
    a process returns its share, the means over processes of loss and gradient being those of the whole batch.
    It is a collective: every process must call it. Without torch.distributed it equals "micro_batch".
    Raises: ValueError for another scope, and unless ``sequences`` is given with its scope alone and divides T.
    """
    _check_scope(routing, scope, sequences)
    if scope == "sequence":
        return _balance_each(routing, sequences or 1)
    share = count_experts(_balanced_pairs(routing)[1], routing.num_experts).to(routing.scores.dtype)
    probability = mean_over_real(routing.scores, routing.real)
    if scope == "global" and dist.is_available() and dist.is_initialized():
        tokens = _real_tokens(routing)
        sums = torch.cat([share, tokens[None]])
        dist.all_reduce(sums, group=group)
        share = sums[:-1]
        # the mean over processes of P_r · n_r · R / n is P over the whole batch; DDP takes that mean
        probability = probability * (tokens * dist.get_world_size(group) / sums[-1].clamp_min(1))
    return routing.num_experts * (share / share.sum().clamp_min(1) * probability).sum()


def router_z_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = mean over real tokens of (ln Σ_e exp logit_e)², which keeps logits small. ST-MoE (arXiv:2202.08906)."""
    squared = routing.logits.logsumexp(-1, keepdim=True).square()
    return mean_over_real(squared, routing.real).squeeze(0)


def importance_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = CV²(importance), importance_e = Σ_t weight_te: 0 where all experts get equal weight, E − 1 under collapse.

    Sums the weights of the assignments that are carried out. Shazeer et al. 2017, eq. 6-7 (arXiv:1701.06538).
    """
    importance = routing.weight.new_zeros(routing.num_experts).index_add(0, routing.expert, routing.weight)
    return squared_variation(importance)


def load_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = CV²(load), load the smooth estimate of a noisy router. Shazeer et al. 2017, eq. 11 (arXiv:1701.06538).

    Raises: ValueError for the routing of a router that estimates none.
    """
    if routing.smooth_load is None:
        raise ValueError("load_loss needs routing.smooth_load, which NoisyTopKRouter gives, got None")
    return squared_variation(routing.smooth_load)


def entropy_loss(routing: Routing) -> Float[Tensor, ""]:
    """L = ln E − H(P) in nats, P the mean router probability of real tokens: 0 if uniform, ln E under collapse.

    It spreads the batch over the experts and leaves each token free to be certain; the mean entropy of the tokens
    themselves is :meth:`Routing.entropy`. 0 where no token is real.
    """
    probability = mean_over_real(routing.scores, routing.real)
    # P sums to 1, or to 0 without real tokens, where the loss is 0; the clamp keeps ln 0 out of the gradient
    surprise = probability.clamp_min(torch.finfo(probability.dtype).tiny).log()
    return (probability * (surprise + math.log(routing.num_experts))).sum()


def squared_variation(values: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """CV² = variance / mean², the variance over all E values; 0 where they sum to 0."""
    # of values of any size: squares leave the range of floats long before their ratio does
    size = values.detach().abs().amax() if values.numel() else values.new_ones(())
    values = values / torch.where(size > 0, size, 1.0)
    mean = values.mean()
    nothing = mean == 0
    return (values - mean).square().mean() / torch.where(nothing, 1.0, mean).square()


def _balance_each(routing: Routing, sequences: int) -> Float[Tensor, ""]:
    """Mean over the sequences that hold a real token of E · Σ_e f_se P_se."""
    experts = routing.num_experts
    # f counts the experts of highest score, as many as were chosen: a balancing bias has no part in it
    wanted = count_experts(_balanced_pairs(routing)[0], routing.num_tokens)
    best = routing.scores.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < wanted[:, None]
    choices = rearrange(best, "(s l) e -> s l e", s=sequences).sum(1).to(routing.scores.dtype)
    real = routing.scores.new_ones(routing.num_tokens) if routing.real is None else routing.real
    tokens = rearrange(real, "(s l) -> s l", s=sequences).sum(-1, keepdim=True)
    scores = torch.where(real.bool()[:, None], routing.scores, 0.0)
    probability = rearrange(scores, "(s l) e -> s l e", s=sequences).sum(1) / tokens.clamp_min(1)
    share = choices / choices.sum(-1, keepdim=True).clamp_min(1)
    return experts * (share * probability).sum() / (tokens > 0).sum().clamp_min(1)


def _balanced_pairs(routing: Routing) -> tuple[Int[Tensor, "C"], Int[Tensor, "C"]]:
    """Token and expert of the choices that f counts: all of them, dropped ones too, or each token's best."""
    token = torch.cat([routing.token, routing.dropped[:, 0]])
    expert = torch.cat([routing.expert, routing.dropped[:, 1]])
    if not routing.balance_first:
        return token, expert
    scores = routing.scores.detach()
    best = scores.new_full(scores.shape, -1.0).index_put((token, expert), scores[token, expert])
    routed = (best >= 0).any(-1).nonzero().squeeze(-1)
    return routed, best.argmax(-1)[routed]


def _real_tokens(routing: Routing) -> Float[Tensor, ""]:
    if routing.real is None:
        return routing.scores.new_tensor(float(routing.num_tokens))
    return routing.real.sum().to(routing.scores.dtype)


def _check_scope(routing: Routing, scope: Scope, sequences: int | None) -> None:
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
    if (scope == "sequence") != (sequences is not None):
        raise ValueError(f"sequences must be given for scope='sequence' and no other, got {sequences} for {scope!r}")
    if sequences is not None and (sequences < 1 or routing.num_tokens % sequences):
        raise ValueError(f"sequences must divide the number of tokens {routing.num_tokens}, got {sequences}")
