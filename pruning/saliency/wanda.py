"""Weights times the size of their inputs, on the dense model."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, Progress
from pruning.calibrated.dense import dense_moments, distinct_matrices
from pruning.calibrated.reconstruct import wanda_scores
from pruning.calibrated.targets import find_inputs
from pruning.sharding import gathered, sharded_as


@torch.no_grad()
def dense_wanda_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch], *, progress: Progress = None
) -> dict[str, Float[Tensor, "..."]]:
    """abs(w_ij) · ‖x_j‖₂ of every weight, by name and in its shape; x: what its matrix multiplies, over all tokens.

    Sun et al. 2023 (arXiv:2306.11695, eq. 1), in one pass of the model as it is: `prune_calibrated` has the paper's
    pass, block by block on what the pruned blocks before put out. Compare them inside each output row, by
    `pruning.structure.within_rows`. float32. Padding under ``attention_mask`` does not count.
    Raises: ValueError without batches, for weights of unknown modules, a matrix that no row reaches and inputs that are
    not finite."""
    inputs = find_inputs(model, weights)
    moments, whole = dense_moments(model, inputs, batches, progress=progress), gathered(weights)
    scores = {name: torch.zeros_like(weight, dtype=moments.dtype) for name, weight in whole.items()}
    for matrix in distinct_matrices(inputs):
        found = wanda_scores(matrix.view(whole[matrix.name].detach()).to(moments.dtype), moments.sums[matrix.label])
        matrix.view(scores[matrix.name]).copy_(found)
    return {name: sharded_as(score, weights[name]) for name, score in scores.items()}
