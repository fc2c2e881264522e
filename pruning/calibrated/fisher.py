"""How much the loss feels a change of each weight: Kronecker factors of the Fisher information, and what they allot."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, Loss, Progress, evaluating, scalar_loss
from pruning.calibrated.capture import Moments, recording
from pruning.calibrated.targets import Inputs, Matrix
from pruning.structure import removal_count, unstructured

# how far a matrix's sparsity may lie from the whole's, and the most that any may lose
SPREAD, MOST = 0.3, 0.95


@dataclass(frozen=True)
class FisherFactors:
    """For each matrix [out, in], by label, over its rows: inputs, the mean of x_j² [in]; outputs, Σ (∂L/∂y_i)² [out].

    Σ (∂L/∂w_ij)² ≈ Σ (∂L/∂y_i)² · mean x_j²: the diagonal of the Kronecker-factored empirical Fisher information
    (Martens & Grosse 2015, arXiv:1503.05671). Only ratios matter, within a matrix and between matrices."""

    inputs: Mapping[str, Float[Tensor, "in"]]
    outputs: Mapping[str, Float[Tensor, "out"]]

    def scores(self, label: str, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """w² · mean x² · Σ (∂L/∂y)²: up to a constant the rise in loss that optimal brain damage (LeCun et al. 1990)
        expects of removing the weight. 0 for a matrix that no row reached."""
        if label not in self.inputs or label not in self.outputs:
            return torch.zeros_like(weight)
        return weight.square() * self.inputs[label] * self.outputs[label][:, None]


def fisher_factors(
    model: nn.Module,
    inputs: Sequence[Inputs],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    progress: Progress = None,
) -> FisherFactors:
    """One forward and backward pass over `batches`, which changes nothing. loss: None is the next-token loss.

    Of plain layers ∂L/∂y is taken row by row; of stacked experts, whose outputs no module shows,
    Σ (∂L/∂y_i)² = Σ_j (∂L/∂w_ij)² / Σ_j mean x_j² with the gradients of each batch, as if its rows were independent.
    Raises: ValueError if the loss is not a finite scalar or reaches none of the matrices."""
    moments = Moments(diagonal=True)
    plain = {use.weights["weight"][0].label: use.module for use in inputs if "weight" in use.weights}
    stacked = [one for use in inputs if "weight" not in use.weights for part in use.weights.values() for one in part]
    squares: dict[str, Tensor] = {}
    with evaluating(model, frozen=False), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for batch in progress(batches) if progress else batches:
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            moments.real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            found = _outputs(model, inputs, plain, batch, loss, moments)
            _add_squares(squares, found, stacked, batch_loss=found.loss)
    if not squares:
        raise ValueError("the loss must reach a prunable matrix, got no gradient")
    means = {label: total / moments.rows[label] for label, total in moments.sums.items()}
    for matrix in stacked:
        if matrix.label in squares and matrix.label in means:
            squares[matrix.label] = squares[matrix.label] / means[matrix.label].sum().clamp(min=1e-30)
    return FisherFactors(means, squares)


@dataclass(frozen=True)
class _Pass:
    """One batch's loss, and what each plain layer put out in each of its calls."""

    loss: Tensor
    outputs: dict[str, list[Tensor]]


def _outputs(
    model: nn.Module,
    inputs: Sequence[Inputs],
    plain: Mapping[str, nn.Module],
    batch: Batch,
    loss: Loss | None,
    moments: Moments,
) -> _Pass:
    outputs: dict[str, list[Tensor]] = {label: [] for label in plain}

    def keep(label: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs[label].append(output)

    with ExitStack() as stack:
        for label, module in plain.items():
            stack.callback(module.register_forward_hook(partial(keep, label)).remove)
        stack.enter_context(recording(inputs, moments))
        value = scalar_loss(model, batch, loss)
    return _Pass(value, outputs)


def _add_squares(squares: dict[str, Tensor], found: _Pass, stacked: Sequence[Matrix], *, batch_loss: Tensor) -> None:
    calls = [(label, out) for label, outs in found.outputs.items() for out in outs if out.requires_grad]
    parameters = list({id(matrix.parameter): matrix.parameter for matrix in stacked}.values())
    if not calls and not parameters:
        return
    gradients = torch.autograd.grad(batch_loss, [*(out for _, out in calls), *parameters], allow_unused=True)
    for (label, _), gradient in zip(calls, gradients, strict=False):
        if gradient is not None:
            _add(squares, label, gradient.flatten(0, -2).float().square().sum(0))
    of = {id(parameter): g for parameter, g in zip(parameters, gradients[len(calls) :], strict=True) if g is not None}
    for matrix in stacked:
        if id(matrix.parameter) in of:
            _add(squares, matrix.label, matrix.view(of[id(matrix.parameter)]).float().square().sum(1))


def _add(squares: dict[str, Tensor], label: str, value: Tensor) -> None:
    squares[label] = squares[label] + value if label in squares else value


def loss_counts(
    factors: FisherFactors, matrices: Iterable[Matrix], sparsity: float, *, spread: float = SPREAD, most: float = MOST
) -> dict[str, int]:
    """How many weights each matrix loses: one ranking of `FisherFactors.scores` over all of them, ⌊sparsity · N⌋ go.

    Each matrix loses a share within `spread` of the sparsity, and no more than `most`. Weights that are zero already
    go first. Raises: ValueError if sparsity is outside [0, 1), or more than `most`."""
    if sparsity > most:
        raise ValueError(f"sparsity must be at most {most} for allocation='loss', got {sparsity}")
    ranked, labels, total = [], [], 0
    for matrix in matrices:
        weight = matrix.view(matrix.parameter.detach()).float()
        scores = factors.scores(matrix.label, weight).masked_fill(weight == 0, -1).flatten()
        ranked.append(_bounded(scores, max(0.0, sparsity - spread), min(most, sparsity + spread)))
        labels.append(matrix.label)
        total += scores.numel()
    keep = unstructured(torch.cat(ranked), removal_count(sparsity, total))
    parts = keep.split([len(part) for part in ranked])
    return {label: int((~part).sum()) for label, part in zip(labels, parts, strict=True)}


def _bounded(scores: Float[Tensor, "n"], least: float, most: float) -> Float[Tensor, "n"]:
    """The lowest ⌊least · n⌋ scores as −∞, which go, and all but the lowest ⌈most · n⌉ as ∞, which stay."""
    count, limit = math.floor(least * len(scores)), min(math.ceil(most * len(scores)), len(scores))
    first, last = unstructured(scores, count), unstructured(scores, limit)
    return scores.masked_fill(~first, -torch.inf).masked_fill(last, torch.inf)
