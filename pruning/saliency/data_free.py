"""Scores that need no data: magnitude, LAMP and chance."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.allocation.counts import lamp_of_magnitudes
from pruning.axes import Axis, Slice
from pruning.saliency.record import AxisScores, Normalize, record


def magnitude(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """abs(w), for each weight."""
    return weight.detach().abs()


def lamp(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """w_u² / Σ_{v: |w_v| ≥ |w_u|} w_v² over one matrix, float64: magnitudes made comparable across matrices.

    Lee et al. 2021 (arXiv:2010.07611), eq. 2. Stacks [..., out, in] are scored matrix by matrix. Of equal
    magnitudes the earlier position scores lower, as it goes first. Inside a matrix the order is that of the magnitudes:
    the score means something under one ranking of all matrices."""
    matrix = weight.detach().abs()
    parts = matrix.flatten(0, -3) if weight.ndim > 2 else matrix[None]
    return torch.stack([lamp_of_magnitudes(part) for part in parts]).view(weight.shape)


def random_scores(weight: Float[Tensor, "..."], *, generator: torch.Generator | None = None) -> Float[Tensor, "..."]:
    """Uniform on [0, 1), float32, drawn on the CPU so that a seed means the same everywhere: the baseline."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def magnitude_importance(model: nn.Module, axes: Sequence[Axis], *, normalize: Normalize = None) -> AxisScores:
    """‖every weight that the unit owns alone‖₂, for each unit of each axis.

    Tensors shared by a group of units (keys and values under grouped queries) count for none of its units."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {}
    for axis in axes:
        squares = torch.zeros(axis.size, dtype=torch.float64)
        for piece in (piece for piece in axis.slices if not piece.grouped):
            squares += _units(parameters[piece.parameter].detach(), piece, axis).double().square().sum(1).cpu()
        values[axis.name] = squares.sqrt()
    return record(axes, values, method="magnitude", normalize=normalize)


def _units(tensor: Float[Tensor, "..."], piece: Slice, axis: Axis) -> Float[Tensor, "size rest"]:
    count = axis.group_size if axis.stacked else axis.size * piece.width
    owned = tensor.narrow(piece.dim, piece.offset, count).movedim(piece.dim, int(axis.stacked))
    return owned.reshape(axis.size, -1)


def random_importance(axes: Sequence[Axis], *, generator: torch.Generator | None = None) -> AxisScores:
    """Uniform on [0, 1) for each unit: the baseline that every importance must beat."""
    values = {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}
    return record(axes, values, method="random")
