"""GraSP: keep the weights whose removal would take gradient away."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pruning.batches import Batch, Loss, Progress, model_batches
from pruning.saliency.first_order import mean_gradients
from pruning.saliency.products import hessian_product


def grasp_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    product: str = "exact",
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Tensor]:
    """w · (Hg) for each weight, larger = more important; may be negative.

    Removing w_i changes the squared norm of the gradient by ‖g(w − w_i e_i)‖² − ‖g(w)‖² ≈ −2 · w_i (Hg)_i: where the
    score is negative the norm rises, and training is faster without the weight; such weights go first. g, H: gradient
    and Hessian of the loss averaged over all samples, in `weights` alone. Wang et al. 2020 (arXiv:2002.07376), eq. 8,
    whose score −w·Hg runs the other way; without the paper's temperature of the logits, which a `loss` may have.
    product: how Hg is made, `hessian_product`. Other arguments: as `gradient_scores`.
    Raises: ValueError if batches are empty, a weight is frozen, or the model cannot be differentiated twice."""
    held = list(model_batches(model, batches, progress=progress))
    gradients = mean_gradients(model, weights, held, loss)
    vectors = {name: gradient.to(weights[name].dtype) for name, gradient in gradients.items()}
    products = hessian_product(model, weights, held, vectors, product=product, loss=loss)
    with torch.no_grad():
        return {name: weights[name].detach() * products[name] for name in weights}
