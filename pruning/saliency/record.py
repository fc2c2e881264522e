"""The record that every scorer of structures returns, and its normalisation by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.axes import Axis

Normalize = str | None


@dataclass(frozen=True)
class AxisScores(Mapping[str, Tensor]):
    """Axis name → importance of each of its units [size] (float64, CPU; larger = more important).

    method says how they were made, samples how many calibration samples they average (0: none used), layers the layer
    of each axis."""

    values_by_axis: dict[str, Tensor]
    layers: dict[str, int]
    method: str
    samples: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.values_by_axis[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_axis)

    def __len__(self) -> int:
        return len(self.values_by_axis)

    def matrix(self) -> Float[Tensor, "layers units"]:
        """One row for each axis in order, padded with NaN: the map that a figure draws."""
        rows = list(self.values_by_axis.values())
        padded = torch.full((len(rows), max((len(row) for row in rows), default=0)), torch.nan, dtype=torch.float64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        return padded


def record(
    axes: Sequence[Axis], values: Mapping[str, Tensor], *, method: str, samples: int = 0, normalize: Normalize = None
) -> AxisScores:
    """Scores of `axes`; normalize="l2" divides each axis' scores by their Euclidean norm (an all-zero axis stays).

    Raises: ValueError for another normalize, and for scores that are not finite."""
    if normalize not in (None, "l2"):
        raise ValueError(f"normalize must be None or 'l2', got {normalize!r}")
    scores = {axis.name: values[axis.name].detach().double().cpu() for axis in axes}
    for name, value in scores.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"scores of {name!r} must be finite, got {value.tolist()}")
        norm = value.norm()
        scores[name] = value / norm if normalize == "l2" and norm > 0 else value
    return AxisScores(scores, {axis.name: axis.layer for axis in axes}, method, samples)
