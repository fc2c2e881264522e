"""Loss along the straight line between two solutions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.batches import Batch, Loss
from pruning.diagnostics.curve import mean_loss
from pruning.diagnostics.figure import axes_for, labelled


@dataclass(frozen=True)
class LossPath:
    """Mean loss a sample at θ(α) = (1 − α) θ₀ + α θ₁."""

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """max_α [L(θ(α)) − ((1 − α) L(θ₀) + α L(θ₁))], the error barrier (Frankle et al. 2020, arXiv:1912.05671; as in
        Entezari et al. 2022, arXiv:2110.06296); 0 if the line is never above its chord."""
        first, last = self.losses[0], self.losses[-1]
        above = [l - ((1 - a) * first + a * last) for a, l in zip(self.alphas, self.losses, strict=True)]
        return max(0.0, *above)

    @property
    def is_monotone(self) -> bool:
        """Whether the loss never rises on the way: no hill to climb from the start to the end."""
        return all(after <= before for before, after in zip(self.losses, self.losses[1:], strict=False))

    def plot(self, *, ax: Any = None) -> Any:
        """Loss against α and the chord; returns the axes."""
        ax = axes_for(ax)
        ax.plot(self.alphas, self.losses, marker="o")
        ax.plot([0, 1], [self.losses[0], self.losses[-1]], color="grey", linestyle=":")
        return labelled(ax, x="α, from start to end", y="loss (nats)", title=f"barrier {self.barrier:.3g} nats")


def loss_path(
    model: nn.Module,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    points: int = 11,
    loss: Loss | None = None,
) -> LossPath:
    """Loss at ``points`` equally spaced places between two sets of parameters, in ``model``, which is restored.

    start, end: parameters by name, as in ``named_parameters()`` (extra entries, as a state dict has, are ignored); both
    must have all of the model's. Between two masks the way leads through their union.
    Raises: ValueError for points < 2, a missing parameter or one of another shape."""
    if points < 2:
        raise ValueError(f"points must be >= 2, got {points}")
    own = dict(model.named_parameters())
    for place, values in (("start", start), ("end", end)):
        for name, parameter in own.items():
            if name not in values or values[name].shape != parameter.shape:
                found = list(values[name].shape) if name in values else "none"
                raise ValueError(f"{place} must have {name!r} of shape {list(parameter.shape)}, got {found}")
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    # the ends may be the model's own tensors, which the walk overwrites
    first, last = ({name: values[name].detach().clone() for name in own} for values in (start, end))
    alphas = [n / (points - 1) for n in range(points)]
    try:
        losses = []
        for alpha in alphas:
            _put(own, {name: (1 - alpha) * first[name] + alpha * last[name] for name in own})
            losses.append(mean_loss(model, batches, loss=loss))
    finally:
        _put(own, before)
    return LossPath(tuple(alphas), tuple(losses))


@torch.no_grad()
def _put(own: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in own.items():
        parameter.copy_(values[name])
