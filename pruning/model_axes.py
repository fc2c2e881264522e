"""Where a model's axes come from: an argument, the model's own `prunable_axes()`, or an adapter."""

from collections.abc import Sequence

from torch import nn

from pruning.adapters import SUPPORTED, adapted_axes
from pruning.axes import Axis, owned_by


def axes_of(model: nn.Module, kind: str, axes: Sequence[Axis] | None = None) -> list[Axis]:
    """`axes` as given, else those of `kind` from the model's own `prunable_axes()`, else from an adapter.

    Raises: ValueError if the model declares no axes, or none of this kind."""
    if axes is not None:
        return list(axes)
    every = prunable_axes(model)
    found = [axis for axis in every if axis.kind == kind]
    if not found:
        kinds = sorted({axis.kind for axis in every})
        raise ValueError(f"{type(model).__name__} must have axes of kind {kind!r}, got kinds {kinds}")
    return found


def prunable_axes(model: nn.Module) -> list[Axis]:
    """Everything that can be removed from `model` as a structure: its own declaration, or an adapter's.

    The axes name `model` as their owner: `shrink` then cuts a copy of it by the copy's own.

    Raises: ValueError if the model is compiled, or declares no axes and no adapter knows its class."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is what torch.compile returned, whose graphs keep the old sizes: prune the module that was compiled"
            " (model._orig_mod), then compile it again"
        )
    declare = getattr(model, "prunable_axes", None)
    found = adapted_axes(model) if declare is None else declare()
    if found is None:
        raise ValueError(
            f"{type(model).__name__} declares no axes: give it prunable_axes() -> list[pruning.axes.Axis], "
            f"or pass axes=; adapters exist for {', '.join(SUPPORTED)}"
        )
    return owned_by(model, found)


def axes_within(model: nn.Module, axes: Sequence[Axis]) -> list[Axis]:
    """The axes with those of another model (this one's original, say) replaced by the equal ones of `model`.

    Axes made by hand, without an owner, stay as they are. Raises: ValueError for an axis of another model that `model`
    has no equal of, and as `prunable_axes`."""
    inside = {id(module) for module in model.modules()}
    foreign = [axis for axis in axes if axis.owner is not None and id(axis.owner()) not in inside]
    own = {axis.name: axis for axis in prunable_axes(model)} if foreign else {}
    for axis in foreign:
        if own.get(axis.name) != axis:
            raise ValueError(
                f"axis {axis.name!r} must be of the model that shrinks, or equal to one of its own, got one of another "
                f"model: take prunable_axes() of this {type(model).__name__}"
            )
    return [own[axis.name] if axis in foreign else axis for axis in axes]
