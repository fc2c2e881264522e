"""Gates on the units of an axis: what switches heads and neurons off without surgery."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.axes import Axis


@contextmanager
def gated(model: nn.Module, axes: Sequence[Axis], gates: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Inside the context the input of each axis' gate module is multiplied by `gates[axis.name]`.

    A gate has shape [size], or [B, size] to give each sample its own (one backward then yields every sample's
    gradient). Units of stacked experts are gated by the columns of the matrix that reads them, and take [size] alone.
    Yields the set of axis names whose gate module has run so far; hooks go on exit, errors included.
    Raises: ValueError if an input is not [B, ..., size·width], for axes of experts, and for stacked axes with a gate
    for each sample."""
    ran: set[str] = set()
    with ExitStack() as stack:
        for axis in axes:
            _check_gate(axis)
            if axis.stacked:
                stack.enter_context(_scaled_columns(model, axis, gates[axis.name], ran))
            else:
                hook = _multiplier(axis, gates[axis.name], ran)
                stack.callback(axis.gate_module(model).register_forward_pre_hook(hook).remove)
        yield ran


@contextmanager
def _scaled_columns(model: nn.Module, axis: Axis, gate: Tensor, ran: set[str]) -> Iterator[None]:
    """Inside the context the matrices that read the units are a product with the gate, in place of the parameter."""
    if gate.ndim != 1:
        raise ValueError(f"axis {axis.name!r} of stacked units takes one gate [size] for all samples, got "
                         f"{list(gate.shape)}: give it samples one by one")  # fmt: skip
    owner, _, name = axis.slices[-1].parameter.rpartition(".")
    module = model.get_submodule(owner)
    whole = module.get_parameter(name)
    shape = [axis.groups, *[1] * (whole.ndim - 1)]
    shape[axis.slices[-1].dim] = axis.group_size
    # as torch.func.functional_call does; the parameter keeps its place in the order of parameters
    module._parameters[name] = whole * gate.view(shape).to(whole.dtype)  # type: ignore[assignment]
    try:
        ran.add(axis.name)
        yield
    finally:
        module._parameters[name] = whole


def _check_gate(axis: Axis) -> None:
    if axis.kind == "expert":
        raise ValueError(
            f"axis {axis.name!r} of experts has no gates: a router that lost some shares out among those that stay, "
            "which no product with 0 does; shrink a copy, or score with expert_importance"
        )


def _multiplier(axis: Axis, gate: Tensor, ran: set[str]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        ran.add(axis.name)
        return apply_gate(arguments[0], gate, axis), *arguments[1:]

    return hook


def apply_gate(x: Float[Tensor, "... U"], gate: Float[Tensor, "... size"], axis: Axis) -> Float[Tensor, "... U"]:
    """x[..., u·width + i] · gate[..., u]; gate [size], or [B, size] for x [B, ..., size·width], or for x
    [B·L, size·width] if the axis says that its gate module sees samples flattened.

    Raises: ValueError if the shapes do not fit."""
    if x.shape[-1] != axis.size * axis.width:
        raise ValueError(f"input of {axis.gate!r} must end in size·width={axis.size * axis.width}, got {list(x.shape)}")
    if gate.ndim == 2 and axis.flattened and x.ndim == 2 and x.shape[0] % gate.shape[0] == 0:
        return apply_gate(x.unflatten(0, (gate.shape[0], -1)), gate, axis).flatten(0, 1)
    if gate.ndim == 2 and x.shape[0] != gate.shape[0]:
        raise ValueError(f"input of {axis.gate!r} must lead with the batch size {gate.shape[0]}, got {list(x.shape)}")
    shape = gate.shape if gate.ndim == 1 else (gate.shape[0], *[1] * (x.ndim - 2), axis.size)
    return (x.unflatten(-1, (axis.size, axis.width)) * gate.to(x.dtype).view(shape).unsqueeze(-1)).flatten(-2)


@contextmanager
def masked(model: nn.Module, axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the context every unit that is not in `kept[axis.name]` is multiplied by 0; axes that `kept` does not
    name stay whole. The masked model is what surgery must reproduce, and the way to try a removal out.

    Raises: ValueError for unknown axes and units, and for axes that no gate stands for (experts, layers, widths)."""
    check_kept(axes, kept)
    chosen = [axis for axis in axes if axis.name in kept]
    for axis in chosen:
        if isinstance(axis.gate_module(model), nn.ModuleList):
            raise ValueError(f"axis {axis.name!r} must have a gate module that runs, got a list: shrink a copy instead")
    device = next(model.parameters()).device
    gates = {axis.name: torch.zeros(axis.size, device=device) for axis in chosen}
    for axis in chosen:
        gates[axis.name][list(kept[axis.name])] = 1.0
    with gated(model, chosen, gates):
        yield


def check_kept(axes: Sequence[Axis], kept: Mapping[str, Sequence[int]]) -> None:
    """Raises: ValueError if `kept` names an axis not in `axes`, or units outside it or twice."""
    sizes = {axis.name: axis.size for axis in axes}
    for name, units in kept.items():
        if name not in sizes:
            raise ValueError(f"kept names axis {name!r}, which is not among {sorted(sizes)}")
        if len(set(units)) != len(units) or any(not 0 <= unit < sizes[name] for unit in units):
            raise ValueError(f"kept units of {name!r} must be distinct and in [0, {sizes[name]}), got {list(units)}")
