"""What `prune` does to a model: whole units go, then single weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning import (
    Masks,
    PruneReport,
    expert_importance,
    head_importance,
    layer_importance,
    magnitude,
    neuron_importance,
    prunable_axes,
    prunable_weights,
    prune_experts,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_width,
    shrink,
    sparsify,
)
from pruning.allocation import loss_curves
from pruning.batches import Progress
from pruning.calibrated import Journal, MatrixReport, prune_calibrated
from pruning.criteria import CALIBRATED, make_allocation
from pruning.structure import Tiles, named_structure, parse_structure, removal_count, tile_sizes
from pruning.weights import matrices, stored_turned
from training.prune_arguments import PruneArguments
from training.prune_models import UNIT

LEVELS = (0.25, 0.5, 0.75, 0.9)  # sparsities of the sensitivity analysis


@dataclass(frozen=True)
class Weights:
    """masks of the weights, and what a calibrated method reports of each matrix."""

    masks: Masks
    matrices: tuple[MatrixReport, ...] = ()


def check_structure(model: nn.Module, arguments: PruneArguments) -> None:
    """Raises: ValueError naming the first matrix that n:m or blocks do not fit."""
    text = arguments.structure
    if text is None or not arguments.prunes_weights:
        return
    found, structure = matrices(prunable_weights(model), stored_turned(model)), named_structure(text)
    if isinstance(structure, Tiles):
        tile_sizes(structure, found)
    for name, weight in found.items():
        if ":" in text and weight.shape[1] % parse_structure(text)[1]:
            raise ValueError(f"--structure {text} needs inputs divisible by {parse_structure(text)[1]}, got "
                             f"{weight.shape[1]} in {name}")  # fmt: skip


def remove_units(
    model: nn.Module, kind: str, fraction: float, batches: Sequence[Tensor], *, layerwise: bool, progress: Progress
) -> PruneReport:
    """The least important of a kind go: heads and neurons by the gradient of a gate (Michel et al. 2019), experts by
    what they add (REAP), layers by how far they turn the stream (ShortGPT), width by magnitude."""
    if kind == "layers":
        return prune_layers(model, layer_importance(model, batches, progress=progress), fraction=fraction)
    if kind == "width":
        return prune_width(model, fraction=fraction)
    if kind == "experts":
        scores = expert_importance(model, batches, progress=progress)
        return prune_experts(model, scores, fraction=fraction, layerwise=layerwise)
    if kind == "heads":
        scores = head_importance(model, batches, progress=progress)
        return prune_heads(model, scores, fraction=fraction, layerwise=layerwise)
    scores = neuron_importance(model, batches, progress=progress)
    return prune_neurons(model, scores, fraction=fraction, layerwise=layerwise)


def remove_again(model: nn.Module, kind: str, record: Mapping[str, Any]) -> PruneReport:
    """What an earlier run decided, done to the same model."""
    units = {name: {axis: tuple(ids) for axis, ids in record[name].items()} for name in ("kept", "removed")}
    report = PruneReport(**{**record, **units})
    shrink(model, [axis for axis in prunable_axes(model) if axis.kind == UNIT[kind]], report.kept)
    return report


def prune_weights(
    model: nn.Module, arguments: PruneArguments, batches: Sequence[Tensor], *, journal: Journal, progress: Progress
) -> Weights:
    """Weights set to zero by --method."""
    if arguments.method in CALIBRATED:
        allocation = arguments.chosen_allocation or "uniform"
        rule = "loss" if allocation == "loss" else make_allocation(
            allocation, model, prunable_weights(model), batches, None
        )  # fmt: skip
        report = prune_calibrated(
            model, batches, method=arguments.method, sparsity=arguments.sparsity, structure=arguments.structure,
            allocation=rule, progress=progress, journal=journal,
        )  # fmt: skip
        return Weights(report.masks, report.matrices)
    device = next(model.parameters()).device
    masks = sparsify(
        model, sparsity=arguments.sparsity, method=arguments.method, allocation=arguments.chosen_allocation,
        structure=arguments.structure, calibration=batches or None,
        generator=torch.Generator(device).manual_seed(arguments.seed), progress=progress,
    )  # fmt: skip
    return Weights(masks)


def sensitivity(model: nn.Module, batch: Tensor, *, progress: Progress) -> dict[str, list[float]]:
    """How much the loss on one batch rises when one matrix alone loses its smallest weights, at each of LEVELS."""
    weights = prunable_weights(model)
    scores = {name: magnitude(weight.detach()) for name, weight in weights.items()}
    curves = loss_curves(model, scores, [batch], sparsities=LEVELS, progress=progress)
    return {name: curve.tolist() for name, curve in curves.items()}


def recovery_scope(masks: Masks, sparsity: float) -> str | None:
    """The scope in which ⌊sparsity · n⌋ weights are just the zeros of `masks`, so that magnitude finds them again:
    'layerwise', 'global', or None."""
    kept = matrices(masks.kept)
    zeros = {name: int((~mask).sum()) for name, mask in kept.items()}
    if all(zeros[name] == removal_count(sparsity, mask.numel()) for name, mask in kept.items()):
        return "layerwise"
    return "global" if masks.zeros == removal_count(sparsity, masks.total) else None
