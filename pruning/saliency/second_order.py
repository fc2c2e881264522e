"""Optimal brain damage: w²·H_ii/2, with the Hessian's diagonal estimated in one of three ways."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import (
    Batch,
    Loss,
    Progress,
    after_prefix,
    batch_size,
    evaluating,
    model_batches,
    next_token_loss,
    samples_of,
    scalar_loss,
)
from pruning.saliency.products import check_twice_differentiable, twice_differentiable

ESTIMATORS = ("empirical_fisher", "fisher", "hutchinson")


def obd(weight: Float[Tensor, "..."], curvature: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """w²·H_ii/2: the loss that removing one weight adds where the gradient is 0 and weights do not interact.

    LeCun, Denker & Solla 1990. curvature: the diagonal of H, as `hessian_diagonal` estimates it."""
    return weight.detach().square() * curvature / 2


def hessian_diagonal(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    estimator: str = "fisher",
    loss: Loss | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    progress: Progress = None,
) -> dict[str, Float[Tensor, "..."]]:
    """The diagonal of the Hessian of the mean loss over samples, for each weight, in the weight's shape (float32 or
    wider).

    estimator: "empirical_fisher", mean over samples of g², with the batch's own labels; "fisher", the same with labels
    drawn from the model's predictions, which for next-token loss is the Gauss–Newton diagonal in expectation (Kunstner
    et al. 2019, arXiv:1905.12558); "hutchinson", mean of v ⊙ Hv over random signs v (Bekas et al. 2007), the true
    Hessian, which may be negative and needs a model that is differentiable twice.
    loss(model, batch) is a sum over samples (None: next-token loss; "fisher" takes no other). draws: of labels or
    signs, for each batch, from `generator`. The two Fisher estimators run one sample at a time.
    Raises: ValueError for another estimator, draws < 1, a loss with "fisher", no batches, frozen weights, and under
    "hutchinson" a function that is differentiable once."""
    _check(estimator, loss, draws, weights)
    totals = {name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
              for name, weight in weights.items()}  # fmt: skip
    samples = 0
    with evaluating(model, frozen=False), torch.enable_grad():
        for batch in model_batches(model, batches, progress=progress):
            samples += batch_size(batch)
            for _ in range(draws):
                for terms in _terms(estimator, model, list(weights.values()), batch, loss, generator):
                    for total, term in zip(totals.values(), terms, strict=True):
                        total += term
    return {name: total / (samples * draws) for name, total in totals.items()}


def _check(estimator: str, loss: Loss | None, draws: int, weights: Mapping[str, nn.Parameter]) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    if estimator == "fisher" and loss is not None:
        raise ValueError("estimator='fisher' draws next tokens and takes no loss: loss must be None")
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(f"the Hessian needs weights with requires_grad=True, got {frozen[0]!r} frozen")


def _terms(
    estimator: str,
    model: nn.Module,
    weights: list[nn.Parameter],
    batch: Batch,
    loss: Loss | None,
    generator: torch.Generator | None,
) -> Iterator[list[Tensor]]:
    """What one draw on a batch adds to the sum over samples."""
    if estimator == "hutchinson":
        with twice_differentiable(model):
            yield _hutchinson(scalar_loss(model, batch, loss), weights, generator)
        return
    for sample in samples_of(batch):
        if estimator == "fisher":
            value, scale = _drawn_loss(model, sample, generator)
        else:
            value, scale = scalar_loss(model, sample, loss), 1
        found = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        yield [gradient.square() * scale for gradient in found]


def _hutchinson(value: Tensor, weights: list[nn.Parameter], generator: torch.Generator | None) -> list[Tensor]:
    check_twice_differentiable(value)
    gradients = torch.autograd.grad(value, weights, create_graph=True, allow_unused=True, materialize_grads=True)
    signs = [_signs(weight, generator) for weight in weights]
    product = torch.stack([(g * v).sum() for g, v in zip(gradients, signs, strict=True)]).sum()
    curved = torch.autograd.grad(product, weights, allow_unused=True, materialize_grads=True)
    return [h * v for h, v in zip(curved, signs, strict=True)]


def _signs(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """±1, drawn on the CPU so that a seed means the same everywhere."""
    return (torch.randint(2, weight.shape, generator=generator) * 2 - 1).to(weight)


def _drawn_loss(model: nn.Module, sample: Batch, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """The next-token loss of one sample with labels drawn from the model, and the number T of its predictions.

    The loss is a mean over T; its Gauss–Newton matrix is the mean of theirs, but the square of a mean of T independent
    gradients of mean 0 is 1/T of the mean of squares: T makes up for it."""
    keywords: dict[str, Any] = {"input_ids": sample} if isinstance(sample, Tensor) else dict(sample)
    given = keywords.pop("labels", None)
    with torch.no_grad():
        output = model(sample) if isinstance(sample, Tensor) else model(**keywords)
        logits = output if isinstance(output, Tensor) else output.logits
        chances = logits[0, :-1].float().softmax(-1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).mT.to(logits.device)
    labels = torch.cat([keywords["input_ids"][:, :1], drawn], dim=1)
    real = keywords.get("attention_mask")
    if given is not None:
        labels = labels.masked_fill(given == -100, -100)
    elif real is not None:
        pairs = real.bool()[:, 1:] & real.bool()[:, :-1]
        labels[:, 1:].masked_fill_(~pairs, -100)
    labels[:, 1:].masked_fill_(~after_prefix(model, keywords)[:, :-1], -100)
    count = int((labels[:, 1:] != -100).sum())
    return next_token_loss(model, {**keywords, "labels": labels}), count
