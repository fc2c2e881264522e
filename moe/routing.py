"""The record that passes from a router to the experts and on to the losses."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.noise import Noise


@dataclass(frozen=True)
class Routing:
    """Which expert works on which token, and with what weight.

    Assignments are flat and token-major: tokens ascend, a token's choices keep the router's order (best first).
    token, expert [N]: the assignments that are carried out; weight [N]: the combine weight, float32 or wider.
    logits, scores [T, E]: the router's raw output and its probabilities, float32 or wider, kept for the losses.
    dropped [M, 2]: (token, expert) pairs that were chosen and then lost to capacity.
    real [T]: False marks padding, never routed, whose scores mean nothing; None where every token is real.
    noise_seed: a seed of the router's noise, or the :class:`moe.Noise` that it came from, so that a replay draws the
    same; None where nothing was drawn.
    balance_first: load balancing counts only each token's choice of the largest score, not all of them (GShard).
    smooth_load [E]: the expected load, differentiable, of a router that draws noise on its logits (Shazeer 2017).
    skipped: choices that the router left out by chance: neither carried out nor dropped, but counted by a capacity.
    """

    token: Int[Tensor, "N"]
    expert: Int[Tensor, "N"]
    weight: Float[Tensor, "N"]
    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    num_experts: int
    num_tokens: int
    dropped: Int[Tensor, "M 2"]
    real: Bool[Tensor, "T"] | None = None
    noise_seed: int | Noise | None = None
    balance_first: bool = False
    smooth_load: Float[Tensor, "E"] | None = None
    skipped: int = 0

    @property
    def padding(self) -> int:
        """How many of the tokens were padding."""
        return 0 if self.real is None else self.num_tokens - int(self.real.sum())

    def loads(self) -> Int[Tensor, "E"]:
        """Assignments that each expert carries out."""
        return count_experts(self.expert, self.num_experts)

    def drops(self) -> Int[Tensor, "E"]:
        """Assignments that each expert lost to capacity."""
        return count_experts(self.dropped[:, 1], self.num_experts)

    def choices(self) -> Int[Tensor, "E"]:
        """Assignments that chose each expert, carried out or dropped."""
        return self.loads() + self.drops()

    def drop_fraction(self) -> float:
        """Share of the choices that was dropped, in [0, 1]; 0 where nothing was chosen."""
        lost = self.dropped.shape[0]
        return lost / max(lost + self.token.shape[0], 1)

    def entropy(self) -> Float[Tensor, ""]:
        """Mean over real tokens of −Σ_e p_e ln p_e, in nats: 0 for a certain router, ln E for a uniform one."""
        return mean_over_real(torch.special.entr(self.scores).sum(-1, keepdim=True), self.real).squeeze(0)

    def detach(self) -> "Routing":
        """The same record without gradient history: what to keep for a replay."""
        load = None if self.smooth_load is None else self.smooth_load.detach()
        return dataclasses.replace(
            self,
            weight=self.weight.detach(),
            logits=self.logits.detach(),
            scores=self.scores.detach(),
            smooth_load=load,
        )


def count_experts(expert: Int[Tensor, "N"], num_experts: int) -> Int[Tensor, "E"]:
    """Occurrences of each id in [0, num_experts)."""
    # scatter_add rather than bincount, whose output shape depends on the data and so breaks torch.compile
    zeros = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return zeros.scatter_add_(0, expert.long(), torch.ones_like(expert, dtype=torch.int64))


def mean_over_real(values: Float[Tensor, "T C"], real: Bool[Tensor, "T"] | None) -> Float[Tensor, "C"]:
    """Mean of the rows that are no padding; zeros where there are none."""
    if real is None:
        return values.sum(0) / max(values.shape[0], 1)
    return torch.where(real[:, None], values, 0.0).sum(0) / real.sum().clamp_min(1)
