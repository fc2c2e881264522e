"""Learned gates on whole units: heads, neurons, and the neurons of experts."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruning.adapters import adapted_axes
from pruning.axes import Axis
from pruning.learned.base import LearnedSparsity
from pruning.learned.hard_concrete import expected_gate, hard_concrete, log_odds, open_probability
from pruning.learned.movement import mean_of
from pruning.learned.penalties import polarization
from pruning.learned.variational import CLIP, kl_to_prior
from pruning.model_axes import prunable_axes
from pruning.selection import completed, select_units
from pruning.sharding import as_wholes, gathered, met_by, own_part, spread_layouts
from pruning.structure import check_fraction, removal_count, unstructured

STACKED_OUTPUTS = ("down", "down_proj")


@dataclass(frozen=True)
class UnitGroup:
    """Units whose activations enter one matrix: multiplying its input by a gate a unit is scaling its columns.

    name: of the axis, or of the parameter for a stack of experts. parameter: the matrix; dim: where its inputs are;
    units: [size], or [E, size] for a stack; width: inputs of a unit; axis: none for a stack
    of a model that declares no axes.
    """

    name: str
    parameter: str
    dim: int
    units: tuple[int, ...]
    width: int
    axis: Axis | None = None

    @property
    def tied(self) -> bool:
        """Whether units go by groups, as heads do under grouped-query attention."""
        return self.axis is not None and not self.axis.stacked and self.axis.groups > 1 and self.axis.group_size > 1

    def spread(self, gate: Tensor) -> Tensor:
        """The gates [size] or [E, size], laid out to be multiplied with the matrix."""
        columns = gate.repeat_interleave(self.width, dim=-1)
        if len(self.units) == 2:
            return columns.unsqueeze(1)
        return columns.view(-1, 1) if self.dim == 0 else columns


def unit_groups(
    model: nn.Module, *, kinds: Sequence[str] = ("head", "neuron"), axes: Sequence[Axis] | None = None
) -> list[UnitGroup]:
    """The axes of these kinds by the matrix that their gate module holds, and, among "neuron", the down projections of
    every stack of experts [E, out, in].

    Raises: ValueError for an axis whose gate module owns no slice of it, and if nothing is found."""
    chosen = [axis for axis in (prunable_axes(model) if axes is None else axes) if axis.kind in kinds]
    groups = [_of_axis(model, axis) for axis in chosen]
    taken = {group.parameter for group in groups}
    if "neuron" in kinds:
        wholes = as_wholes({name: p.data for name, p in model.named_parameters()}, spread_layouts(model))
        stacks = _stacks(model)
        groups += [_of_stack(name, (p.shape[0], p.shape[2]), stacks.get(name)) for name, p in wholes.items()
                   if p.ndim == 3 and name.rpartition(".")[2] in STACKED_OUTPUTS and name not in taken]  # fmt: skip
    if not groups:
        raise ValueError(f"{type(model).__name__} must have units of kinds {tuple(kinds)}, got none")
    return groups


def _stacks(model: nn.Module) -> dict[str, Axis]:
    """The axes of stacked units, if the model has any, by the parameter that reads the units."""
    known = hasattr(model, "prunable_axes") or adapted_axes(model) is not None
    return {axis.slices[-1].parameter: axis for axis in prunable_axes(model) if axis.stacked} if known else {}


def _of_stack(name: str, units: tuple[int, int], axis: Axis | None) -> UnitGroup:
    return UnitGroup(name if axis is None else axis.name, name, 2, units, 1, axis)


def _of_axis(model: nn.Module, axis: Axis) -> UnitGroup:
    if axis.stacked:
        return _of_stack(axis.slices[-1].parameter, (axis.groups, axis.group_size), axis)
    for part in axis.slices:
        if part.parameter == f"{axis.gate}.weight" and part.offset == 0:
            dim = part.dim % model.get_parameter(part.parameter).ndim
            return UnitGroup(axis.name, part.parameter, dim, (axis.size,), part.width, axis)
    raise ValueError(f"axis {axis.name!r} must list a slice of its gate module's weight, {axis.gate}.weight")


class UnitSparsity(LearnedSparsity):
    """w = θ with the columns of each unit scaled by its gate. Abstract: the gate is the method's.

    Raises: as :class:`LearnedSparsity` and :func:`unit_groups`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        start: float,
        strength: float,
        kinds: Sequence[str] = ("head", "neuron"),
        axes: Sequence[Axis] | None = None,
        gate_lr: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        groups = unit_groups(model, kinds=kinds, axes=axes)
        super().__init__(
            model, strength=strength, gate_lr=gate_lr, weights=[g.parameter for g in groups], generator=generator
        )
        self.groups = {group.parameter: group for group in groups}
        values = {name: own_part(weight.data) for name, weight in self._weights.items()}
        self._own_gates({name: values[name].new_full(group.units, start) for name, group in self.groups.items()})

    @abstractmethod
    def gate(self, name: str, *, training: bool) -> Tensor:
        """The gates of the units that enter ``name``: [size], or [E, size]."""

    def effective(self, name: str, theta: Tensor, *, training: bool) -> Tensor:
        """θ with scaled columns."""
        factors = self.groups[name].spread(self.gate(name, training=training))
        return theta * met_by(factors.view(*[1] * (theta.ndim - factors.ndim), *factors.shape), self.view(name)).to(
            theta.dtype
        )

    @torch.no_grad()
    def kept(self) -> dict[str, list[int]]:
        """Axis name → the units that stay, for ``pruning.masked`` and surgery; "name[e]" of stacks without an axis.

        Those that evaluation leaves open; once finished, those whose columns are not all 0. Besides, closed ones that
        surgery cannot take alone (:func:`pruning.selection.completed`: under grouped-query attention surviving groups
        keep equally many heads; experts of one layer equally many neurons). Their columns are 0 once finished: with
        them or without, the model is the same."""
        self.prepare()
        found: dict[str, list[int]] = {}
        for name, group in self.groups.items():
            is_open = self._alive(name) if self.finished else self.gate(name, training=False) != 0
            if group.axis is not None:
                found[group.name] = completed(group.axis, is_open.flatten().nonzero().flatten().tolist())
                continue
            found |= {f"{group.name}[{e}]": row.nonzero().flatten().tolist() for e, row in enumerate(is_open)}
        return found

    def _alive(self, name: str) -> Tensor:
        group, weight = self.groups[name], gathered({name: self.view(name)})[name]
        inputs = weight.movedim(group.dim, -1)
        return (inputs != 0).any(-2).unflatten(-1, (-1, group.width)).any(-1)


@final
class L0Units(UnitSparsity):
    """Hard-concrete gates on heads and neurons; side loss strength · mean P(z ≠ 0).

    Voita et al. 2019 (arXiv:1905.09418) for heads, Louizos et al. 2018 (arXiv:1712.01312) for neurons: as
    :class:`pruning.learned.L0`, one gate a unit. strength: nats that keeping all units costs.
    Raises: as :class:`UnitSparsity`; ValueError for keep outside (0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        keep: float = 0.9,
        kinds: Sequence[str] = ("head", "neuron"),
        axes: Sequence[Axis] | None = None,
        gate_lr: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, start=log_odds(keep), strength=strength, kinds=kinds, axes=axes, gate_lr=gate_lr,
                         generator=generator)  # fmt: skip

    def gate(self, name: str, *, training: bool) -> Tensor:
        """z, drawn in training."""
        value = self._gates[name]
        if not training:
            return expected_gate(value)
        return hard_concrete(value, self.noise(name, value.shape, "uniform").to(value.dtype))

    def loss(self) -> Tensor:
        """strength · mean P(z ≠ 0)."""
        return self.strength * mean_of({name: open_probability(gate) for name, gate in self._gates.items()})


@final
class UnitGates(UnitSparsity):
    """Smooth gates g = σ(φ) or softplus(φ), with a side loss that closes them; the lowest go at the end.

    σ starts near 1 (φ = 3), softplus at 1. The side loss is strength · mean g, or with ``polarize`` = t the
    polarisation of Zhuang et al. 2020 (:func:`pruning.learned.penalties.polarization`) over the number of gates, which
    parts them into closed and open. Evaluation and ``finish()`` close exactly ⌊sparsity · units⌋, the lowest over all
    groups. Under grouped-query attention they close what surgery can take: of as many heads as are among the lowest,
    the largest number that whole groups, or equally many of each surviving group, make up, at the least sum of gates
    (:func:`pruning.selection.select_units`); the lowest other units close for those that are left over. Where there
    are not enough others, fewer than asked close.
    Raises: as :class:`UnitSparsity`; ValueError for a sparsity outside [0, 1) or another form.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        form: Literal["sigmoid", "softplus"] = "sigmoid",
        strength: float = 1.0,
        polarize: float | None = None,
        kinds: Sequence[str] = ("head", "neuron"),
        axes: Sequence[Axis] | None = None,
        gate_lr: float = 1.0,
    ) -> None:
        check_fraction("sparsity", sparsity)
        if form not in ("sigmoid", "softplus"):
            raise ValueError(f"form must be 'sigmoid' or 'softplus', got {form!r}")
        start = 3.0 if form == "sigmoid" else math.log(math.e - 1)
        super().__init__(model, start=start, strength=strength, kinds=kinds, axes=axes, gate_lr=gate_lr)
        self.sparsity, self.form, self.polarize = sparsity, form, polarize
        self._open: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Choose the units that stay."""
        values = {name: self._smooth(name).detach() for name in self._gates}
        count = removal_count(self.sparsity, sum(value.numel() for value in values.values()))
        tied = [name for name in values if self.groups[name].tied]
        closed = sum(int((~row).sum()) for name, row in _lowest_closed(values, count).items() if name in tied)
        self._open = self._by_groups({name: values[name] for name in tied}, closed)
        others = {name: value for name, value in values.items() if name not in tied}
        self._open |= _lowest_closed(others, count - sum(int((~row).sum()) for row in self._open.values()))

    def _by_groups(self, values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        axes = {name: axis for name in values if (axis := self.groups[name].axis) is not None}
        kept = select_units({axis.name: values[name] for name, axis in axes.items()}, [*axes.values()], count=count)
        opened = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in values.items()}
        for name, axis in axes.items():
            opened[name][kept[axis.name]] = True
        return opened

    def gate(self, name: str, *, training: bool) -> Tensor:
        """g in training; in evaluation 0 for the lowest."""
        return self._smooth(name) if training else self._smooth(name) * self._open[name]

    def loss(self) -> Tensor:
        """strength times the mean gate, or the polarisation of all gates over their number."""
        gates = {name: self._smooth(name) for name in self._gates}
        if self.polarize is None:
            return self.strength * mean_of(gates)
        return self.strength * polarization(gates, t=self.polarize) / sum(gate.numel() for gate in gates.values())

    def _smooth(self, name: str) -> Tensor:
        return torch.sigmoid(self._gates[name]) if self.form == "sigmoid" else F.softplus(self._gates[name])


def _lowest_closed(values: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """False at the `count` lowest of all values, or at all of them."""
    if not values:
        return {}
    every = torch.cat([value.reshape(-1) for value in values.values()])
    keep = unstructured(every, min(count, every.numel())).split([value.numel() for value in values.values()])
    return {name: row.view(value.shape) for (name, value), row in zip(values.items(), keep, strict=True)}


@final
class VariationalUnits(UnitSparsity):
    """Variational dropout of whole units: z = 1 + √α ε, one α a unit, one draw a step; closed where log α > threshold.

    The structured variant of Molchanov et al. 2017 (arXiv:1701.05369): multiplicative noise on a unit's activations, α
    learned by the same KL (:func:`pruning.learned.variational.kl_to_prior`), log α clipped to ±8 and pruned above 3.
    Side loss strength · mean KL: the sparsity is found, not asked for. Raises: as :class:`UnitSparsity`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        threshold: float = 3.0,
        start: float = -4.0,
        kinds: Sequence[str] = ("head", "neuron"),
        axes: Sequence[Axis] | None = None,
        gate_lr: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(model, start=start, strength=strength, kinds=kinds, axes=axes, gate_lr=gate_lr,
                         generator=generator)  # fmt: skip
        self.threshold = threshold

    def gate(self, name: str, *, training: bool) -> Tensor:
        """1 + √α ε in training; 1 or 0 in evaluation."""
        spread = self._gates[name].clamp(-CLIP, CLIP)
        if not training:
            return (spread <= self.threshold).to(spread.dtype)
        return 1 + torch.exp(spread / 2) * self.noise(name, spread.shape, "normal").to(spread.dtype)

    def loss(self) -> Tensor:
        """strength · mean KL."""
        return self.strength * mean_of({n: kl_to_prior(g.clamp(-CLIP, CLIP)) for n, g in self._gates.items()})
