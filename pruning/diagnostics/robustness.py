"""What small worst-case changes of the input embeddings do to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruning.batches import Batch, Loss, batch_size, evaluating, model_batches, scalar_loss
from pruning.diagnostics.figure import axes_for, labelled
from pruning.dynamic.adversarial import Attack, perturbed


@dataclass(frozen=True)
class Robustness:
    """Mean loss a sample at the worst perturbation found within each radius (units of the embeddings' RMS)."""

    radii: tuple[float, ...]
    losses: tuple[float, ...]
    clean: float
    steps: int

    def gaps(self) -> tuple[float, ...]:
        """Loss above the clean one at each radius."""
        return tuple(loss - self.clean for loss in self.losses)

    def plot(self, *, ax: Any = None, label: str = "") -> Any:
        """Loss against the radius, the clean one at 0; returns the axes."""
        ax = axes_for(ax)
        ax.plot((0.0, *self.radii), (self.clean, *self.losses), marker="o", label=label)
        title = "FGSM" if self.steps == 1 else f"PGD, {self.steps} steps"
        return labelled(ax, x="radius / RMS of the embeddings", y="loss (nats)", title=title, legend=bool(label))


def adversarial_robustness(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    radii: Sequence[float] = (0.01, 0.03, 0.1),
    steps: int = 5,
    loss: Loss | None = None,
    random_start: bool = False,
    generator: torch.Generator | None = None,
) -> Robustness:
    """Attack each batch with :class:`pruning.dynamic.Attack` of every radius; steps=1 is FGSM.

    The loss found is a lower bound of the worst one. loss: a sum over samples; None is the next-token loss.
    Raises: ValueError without radii or batches; as :class:`Attack`."""
    if not radii:
        raise ValueError("radii must hold at least one value, got none")
    attacks = [Attack(radius, steps, random_start, loss) for radius in radii]
    clean, totals, samples = 0.0, [0.0] * len(attacks), 0
    for batch in model_batches(model, batches):
        samples += batch_size(batch)
        with evaluating(model), torch.no_grad():
            clean += float(scalar_loss(model, batch, loss))
        for n, attack in enumerate(attacks):
            delta = attack.perturbation(model, batch, generator=generator)
            with evaluating(model), torch.no_grad(), perturbed(model, delta):
                totals[n] += float(scalar_loss(model, batch, loss))
    return Robustness(tuple(radii), tuple(total / samples for total in totals), clean / samples, steps)
