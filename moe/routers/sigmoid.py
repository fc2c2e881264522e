"""The sigmoid router of DeepSeek-V3: balanced by a bias and not by a loss, limited to the best groups of experts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.checks import not_negative, positive, whole, within
from moe.noise import Source
from moe.recomputation import in_backward
from moe.routers.linear import LinearRouter
from moe.routers.top_k import record_choice, replay_choice, router_logits
from moe.routing import Routing


class SigmoidRouter(LinearRouter):
    """s = σ(W x) in float32; a token goes to the k experts of largest s_e + b_e, weighted by s_e alone.

    weight = scale · s_e, with s_e divided by its sum over the k choices when ``renormalize``.
    Group-limited: the experts form ``num_groups`` equal runs; a group scores the sum of its two largest s + b, the
    best ``top_groups`` groups stay, and the k experts come from them.
    bias b [E]: a float32 buffer, whatever the dtype of the weights, that no gradient reaches. Once an optimiser step,
    after it, :meth:`after_step` adds bias_update · sign(mean load − load), for the loads of all forwards in training
    since the last such call: micro-batches add up; evaluation, replays and the recomputation of activation
    checkpointing count for nothing (a checkpoint of one's own around a compiled layer must say so:
    :func:`moe.recomputation.recomputing`). The counts are no buffer, so that DistributedDataParallel leaves each
    rank's alone.
    Routing.scores holds s divided by its sum over all experts. DeepSeek-V3, eq. 12-16 (arXiv:2412.19437).
    Raises: ValueError for sizes that do not fit each other, for a scale that is not positive, for a bias_update < 0;
    FloatingPointError for NaN or infinite logits of a real token, or bias.

    >>> router = SigmoidRouter(8, 6, k=2, num_groups=3, top_groups=1)
    >>> router(torch.randn(3, 8)).loads().sum(), router.pending_loads().sum()
    (tensor(6), tensor(6))
    """

    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        bias_update: float = 1e-3,
        renormalize: bool = True,
    ) -> None:
        super().__init__(dim, num_experts, k=k)
        _check_groups(num_experts, k, num_groups, top_groups)
        positive("scale", scale)
        not_negative("bias_update", bias_update)
        self.num_groups, self.top_groups = num_groups, top_groups
        self.scale, self.bias_update, self.renormalize = scale, bias_update, renormalize
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        self._counts: Tensor | None = None

    def reset_parameters(self) -> None:
        """Draw W from the normal distribution of deviation dim^-1/2; start from no bias and no counts."""
        super().reset_parameters()
        nn.init.zeros_(self.bias)
        self._counts = None

    def forward(
        self,
        x: Float[Tensor, "T D"],
        *,
        token_ids: Int[Tensor, "T"] | None = None,
        padding_mask: Bool[Tensor, "T"] | None = None,
        replay: Routing | None = None,
        generator: Source | None = None,
    ) -> Routing:
        """Route x, and count the choices when in training. token_ids and generator are not used."""
        logits = router_logits(x, self.weight, padding_mask)
        # σ(z) / Σ σ(z) without underflow; dividing by the sum over the choices makes the same weight of either
        scores = F.logsigmoid(logits).softmax(-1)
        gates = scores if self.renormalize else logits.sigmoid()
        if replay is not None:
            routing = replay_choice(logits, scores, gates, replay, real=padding_mask, renormalize=self.renormalize)
        else:
            routing = self._choose(logits, scores, gates, padding_mask)
        return dataclasses.replace(routing, weight=self.scale * routing.weight)

    def _choose(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], gates: Float[Tensor, "T E"],
        real: Bool[Tensor, "T"] | None,
    ) -> Routing:  # fmt: skip
        _require_finite(self.bias)
        biased = logits.detach().sigmoid() + self.bias
        expert = limit_groups(biased, self.num_groups, self.top_groups).topk(self.k, dim=-1).indices
        weight = gates.gather(1, expert)
        if self.renormalize:
            # the bias can pick experts whose scores all underflow beside the largest
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        routing = record_choice(expert, weight, logits, scores, real=real)
        if self.training and not in_backward():
            self._counts = self.pending_loads() + routing.loads()
        return routing

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Follow a surgery that left the rows ``kept`` (ascending) of W; counts that no step has used are forgotten.

        Raises: ValueError unless the groups that stay keep equally many experts.
        """
        left = Counter(unit * self.num_groups // self.num_experts for unit in kept)
        if len(set(left.values())) > 1:
            raise ValueError(f"kept must leave equally many experts in each group that stays, got {dict(left)}")
        self.num_groups = len(left)
        self.top_groups = min(self.top_groups, self.num_groups)
        super().keep_experts(kept)
        self.bias = self.bias[list(kept)]
        self._counts = None

    def pending_loads(self) -> Int[Tensor, "E"]:
        """Choices of each expert that :meth:`after_step` has not used yet, on this process."""
        if self._counts is None:
            return torch.zeros(self.num_experts, dtype=torch.int64, device=self.bias.device)
        return self._counts.to(self.bias.device)

    @torch.no_grad()
    def after_step(self, *, group: dist.ProcessGroup | None = None) -> None:
        """Move the bias against the pending loads, summed over ``group``, and forget them.

        Call it once after each optimiser step, on every process of the group (default: all, where torch.distributed
        is initialised), so that all hold the same bias. Without pending loads nothing moves.
        """
        counts = self.pending_loads()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=group)
        # sign(mean − load) in integers: a float32 mean of large counts rounds
        self.bias += self.bias_update * (counts.sum() - self.num_experts * counts).sign()
        self._counts = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As for every module, except that the bias stays float32: in bf16 a step of 1e-3 is lost beside 0.5."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = before.to(self.bias.device)
        return self

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}"
        groups = f"num_groups={self.num_groups}, top_groups={self.top_groups}"
        return f"{sizes}, {groups}, scale={self.scale}, bias_update={self.bias_update}, renormalize={self.renormalize}"


def limit_groups(scores: Float[Tensor, "T E"], num_groups: int, top_groups: int) -> Float[Tensor, "T E"]:
    """The scores of the experts in each token's best groups, −inf elsewhere.

    A group is one of ``num_groups`` equal runs of experts and scores the sum of its two largest, or its only one.
    Raises: ValueError unless num_groups divides E and top_groups is in [1, num_groups].
    """
    _check_groups(scores.shape[1], 1, num_groups, top_groups)
    if top_groups == num_groups:
        return scores
    grouped = rearrange(scores, "t (g e) -> t g e", g=num_groups)
    best = grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
    keep = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
    # −inf and not 0, which a negative bias would let a removed expert win against
    return rearrange(grouped.masked_fill(~keep[..., None], -math.inf), "t g e -> t (g e)")


def _check_groups(num_experts: int, k: int, num_groups: int, top_groups: int) -> None:
    whole("num_groups", num_groups)
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}")
    within("top_groups", top_groups, 1, num_groups, most_name="num_groups")
    room = top_groups * num_experts // num_groups
    if k > room:
        raise ValueError(f"k must be at most top_groups · num_experts / num_groups = {room}, got {k}")


def _require_finite(bias: Float[Tensor, "E"]) -> None:
    """NaN would win every choice, or none, without a word."""
    finite = bias.isfinite()
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), "the router's bias must be finite, got NaN or infinity")
    elif not finite.all():
        bad = int((~finite).sum())
        raise FloatingPointError(
            f"the router's bias must be finite, got NaN or infinity for {bad} of {len(bias)} experts"
        )
