"""First-order scores of weights: the loss change that removal predicts, on all data, on each sample, and in rounds."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, Loss, Progress, batch_size, evaluating, model_batches, samples_of, scalar_loss
from pruning.mask_selection import ranked_globally
from pruning.saliency.rounds import Select, restored, scored_in_rounds


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
    means = mean_gradients(model, weights, model_batches(model, batches, progress=progress), loss)
    return {name: (weights[name].detach() * mean).abs() for name, mean in means.items()}


def taylor_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Tensor]:
    """mean over samples b of abs(w · g_b): what removing the weight does to each sample's loss, up or down.

    Molchanov et al. 2017 (arXiv:1611.06440) average absolute values so, because the gradients of a trained model's
    samples cancel in the mean. One backward pass for each sample. Arguments and errors: as `gradient_scores`."""
    totals, samples = _accumulators(weights), 0
    with evaluating(model, frozen=False), torch.enable_grad():
        for batch in model_batches(model, batches, progress=progress):
            for sample in samples_of(batch):
                samples += 1
                for total, gradient in zip(totals.values(), _gradients(model, weights, sample, loss), strict=True):
                    total += gradient.abs()
    return {name: weights[name].detach().abs() * total / samples for name, total in totals.items()}


def snip_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    sparsity: float | None = None,
    rounds: int = 1,
    select: Select | None = None,
    loss: Loss | None = None,
    progress: Progress = None,
) -> dict[str, Tensor]:
    """SNIP: abs(w · g) / Σ abs(w · g) over all weights, g the gradient of the loss on `batches` before training.

    Lee et al. 2019 (arXiv:1810.02340), eq. 6: one round on one batch. rounds > 1 prunes to `sparsity` in exponential
    steps, each scored on the weights that the steps before left (de Jorge et al. 2021, arXiv:2006.09081); a weight that
    went in an earlier round scores −inf. The weights are as before afterwards.
    select(scores, sparsity) → masks makes the rounds (None: one ranking over all matrices); progress wraps them. Other
    arguments and errors: as `gradient_scores`; ValueError for rounds < 1, and rounds > 1 without a sparsity."""
    if rounds > 1 and sparsity is None:
        raise ValueError(f"sparsity must be in [0, 1) with rounds={rounds}, got None")
    held = list(model_batches(model, batches))

    def score() -> dict[str, Tensor]:
        means = mean_gradients(model, weights, held, loss)
        scores = {name: (weights[name].detach() * mean).abs() for name, mean in means.items()}
        total = torch.stack([value.double().sum() for value in scores.values()]).sum().clamp_min(1e-300)
        return {name: value / total.to(value.dtype) for name, value in scores.items()}

    if sparsity is None:
        return score()
    with restored(weights):
        return scored_in_rounds(
            weights, score, sparsity=sparsity, rounds=rounds, select=select or ranked_globally, progress=progress
        )


def mean_gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss: Loss | None
) -> dict[str, Tensor]:
    """The gradient of the loss averaged over all samples, in float32 or wider; 0 where the loss does not reach.

    Raises: ValueError if a weight is frozen."""
    totals, samples = _accumulators(weights), 0
    with evaluating(model, frozen=False), torch.enable_grad():
        for batch in batches:
            samples += batch_size(batch)
            for total, gradient in zip(totals.values(), _gradients(model, weights, batch, loss), strict=True):
                total += gradient
    return {name: total / samples for name, total in totals.items()}


def _accumulators(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(f"gradient scores need weights with requires_grad=True, got {frozen[0]!r} frozen")
    return {name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            for name, weight in weights.items()}  # fmt: skip


def _gradients(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batch: Batch, loss: Loss | None
) -> tuple[Tensor, ...]:
    value = scalar_loss(model, batch, loss)
    return torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
