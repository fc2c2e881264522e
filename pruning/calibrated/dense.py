"""What the weights' inputs are in the dense model: one pass, before anything is pruned."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.batches import Batch, Progress, evaluating, row_batches
from pruning.calibrated.blocks import run_model, without_cache
from pruning.calibrated.capture import Moments, recording
from pruning.calibrated.reconstruct import wanda_scores
from pruning.calibrated.targets import Inputs, Matrix


def distinct_matrices(inputs: Sequence[Inputs]) -> Iterator[Matrix]:
    """Every matrix once, however many modules multiply by it."""
    return iter({one.label: one for use in inputs for part in use.weights.values() for one in part}.values())


@torch.no_grad()
def dense_moments(
    model: nn.Module, inputs: Sequence[Inputs], batches: Iterable[Batch], *, progress: Progress = None
) -> Moments:
    """Σ x² over the calibration rows of each matrix, in one pass of the model as it is; padding left out.

    Raises: ValueError without batches, and for a matrix that no row reaches."""
    moments = Moments(diagonal=True)
    with evaluating(model), without_cache(model), recording(inputs, moments):
        for batch in row_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            moments.real = None if mask is None else mask.bool()
            run_model(model, batch)
    for matrix in distinct_matrices(inputs):
        if matrix.label not in moments.rows:
            raise ValueError(f"calibration must reach {matrix.label}, got no row of input: give more batches")
    return moments


@torch.no_grad()
def dense_scores(
    model: nn.Module, inputs: Sequence[Inputs], batches: Iterable[Batch], *, progress: Progress = None
) -> dict[str, Float[Tensor, "out in"]]:
    """`wanda_scores` of each matrix by label, with the inputs that it has in the dense model.

    Raises: ValueError as `dense_moments`, and naming a matrix whose inputs are not finite."""
    moments, scores = dense_moments(model, inputs, batches, progress=progress), {}
    for matrix in distinct_matrices(inputs):
        weight = matrix.view(matrix.parameter.detach()).to(moments.dtype)
        try:
            scores[matrix.label] = wanda_scores(weight, moments.sums[matrix.label])
        except ValueError as problem:
            raise ValueError(f"{matrix.label}: {problem}") from problem
    return scores
