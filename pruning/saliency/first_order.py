"""First-order scores of weights: abs(w·g), the loss change that removing a weight predicts."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, Loss, Progress, batch_size, evaluating, model_batches, scalar_loss


def taylor(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """abs(w · ∂L/∂w), with the gradient that the last backward left in `weight.grad`.

    Molchanov et al. 2017 (arXiv:1611.06440); at initialisation it is SNIP's order (arXiv:1810.02340).
    Raises: ValueError if there is no gradient."""
    if weight.grad is None:
        raise ValueError(f"taylor needs weight.grad, got None for a weight of shape {list(weight.shape)}")
    return (weight.detach() * weight.grad).abs()


def gradient_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Tensor]:
    """abs(w · g) for each weight, g the gradient of the loss averaged over all samples of `batches`.

    loss(model, batch) is a sum over samples (None: next-token loss). No parameter's .grad is touched; the model's
    mode comes back. Weights that the loss does not reach score 0.
    Raises: ValueError if batches are empty, the loss is not a finite scalar, or a weight is frozen."""
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(f"gradient scores need weights with requires_grad=True, got {frozen[0]!r} frozen")
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    samples = 0
    with evaluating(model, frozen=False), torch.enable_grad():
        for batch in model_batches(model, batches, progress=progress):
            value = scalar_loss(model, batch, loss)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            samples += batch_size(batch)
            for total, gradient in zip(totals.values(), found, strict=True):
                total += 0 if gradient is None else gradient
    return {name: (weights[name].detach() * total / samples).abs() for name, total in totals.items()}
