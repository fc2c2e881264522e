"""Bridging gradients: what a neuron between two layers would be good for, from what passes around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.adapters import adapted_axes
from pruning.axes import Axis
from pruning.model_axes import prunable_axes


@dataclass(frozen=True)
class Bridge:
    """The hidden neurons of one feed-forward, and what stands on both sides of them.

    fan_in: (name of a weight [rows, in], its first row of neuron 0); two in a gated layer. fan_out: name of the weight
    [out, size] that reads the neurons. reader: the module that sees what the layer gets; writer: whose output the
    layer adds."""

    name: str
    size: int
    fan_in: tuple[tuple[str, int], ...]
    fan_out: str
    reader: nn.Module
    writer: nn.Module


@dataclass(frozen=True)
class Birth:
    """A new neuron: values of its incoming [in] and outgoing [out] weights, 0 where it has no connection."""

    incoming: Float[Tensor, "in"]
    outgoing: Float[Tensor, "out"]


def find_bridges(model: nn.Module, names: Sequence[str], axes: Sequence[Axis] | None = None) -> list[Bridge]:
    """One for each "neuron" axis whose weights are all nn.Linear weights among ``names``; none of another kind.

    axes: None takes those that the model lists, none if it lists none."""
    if axes is None:
        known = hasattr(model, "prunable_axes") or adapted_axes(model) is not None
        axes = prunable_axes(model) if known else []
    found = [_bridge(model, axis, names) for axis in axes if axis.kind == "neuron"]
    return [bridge for bridge in found if bridge is not None]


def watch(bridge: Bridge, wanted: Callable[[], bool], add: Callable[[Float[Tensor, "in out"]], None]) -> None:
    """Whenever ``wanted()`` in a forward pass, its backward pass calls ``add`` with B = Σ over tokens of x (−∂L/∂u)ᵀ.

    x [in]: what enters the layer; u [out]: what leaves it. B_ij is the negative gradient of a connection from i
    straight to j. The hooks do nothing for a copy of the model."""
    inputs: list[Tensor] = []

    def seen(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module is bridge.reader and wanted():
            inputs[:] = [arguments[0].detach()]

    def leaving(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if module is bridge.writer and wanted() and inputs and output.requires_grad:
            x = inputs.pop().flatten(0, -2).float()
            output.register_hook(lambda slope: add(-x.mT @ slope.flatten(0, -2).float()))

    bridge.reader.register_forward_pre_hook(seen)
    bridge.writer.register_forward_hook(leaving)


def births(bridging: Float[Tensor, "in out"], *, growth: float, count: int, generator: torch.Generator) -> list[Birth]:
    """Up to ``count`` new neurons; each takes the ⌈growth · in · out⌉ pairs of largest abs(B) that are left.

    For each of its pairs (i, j), with a random sign ε: incoming_i += ε sign(B_ij) √abs(B_ij) and
    outgoing_j += ε √abs(B_ij), so that their product is the step that gradient descent would take on a connection from
    i to j (arXiv:1711.02017, algorithm 1, which adds one neuron; here the r-th takes the r-th share of the pairs)."""
    size = max(1, -int(-growth * bridging.numel() // 1))
    order = bridging.abs().flatten().argsort(descending=True, stable=True)
    made = []
    for pairs in order.split(size)[:count]:
        value = bridging.flatten()[pairs]
        coin = torch.where(torch.rand(len(pairs), generator=generator) < 0.5, -1.0, 1.0).to(value.device)
        root = coin * value.abs().sqrt()
        rows, columns = pairs // bridging.shape[1], pairs % bridging.shape[1]
        incoming = bridging.new_zeros(bridging.shape[0]).index_add_(0, rows, root * value.sign())
        made.append(Birth(incoming, bridging.new_zeros(bridging.shape[1]).index_add_(0, columns, root)))
    return made


def of_strength(values: Float[Tensor, "n"], weight: Tensor, mask: Bool[Tensor, "..."], strength: float) -> Tensor:
    """values · strength · avg(abs(weight)) / avg(abs(values)), both over what is not absent or 0 (equation 7)."""
    typical = weight.abs()[mask].float().mean() if bool(mask.any()) else weight.new_zeros((), dtype=torch.float32)
    own = values.abs()[values != 0].mean() if bool(values.any()) else values.new_ones(())
    return values * (strength * typical / own)


def _bridge(model: nn.Module, axis: Axis, names: Sequence[str]) -> Bridge | None:
    known, modules = set(names), dict(model.named_modules())
    fan_in = [(s.parameter, s.offset) for s in axis.slices if s.dim == 0 and s.parameter.endswith(".weight")]
    fan_out = [s.parameter for s in axis.slices if s.dim in (1, -1)]
    owners = [modules.get(name.removesuffix(".weight")) for name, _ in fan_in] + [modules.get(axis.gate)]
    fits = axis.width == 1 and len(fan_out) == 1 and fan_out[0] == f"{axis.gate}.weight" and bool(fan_in)
    linear = all(isinstance(owner, nn.Linear) for owner in owners)
    if not (fits and linear and {fan_out[0], *(name for name, _ in fan_in)} <= known):
        return None
    reader, writer = owners[0], owners[-1]
    assert reader is not None and writer is not None
    return Bridge(axis.name, axis.size, tuple(fan_in), fan_out[0], reader, writer)
