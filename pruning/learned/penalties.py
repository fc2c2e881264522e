"""Side losses that favour zeros: functions of named tensors, to be added to a loss with a coefficient."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.axes import Axis

# named weights (or gates) → a scalar
Penalty = Callable[[Mapping[str, Tensor]], Tensor]


def l1(weights: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Σ |w|: shrinks every weight alike."""
    return _total([weight.abs().sum() for weight in weights.values()])


def l2(weights: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """½ Σ w²: shrinks in proportion, and makes no zeros by itself."""
    return _total([weight.square().sum() / 2 for weight in weights.values()])


def hoyer_square(weights: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Σ over tensors of (Σ |w|)² / Σ w²: between 1 and the number of weights, the same for c · w; 0 for all zeros.

    Yang, Wen & Li 2020, DeepHoyer (arXiv:1908.09979), eq. 3: almost differentiable, and blind to scale."""
    return _total([_hoyer_square(weight) for weight in weights.values()])


def group_lasso(weights: Mapping[str, Tensor], *, axes: Sequence[Axis]) -> Float[Tensor, ""]:
    """Σ over units of √n · ‖w_unit‖₂, n the weights of a unit: every slice that goes together with it.

    Yuan & Lin 2006; Wen et al. 2016 (arXiv:1608.03665). Slices of parameters that ``weights`` does not hold (biases)
    and those that several units share are left out. The gradient of a unit that is 0 is 0.
    Raises: ValueError for an axis none of whose slices is held."""
    return _total([(unit_size(weights, axis) ** 0.5) * unit_norms(weights, axis).sum() for axis in axes])


def polarization(gates: Mapping[str, Tensor], *, t: float = 1.2) -> Float[Tensor, ""]:
    """t · Σ |γ| − Σ |γ − γ̄|, γ̄ the mean over all gates: draws some to 0 and others to one value above it.

    Zhuang et al. 2020, Neuron-level structured pruning using polarization regularizer (NeurIPS 2020), eq. 2; larger t
    draws more to 0. γ ≥ 0."""
    every = torch.cat([gate.reshape(-1) for gate in gates.values()])
    return t * every.abs().sum() - (every - every.mean()).abs().sum()


def unit_norms(weights: Mapping[str, Tensor], axis: Axis) -> Float[Tensor, "size"]:
    """‖w_unit‖₂ of each unit of an axis. Raises: ValueError if no slice of it is held."""
    squares = _total([block.square().flatten(1).sum(1) for block in unit_blocks(weights, axis)])
    # the root of 0 has no gradient, and the norm's subgradient there is 0
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1).sqrt(), 0)


def unit_size(weights: Mapping[str, Tensor], axis: Axis) -> int:
    """Weights of one unit, over the slices that are held."""
    return sum(block[0].numel() for block in unit_blocks(weights, axis))


def unit_blocks(weights: Mapping[str, Tensor], axis: Axis) -> list[Tensor]:
    """Each slice of the axis as [size, …], the unit first; views. Raises: ValueError if there is none, and for stacked
    axes."""
    blocks = list(_blocks(weights, axis))
    if not blocks:
        raise ValueError(f"weights must hold a slice of axis {axis.name!r}, got {len(weights)} others")
    return blocks


def _blocks(weights: Mapping[str, Tensor], axis: Axis) -> Iterator[Tensor]:
    if axis.stacked:
        raise ValueError(f"units of axis {axis.name!r} must be slices of a dimension, got those of stacked matrices")
    for part in axis.slices:
        if part.parameter in weights and not (part.grouped and axis.group_size > 1):
            tensor = weights[part.parameter]
            dim = part.dim % tensor.ndim
            own = tensor.narrow(dim, part.offset, axis.size * part.width)
            yield own.unflatten(dim, (axis.size, part.width)).movedim(dim, 0)


def _hoyer_square(weight: Tensor) -> Tensor:
    squares = weight.square().sum()
    return weight.abs().sum().square() / torch.where(squares > 0, squares, 1)


def _total(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        raise ValueError("a penalty needs tensors, got none")
    return torch.stack(list(parts)).sum(0)
