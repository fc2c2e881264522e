"""What `prune` does to the weights of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning import Masks, magnitude, prunable_weights, sparsify
from pruning.allocation import loss_curves
from pruning.batches import Loss, Progress
from pruning.calibrated import Journal, MatrixReport, prune_calibrated
from pruning.criteria import CRITERIA, make_allocation
from pruning.structure import Tiles, named_structure, parse_structure, removal_count, tile_sizes
from pruning.weights import matrices, stored_turned
from training.prune_arguments import PruneArguments

LEVELS = (0.25, 0.5, 0.75, 0.9)  # sparsities of the sensitivity analysis


@dataclass(frozen=True)
class Weights:
    """masks of the weights, and what a calibrated method reports of each matrix."""

    masks: Masks
    matrices: tuple[MatrixReport, ...] = ()


def check_structure(model: nn.Module, arguments: PruneArguments, names: Sequence[str] | None = None) -> None:
    """Raises: ValueError naming the first matrix that n:m or blocks do not fit."""
    text = arguments.structure
    if text is None or not arguments.prunes_weights:
        return
    found, structure = matrices(prunable_weights(model, names), stored_turned(model)), named_structure(text)
    if isinstance(structure, Tiles):
        tile_sizes(structure, found)
    for name, weight in found.items():
        if ":" in text and weight.shape[1] % parse_structure(text)[1]:
            raise ValueError(f"--structure {text} needs inputs divisible by {parse_structure(text)[1]}, got "
                             f"{weight.shape[1]} in {name}")  # fmt: skip


def prune_weights(
    model: nn.Module,
    arguments: PruneArguments,
    batches: Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    loss: Loss | None = None,
    journal: Journal,
    progress: Progress,
) -> Weights:
    """Weights set to zero by --method. names: of those that may; loss: None is the next-token loss."""
    if arguments.by_layer:
        allocation = arguments.chosen_allocation or "uniform"
        rule = "loss" if allocation == "loss" else make_allocation(
            allocation, model, prunable_weights(model, names), batches, loss
        )  # fmt: skip
        report = prune_calibrated(
            model, batches, method=arguments.method, sparsity=arguments.sparsity, structure=arguments.structure,
            allocation=rule, loss=loss if rule == "loss" else None, refit=arguments.refit, order=arguments.order,
            weights=names, progress=progress, journal=journal,
        )  # fmt: skip
        return Weights(report.masks, report.matrices)
    device = next(model.parameters()).device
    taken = CRITERIA[arguments.method].loss or arguments.chosen_allocation == "sensitivity"
    masks = sparsify(
        model, sparsity=arguments.sparsity, method=arguments.method, allocation=arguments.chosen_allocation,
        structure=arguments.structure, calibration=batches or None,
        loss=loss if taken else None, weights=names,
        generator=torch.Generator(device).manual_seed(arguments.seed), progress=progress,
    )  # fmt: skip
    return Weights(masks)


def sensitivity(
    model: nn.Module,
    batch: Tensor,
    *,
    names: Sequence[str] | None = None,
    loss: Loss | None = None,
    progress: Progress,
) -> dict[str, list[float]]:
    """How much the loss on one batch rises when one matrix alone loses its smallest weights, at each of LEVELS."""
    weights = prunable_weights(model, names)
    scores = {name: magnitude(weight.detach()) for name, weight in weights.items()}
    curves = loss_curves(model, scores, [batch], sparsities=LEVELS, loss=loss, progress=progress)
    return {name: curve.tolist() for name, curve in curves.items()}


def recovery_scope(masks: Masks, sparsity: float) -> str | None:
    """The scope in which ⌊sparsity · n⌋ weights are just the zeros of `masks`, so that magnitude finds them again:
    'layerwise', 'global', or None."""
    kept = matrices(masks.kept)
    zeros = {name: int((~mask).sum()) for name, mask in kept.items()}
    if all(zeros[name] == removal_count(sparsity, mask.numel()) for name, mask in kept.items()):
        return "layerwise"
    return "global" if masks.zeros == removal_count(sparsity, masks.total) else None
