"""Axis + indices → smaller parameters: units leave every tensor that holds a part of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning.axes import Axis, Slice
from pruning.gates import check_kept
from pruning.held import held_by
from pruning.model_axes import axes_within


@dataclass(frozen=True)
class Cut:
    """One tensor's surgery: `kept` holds the indices that stay of each listed dimension; `within`, of stacked
    matrices, those that stay in each matrix."""

    parameter: nn.Parameter
    names: tuple[str, ...]
    kept: dict[int, list[int]]
    within: dict[int, list[list[int]]] = field(default_factory=dict)

    def numel(self) -> int:
        """Elements after the cut."""
        shape = list(self.parameter.shape)
        for dim, rows in self.within.items():
            shape[dim] = len(rows[0])
        for dim, indices in self.kept.items():
            shape[dim] = len(indices)
        return torch.Size(shape).numel()


def shrink(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> None:
    """Remove, in place, every unit that is not in `kept[axis.name]`; axes that `kept` does not name stay whole.

    Parameters are replaced by smaller ones of the same dtype, device and requires_grad; a tied parameter is cut once
    and stays tied; `in_features` and `out_features` of nn.Linear follow; then each axis' `resize` runs. No mask
    remains. Optimisers hold the old parameters: make a new one. Everything is checked before anything changes.
    Axes that `prunable_axes` gave of another model stand for the equal ones of this model, so that a copy shrinks by
    the original's, which stays as it is; the `resize` of axes made by hand is called as given.
    Raises: ValueError for unknown axes or units, a kept set that splits groups unequally, is smaller than the axis
    allows or no multiple of what it asks for, slices that do not cover their dimension, and axes of another model that
    this one has no equal of."""
    check_kept(axes, kept)
    shrinking = axes_within(model, _shrinking(axes, kept))
    cuts = plan(model, axes, kept)
    for cut in cuts:
        _replace(model, cut.names, _cut(cut))
    for axis in shrinking:
        axis.resize(sorted(kept[axis.name]))


def plan(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> list[Cut]:
    """The cuts that `shrink` would make, one for each distinct parameter. Raises: as `shrink`."""
    check_kept(axes, kept)
    names = _names(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    cuts: dict[int, Cut] = {}
    for axis in _shrinking(axes, kept):
        if len(kept[axis.name]) < axis.least:
            raise ValueError(f"axis {axis.name!r} must keep at least {axis.least} units, got {len(kept[axis.name])}")
        _check_multiple(axis, len(kept[axis.name]))
        check_groups(axis, kept[axis.name])
        for (name, dim), indices in _kept_indices(parameters, axis, kept[axis.name]).items():
            cut = cuts.setdefault(id(parameters[name]), Cut(parameters[name], names[id(parameters[name])], {}))
            _set(cut.within if axis.stacked else cut.kept, axis, name, dim, indices)
    return list(cuts.values())


def _set(part: dict[int, Any], axis: Axis, name: str, dim: int, indices: list[Any]) -> None:
    if part.setdefault(dim, indices) != indices:
        raise ValueError(
            f"axis {axis.name!r} must keep the same indices of {name!r} (dimension {dim}) as the axis it is shared "
            f"with, got {len(indices)} against {len(part[dim])}"
        )


def _check_multiple(axis: Axis, count: int) -> None:
    count = count // axis.groups if axis.stacked else count
    if count % axis.multiple:
        raise ValueError(
            f"axis {axis.name!r} must keep a multiple of {axis.multiple} units, got {count}: grouped products over "
            "stacked experts need rows of 16 bytes (in transformers, set_experts_implementation('eager') does not)"
        )


def _modules_without(axis: Axis, kept: Sequence[int]) -> list[str]:
    return [name for unit, name in enumerate(axis.modules) if unit not in kept]


def _shrinking(axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> list[Axis]:
    return [axis for axis in axes if len(kept.get(axis.name, range(axis.size))) < axis.size]


def check_groups(axis: Axis, kept: Sequence[int]) -> list[int]:
    """The groups that survive. Raises: ValueError unless they keep equally many units each."""
    counts = [sum(unit // axis.group_size == group for unit in kept) for group in range(axis.groups)]
    if len({count for count in counts if count}) > 1:
        raise ValueError(f"surviving groups of {axis.name!r} must keep equally many units, got {counts}")
    if axis.stacked and not all(counts):
        raise ValueError(f"each group of {axis.name!r} must keep at least one unit, got {counts}")
    return [group for group, count in enumerate(counts) if count]


def _kept_indices(
    parameters: Mapping[str, nn.Parameter], axis: Axis, kept: Sequence[int]
) -> dict[tuple[str, int], list[Any]]:
    """(parameter, dimension) → the indices that stay; several slices of one fused tensor are cut together. Of a
    stacked axis a list for each matrix."""
    if axis.stacked:
        return _stacked_indices(parameters, axis, kept)
    groups = check_groups(axis, kept)
    stays: dict[tuple[str, int], list[Any]] = {}
    covered: dict[tuple[str, int], int] = {}
    for piece in axis.slices:
        units, count = (groups, axis.groups) if piece.grouped else (sorted(kept), axis.size)
        key = _key(parameters, piece, axis)
        starts = [piece.offset + unit * piece.width for unit in units]
        stays.setdefault(key, []).extend(i for start in starts for i in range(start, start + piece.width))
        covered[key] = covered.get(key, 0) + count * piece.width
    _check_covered(parameters, axis, covered)
    return {key: sorted(indices) for key, indices in stays.items()}


def _stacked_indices(
    parameters: Mapping[str, nn.Parameter], axis: Axis, kept: Sequence[int]
) -> dict[tuple[str, int], list[Any]]:
    rows: list[list[int]] = [[] for _ in range(axis.groups)]
    for unit in sorted(kept):
        rows[unit // axis.group_size].append(unit % axis.group_size)
    stays: dict[tuple[str, int], list[list[int]]] = {}
    covered: dict[tuple[str, int], int] = {}
    for piece in axis.slices:
        key = _key(parameters, piece, axis)
        before = stays.get(key, [[] for _ in rows])
        stays[key] = [one + [piece.offset + unit for unit in row] for one, row in zip(before, rows, strict=True)]
        covered[key] = covered.get(key, 0) + axis.group_size
        covered[key[0], 0] = axis.groups
    _check_covered(parameters, axis, covered)
    return {key: [sorted(one) for one in found] for key, found in stays.items()}


def _check_covered(parameters: Mapping[str, nn.Parameter], axis: Axis, covered: Mapping[tuple[str, int], int]) -> None:
    for (name, dim), total in covered.items():
        if total != parameters[name].shape[dim]:
            raise ValueError(
                f"slices of axis {axis.name!r} must cover dimension {dim} of {name!r}, "
                f"{parameters[name].shape[dim]} long, got {total}"
            )


def _key(parameters: Mapping[str, nn.Parameter], piece: Slice, axis: Axis) -> tuple[str, int]:
    if piece.parameter not in parameters:
        why = held_by(parameters, piece.parameter)
        raise ValueError(f"axis {axis.name!r} names parameter {piece.parameter!r}, which the model does not have{why}")
    dims = parameters[piece.parameter].ndim
    if not -dims <= piece.dim < dims:
        raise ValueError(f"dim of {piece.parameter!r} must be in [{-dims}, {dims}), got {piece.dim}")
    return piece.parameter, piece.dim % dims


def _names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def _cut(cut: Cut) -> nn.Parameter:
    tensor: Tensor = cut.parameter.detach()
    for dim, rows in cut.within.items():
        shape = [len(rows), *[1] * (tensor.ndim - 1)]
        shape[dim] = len(rows[0])
        tensor = tensor.take_along_dim(torch.tensor(rows, device=tensor.device).view(shape), dim)
    for dim, indices in cut.kept.items():
        tensor = tensor.index_select(dim, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    return nn.Parameter(tensor.contiguous(), requires_grad=cut.parameter.requires_grad)


def _replace(model: nn.Module, names: Sequence[str], parameter: nn.Parameter) -> None:
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, attribute, parameter)
        if isinstance(module, nn.Linear) and attribute == "weight":
            module.out_features, module.in_features = parameter.shape


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(number, bytes) of the model's distinct parameters."""
    return _count(model, {})


def predict_parameters(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """(number, bytes) of the model's distinct parameters after `shrink(model, axes, kept)`, without doing it."""
    after = {id(cut.parameter): cut.numel() for cut in plan(model, axes, kept)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gone = tuple(f"{name}." for axis in _shrinking(axes, kept) for name in _modules_without(axis, kept[axis.name]))
    # a table that several layers share goes with the last of them
    stays = {id(parameter) for name, parameter in parameters.items() if not name.startswith(gone)} if gone else set()
    after |= {id(p): 0 for name, p in parameters.items() if gone and name.startswith(gone) and id(p) not in stays}
    empty = [axis for axis in _shrinking(axes, kept) if not kept[axis.name]]
    return _count(model, after | {id(parameters[name]): 0 for axis in empty for name in axis.orphans})


def _count(model: nn.Module, after: Mapping[int, int]) -> tuple[int, int]:
    sizes = [(after.get(id(p), p.numel()), p.element_size()) for p in model.parameters()]
    return sum(count for count, _ in sizes), sum(count * width for count, width in sizes)
