"""What must go together when a structure is removed.

An :class:`Axis` names one prunable dimension of a model (the heads of one attention layer, the neurons of one
feed-forward layer, ...) and lists every slice of every tensor that belongs to each of its units. Surgery needs
nothing else: it keeps the chosen slices of each tensor, then calls ``resize`` so that the owner rewrites its
attributes and its config.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch import nn


@dataclass(frozen=True)
class Slice:
    """One tensor's share of an axis: unit ``u`` owns indices ``offset + [u·width, (u+1)·width)`` of ``dim``.

    ``parameter`` is the name as in ``model.named_parameters()``. ``grouped`` says that the tensor is laid out by
    groups of units rather than by units (keys and values under grouped-query attention), so that it shrinks only
    when a whole group goes. ``offset``: first index of unit 0, for tensors that fuse several parts along ``dim``.
    """

    parameter: str
    dim: int
    width: int
    grouped: bool = False
    offset: int = 0


@dataclass(frozen=True)
class Axis:
    """One prunable dimension: ``size`` units, in ``groups`` equal groups, and the slices that each unit owns.

    kind: "head", "neuron", "expert", ...; layer: index of the layer; name: unique within the model.
    gate: name of the module whose input's last dimension is laid out ``[size, width]`` (for heads the output
    projection): multiplying that input by a gate per unit switches units off without surgery.
    groups: 1 where units are independent. Under grouped-query attention the heads of one key-value head form a group;
    a removal takes whole groups or leaves each surviving group with equally many units.
    orphans: parameters that ``resize([])`` drops besides, for they serve nothing without the axis (the norm before it).
    modules: where a unit is a whole module (a layer), the name of each unit's, which goes with all that it holds.
    least: units that must stay (the k of a top-k router).
    multiple: what must divide the number of units that stay, where grouped products over stacked experts read rows of
    them, which must be multiples of 16 bytes.
    flattened: whether the gate module sees [B·L, size·width], a batch's samples one after the other.
    stacked: the groups are the E matrices of stacked parameters [E, ...] (the neurons inside experts): unit
    e·group_size + f is index offset + f of ``dim`` in matrix e alone, and e its index of dimension 0. Every group stays
    and keeps equally many units, others in each. ``gate`` then names the module that holds the stacks, and the last
    slice is the one that reads the units. ``multiple`` counts the units of one group.
    resize(kept): called once the tensors are sliced, with the sorted indices of the surviving units (maybe none).
    owner: the model that `resize` rewrites, weakly, as `prunable_axes` says it; None for axes made by hand, of which
    only their maker knows. Axes are equal whatever their owner is: those of a copy equal those of the original.
    """

    kind: str
    layer: int
    name: str
    size: int
    width: int
    gate: str
    slices: tuple[Slice, ...]
    resize: Callable[[list[int]], None] = field(compare=False, repr=False)
    groups: int = 1
    orphans: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    least: int = 0
    flattened: bool = False
    multiple: int = 1
    stacked: bool = False
    owner: weakref.ref[nn.Module] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1 or self.groups < 1 or self.size % self.groups:
            raise ValueError(f"groups must divide size={self.size} of axis {self.name!r}, got {self.groups}")
        if self.modules and len(self.modules) != self.size:
            raise ValueError(
                f"modules of axis {self.name!r} must name size={self.size} modules, got {len(self.modules)}"
            )
        if self.stacked and (self.width != 1 or any(piece.width != 1 or piece.grouped for piece in self.slices)):
            raise ValueError(f"stacked axis {self.name!r} must have units of width 1 and no grouped slice")

    @property
    def group_size(self) -> int:
        """Units in one group."""
        return self.size // self.groups

    def gate_module(self, model: nn.Module) -> nn.Module:
        """The module whose input carries the units, looked up by name."""
        return model.get_submodule(self.gate)


def owned_by(model: nn.Module, axes: Iterable[Axis]) -> list[Axis]:
    """The axes, with `model` as the owner of those that name none."""
    return [replace(axis, owner=weakref.ref(model)) if axis.owner is None else axis for axis in axes]
