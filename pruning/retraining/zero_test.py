"""The test of Finnoff, Hergert & Zimmermann: would a weight train to zero? Gathered while training."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

Sums = dict[str, Tensor]


@final
class ZeroTest:
    """T = log(|Σ_t (w_t − η_t g_t)| / √Σ_t (η_t g_t − mean)²) of each weight over the steps t taken; large: not zero.

    Finnoff, Hergert & Zimmermann 1993 (Improving model selection by nonconvergent methods), as Prechelt 1997 uses it:
    with one η the quotient is theirs, |Σ (w − η g)| / (η √Σ (g − ḡ)²). Their sums run over the training patterns of an
    epoch at one w. Here t is an optimiser's step, g its gradient, the mean over the batch, and w_t what it started
    from: no gradient is kept for each pattern. At a w that stands still n batches of B independent patterns have in
    expectation the quotient of nB patterns, as a batch's mean spreads √B times less; but n terms tell a spread less
    well than nB, and w moves between them. η is the optimiser's rate for the weight and g its gradient summed over
    micro-batches and ranks, before clipping, whatever the optimiser makes of it: under AdamW, w − η g is not the weight
    after the step.

    It holds three float32 numbers for each weight: Σ (w − η g), the mean of η g, and the sum of squares about it,
    updated as Welford does. like: name → a tensor of the shape that this process holds, on its device.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.seen = 0
        self.ends, self.mean, self.squares = (
            {name: torch.zeros_like(part, dtype=torch.float32) for name, part in like.items()} for _ in range(3)
        )

    def take(self, weights: Mapping[str, Tensor], moves: Mapping[str, Tensor]) -> None:
        """A step from ``weights`` w with the ``moves`` η g, each of every name."""
        self.seen += 1
        for name, mean in self.mean.items():
            move = moves[name].float()
            off = move - mean
            mean.add_(off / self.seen)
            self.squares[name].addcmul_(off, move - mean)
            self.ends[name].add_(weights[name].float() - move)

    def statistic(self) -> Sums:
        """Name → T, finite but for weights whose gradient has not varied, of which nothing can be said: ∞.

        |Σ (w − η g)| counts as the least normal float32 at least."""
        tiny = torch.finfo(torch.float32).tiny
        return {
            name: torch.where(
                self.squares[name] > 0, ends.abs().clamp_min(tiny).log() - self.squares[name].log() / 2, torch.inf
            )
            for name, ends in self.ends.items()
        }

    def forget(self) -> None:
        """Begin anew, as with no step seen."""
        self.seen = 0
        for sums in self.sums().values():
            for part in sums.values():
                part.zero_()

    def sums(self) -> dict[str, Sums]:
        """What is held, by what it is, then by weight; a checkpoint keeps it with ``seen``."""
        return {"ends": self.ends, "mean": self.mean, "squares": self.squares}


def count_below(statistics: Mapping[str, Tensor], share: float) -> int:
    """How many T are below ``share`` times their mean, finite ones alone; none for a share of 0.

    Prechelt's lprune with share = λ. Where the mean is negative, T < λ · mean says less for a larger λ.

    >>> count_below({"weight": torch.tensor([1.0, 2.0, 9.0])}, 0.6)  # below 2.4
    2
    """
    told = torch.cat([statistic.flatten() for statistic in statistics.values()]).double()
    told = told[told.isfinite()]
    if not share or not told.numel():
        return 0
    return int((told < share * told.mean()).sum())
