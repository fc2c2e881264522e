"""Pruned models of transformers back from a folder, layers of unequal sizes included."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruning.adapters.biases import BIASES, give_bias
from pruning.adapters.families import SUPPORTED, Place, family_of, row_multiple, weight_of
from pruning.adapters.geometry import axes_of_place
from pruning.adapters.record import LAYERS, WIDTH
from pruning.axes import Axis
from pruning.surgery import shrink

KINDS = ("head", "neuron", "expert", "expert_neuron")


def load_pruned(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str | None = None,
) -> nn.Module:
    """A model that was pruned here and saved with its own `save_pretrained`, in evaluation mode.

    It is the transformers class that the config names. Where layers differ in size, as the config's ``pruned_layers``
    and ``pruned_width`` record, its still empty modules shrink to those sizes before transformers reads the weights,
    and get the biases that ``pruned_biases`` tells of; uniform and unpruned models load too. Experts whose rows are no
    multiple of 16 bytes run one by one (experts_implementation="eager"). dtype: as saved by
    default. device: the CPU by default. attention: the backend ("sdpa", "eager", ...), transformers' choice by default.

    >>> model.save_pretrained(folder)
    >>> again = load_pruned(folder, dtype=torch.float32)
    Raises: ValueError for a class that is not supported, sizes that do not fit it, and missing or surplus tensors;
    ImportError without transformers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = _class_named(transformers, config.architectures)
    settings: dict[str, Any] = {"device_map": device} if device is not None else {}
    model, report = _shrinking(kind).from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        attn_implementation=attention,
        output_loading_info=True,
        **settings,
    )
    for what in ("missing_keys", "unexpected_keys"):
        if report[what]:
            raise ValueError(f"{what} of {folder} must be none, got {', '.join(sorted(report[what]))}")
    model.__class__ = kind
    _run_one_by_one(model)
    return model.eval()


def _run_one_by_one(model: Any) -> None:
    """Experts whose rows grouped products cannot take in this dtype go one after the other."""
    family = family_of(model)
    if family is None or family.experts is None:
        return
    place = Place(model, family)
    shapes = [weight_of(layer, family.experts, "down_proj").shape for layer in place.layers]
    if any(size % row_multiple(place) for shape in shapes for size in shape[1:]):
        model.set_experts_implementation("eager")


def _class_named(library: Any, names: list[str] | None) -> Any:
    name = names[0] if names else None
    if name is None or name not in SUPPORTED:
        raise ValueError(f"architectures must name one of {', '.join(SUPPORTED)}, got {name!r}")
    return getattr(library, name)


def _shrinking(kind: Any) -> Any:
    """The class with modules of the recorded sizes: from_pretrained makes the model itself, so only a class can tell it
    what to make. It goes once the model is there."""

    def init(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        kind.__init__(self, config, *arguments, **keywords)
        _shrink_to_record(self)

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _shrink_to_record(model: Any) -> None:
    family = family_of(model)
    assert family is not None
    place, config = Place(model, family), model.config
    if getattr(config, BIASES, False):
        for layer in place.layers:
            give_bias(layer.get_submodule(family.hidden))
    sizes, width = getattr(config, LAYERS, None), getattr(config, WIDTH, None)
    # a folder that was saved to run its experts one by one may hold any width
    axes = [replace(axis, multiple=1) for axis in axes_of_place(place, record=False)]
    kept: dict[str, list[int]] = {}
    if sizes is not None:
        _check_sizes(sizes, len(place.layers), 3 if family.experts is None else 4)
        kept = {axis.name: _kept(axis, sizes[axis.layer]) for axis in axes if axis.kind in KINDS}
    if width is not None:
        kept |= {axis.name: _first(axis, width) for axis in axes if axis.kind == "width"}
    shrink(model, axes, kept)


def _check_sizes(sizes: Any, layers: int, count: int) -> None:
    if len(sizes) != layers or any(len(one) != count or not all(type(n) is int for n in one) for one in sizes):
        raise ValueError(f"{LAYERS} must give {count} sizes of each of {layers} layers, got {sizes!r}")


def _kept(axis: Axis, sizes: list[int]) -> list[int]:
    heads, groups, neurons = sizes[:3]
    if axis.kind == "expert":
        return _first(axis, sizes[3])
    if axis.kind == "neuron":
        return _first(axis, neurons)
    if axis.stacked:
        return _first_of_each(axis, neurons)
    if axis.groups == 1 or not heads:
        return _first(axis, heads)
    if groups < 1 or heads % groups or groups > axis.groups or heads // groups > axis.group_size:
        raise ValueError(
            f"{axis.name} must have at most {axis.size} heads on {axis.groups} key-value heads, got {heads} on {groups}"
        )
    return [group * axis.group_size + unit for group in range(groups) for unit in range(heads // groups)]


def _first_of_each(axis: Axis, count: int) -> list[int]:
    if not 1 <= count <= axis.group_size:
        raise ValueError(f"neurons of each expert of {axis.name} must be in [1, {axis.group_size}], got {count}")
    return [group * axis.group_size + unit for group in range(axis.groups) for unit in range(count)]


def _first(axis: Axis, count: int) -> list[int]:
    if not axis.least <= count <= axis.size:
        raise ValueError(f"units of {axis.name} must be in [{axis.least}, {axis.size}], got {count}")
    return list(range(count))
