"""How many outliers each layer's weights hold, on calibration data: what OWL allocates by."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pruning.batches import Batch, Progress
from pruning.calibrated.blocks import find_blocks
from pruning.calibrated.dense import dense_moments, distinct_matrices
from pruning.calibrated.targets import find_inputs


@torch.no_grad()
def outlier_shares(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Batch],
    *,
    times: float = 5.0,
    progress: Progress = None,
) -> dict[str, float]:
    """D = share of the entries A_ij = abs(w_ij) · ‖x_j‖ of a block that exceed `times` the mean of A over that block.

    Yin et al. 2024 (arXiv:2310.05175), eq. 1 and 2; ‖x_j‖ is the root mean square of input j over the calibration rows
    of the matrix. A block is a member of the nn.ModuleList that holds most of the weights, and all its matrices get its
    share; a matrix outside has its own. By matrix name, experts as "name[e]".
    Raises: ValueError if times <= 0, without batches, and for a matrix that no row reaches."""
    if times <= 0:
        raise ValueError(f"times must be > 0, got {times}")
    inputs = find_inputs(model, weights)
    moments = dense_moments(model, inputs, batches, progress=progress)
    metric = {}
    for matrix in distinct_matrices(inputs):
        norm = (moments.sums[matrix.label] / moments.rows[matrix.label]).sqrt()
        metric[matrix.label] = matrix.view(matrix.parameter).abs() * norm
    shares: dict[str, float] = {}
    for labels in _groups(model, weights, metric).values():
        values = torch.cat([metric[label].flatten().float() for label in labels])
        share = (values > times * values.mean()).double().mean().item()
        shares |= dict.fromkeys(labels, share)
    return {label: shares[label] for label in metric}


def _groups(model: nn.Module, weights: Mapping[str, nn.Parameter], labels: Iterable[str]) -> dict[str | int, list[str]]:
    """Labels by block; those outside the blocks each alone."""
    _, blocks = find_blocks(model, weights)
    owner = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    groups: dict[str | int, list[str]] = {}
    for label in labels:
        block = owner.get(id(weights[label.partition("[")[0]]))
        groups.setdefault(label if block is None else block, []).append(label)
    return groups
