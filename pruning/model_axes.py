"""Where a model's axes come from: an argument, the model's own `prunable_axes()`, or an adapter."""

from collections.abc import Sequence

from torch import nn

from pruning.axes import Axis


def axes_of(model: nn.Module, kind: str, axes: Sequence[Axis] | None = None) -> list[Axis]:
    """`axes` as given, else those of `kind` from `model.prunable_axes()`.

    Raises: ValueError if the model declares no axes, or none of this kind."""
    if axes is not None:
        return list(axes)
    if not hasattr(model, "prunable_axes"):
        raise ValueError(
            f"{type(model).__name__} declares no axes: give it prunable_axes() -> list[pruning.axes.Axis],"
            " or pass axes="
        )
    found = [axis for axis in model.prunable_axes() if axis.kind == kind]
    if not found:
        kinds = sorted({axis.kind for axis in model.prunable_axes()})
        raise ValueError(f"{type(model).__name__} must have axes of kind {kind!r}, got kinds {kinds}")
    return found
