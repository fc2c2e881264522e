"""The graph that survives: how many connections each neuron has, and whether their number follows a power law."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pruning.diagnostics.figure import axes_for, labelled
from pruning.masking import Masks
from pruning.weights import matrices


@dataclass(frozen=True)
class PowerLaw:
    """p(k) = k^−exponent / ζ(exponent, minimum) for k ≥ minimum, fitted to the ``tail`` degrees that are.

    distance: Kolmogorov–Smirnov, the largest gap between the two cumulative distributions. ratio: log-likelihood of the
    power law minus that of a geometric distribution on the same tail, summed; significance: p of that sign under the
    hypothesis that both fit alike (Vuong's normalised ratio). A power law is likelier only where ratio > 0 and
    significance is small."""

    exponent: float
    minimum: int
    tail: int
    distance: float
    ratio: float
    significance: float


@dataclass(frozen=True)
class DegreeDistribution:
    """Connections of each neuron: of the inputs (fan-out) and outputs (fan-in) of each matrix [out, in]."""

    fan_in: dict[str, Int[Tensor, "out"]]
    fan_out: dict[str, Int[Tensor, "in"]]

    def degrees(self) -> Int[Tensor, "n"]:
        """All of them, matrix by matrix; each side of a neuron counts for itself."""
        return torch.cat([d for name in self.fan_in for d in (self.fan_in[name], self.fan_out[name])])

    def histogram(self) -> dict[int, int]:
        """Degree → number of neurons with it."""
        values, counts = self.degrees().unique(return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def plot(self, *, ax: Any = None, fit: PowerLaw | None = None) -> Any:
        """P(degree ≥ k) on logarithmic axes, and a fit; returns the axes."""
        ax = axes_for(ax)
        values = self.degrees()[self.degrees() > 0].sort().values
        above = 1 - torch.arange(len(values)) / max(len(values), 1)
        ax.loglog(values.tolist(), above.tolist(), marker=".", linestyle="", label="neurons")
        if fit is not None and len(values):
            k = torch.arange(fit.minimum, int(values[-1]) + 1).double()
            share = fit.tail / len(values)
            ax.loglog(k.tolist(), (share * _survival(k, fit.exponent, fit.minimum)).tolist(), label="power law")
        return labelled(ax, x="degree k", y="share with degree ≥ k", title="degrees", legend=True)


def degree_distribution(masks: Masks) -> DegreeDistribution:
    """The degrees of every matrix of the masks, each expert of a stack for itself.

    Raises: ValueError for a mask that is no matrix and no stack of them."""
    for name, mask in masks.kept.items():
        if mask.ndim < 2:
            raise ValueError(f"mask of {name!r} must have at least 2 dimensions, got {list(mask.shape)}")
    parts = matrices(masks.kept)
    fan_in, fan_out = ({name: mask.sum(dim).cpu() for name, mask in parts.items()} for dim in (1, 0))
    return DegreeDistribution(fan_in, fan_out)


def fit_power_law(degrees: Int[Tensor, "n"], *, minimum: int | None = None, least_tail: int = 10) -> PowerLaw:
    """The discrete fit of Clauset, Shalizi & Newman 2009 (arXiv:0706.1062), by maximum likelihood.

    exponent: argmax of −n ln ζ(α, k_min) − α Σ ln k over the tail, on (1, 20]; minimum: None takes the k_min ≥ 1 of
    least Kolmogorov–Smirnov distance that leaves at least ``least_tail`` degrees. Degrees of 0 are left out.
    Raises: ValueError if fewer than ``least_tail`` degrees, or only one value, are at or above every k_min."""
    positive = degrees[degrees > 0].double().cpu()
    candidates = positive.unique().tolist() if minimum is None else [float(minimum)]
    fits = []
    for low in candidates:
        tail = positive[positive >= low]
        if len(tail) >= least_tail and bool((tail != tail[0]).any()):
            exponent = _exponent(tail, low)
            fits.append((_distance(tail, exponent, low), exponent, int(low), tail))
    if not fits:
        raise ValueError(
            f"degrees must hold at least least_tail={least_tail} positive ones, not all alike, got {len(positive)}"
        )
    distance, exponent, low, tail = min(fits, key=lambda fit: fit[0])
    ratio, significance = _against_geometric(tail, exponent, low)
    return PowerLaw(exponent, low, len(tail), distance, ratio, significance)


def _exponent(tail: Tensor, low: float) -> float:
    """Golden-section search: the likelihood of an exponential family has one peak."""
    mean_log, shrink = float(tail.log().mean()), (math.sqrt(5) - 1) / 2
    left, right = 1.0 + 1e-6, 20.0

    def cost(alpha: float) -> float:
        return math.log(_zeta(alpha, low)) + alpha * mean_log

    while right - left > 1e-9:
        a, b = right - shrink * (right - left), left + shrink * (right - left)
        left, right = (left, b) if cost(a) < cost(b) else (a, right)
    return (left + right) / 2


def _zeta(alpha: float, low: float) -> float:
    return float(torch.special.zeta(torch.tensor(alpha).double(), torch.tensor(low).double()))


def _survival(k: Tensor, alpha: float, low: float) -> Tensor:
    """P(degree ≥ k) under the power law."""
    return torch.special.zeta(torch.full_like(k, alpha), k) / _zeta(alpha, low)


def _distance(tail: Tensor, alpha: float, low: float) -> float:
    k = torch.arange(int(low), int(tail.max()) + 2).double()
    share = 1 - torch.searchsorted(tail.sort().values, k).double() / len(tail)
    return float((share - _survival(k, alpha, low)).abs().max())


def _against_geometric(tail: Tensor, alpha: float, low: float) -> tuple[float, float]:
    """Σ of the pointwise log-likelihood ratios, and the two-sided p of Vuong's statistic."""
    stay = 1 - 1 / (1 + float((tail - low).mean()))
    geometric = (tail - low) * math.log(stay) + math.log(1 - stay)
    power = -alpha * tail.log() - math.log(_zeta(alpha, low))
    each = power - geometric
    spread = float(each.std(correction=0)) * math.sqrt(len(each))
    total = float(each.sum())
    return total, math.erfc(abs(total) / (math.sqrt(2) * spread)) if spread else 1.0
