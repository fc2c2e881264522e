"""Where a model's axes come from: an argument, the model's own `prunable_axes()`, or an adapter."""

from collections.abc import Sequence

from torch import nn

from pruning.adapters import SUPPORTED, adapted_axes
from pruning.axes import Axis


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
    return list(found)
