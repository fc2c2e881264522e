"""The axes of Hugging Face models, chosen by the model's class name; transformers itself is not imported."""

from torch import nn

from pruning.adapters.families import FAMILIES, SUPPORTED, Place, family_of
from pruning.adapters.geometry import axes_of_place
from pruning.axes import Axis

__all__ = ["FAMILIES", "SUPPORTED", "adapted_axes"]


def adapted_axes(model: nn.Module) -> list[Axis] | None:
    """The axes of a model of a supported class, None for any other class.

    Kinds: "head" (by key-value group), "neuron" or "expert", "layer", and "width" where norms are RMSNorms; OLMoE has
    no "head" axes, for it normalises queries and keys over all heads at once. Each resize updates the modules and the
    config: a result that the config can describe loads through stock transformers, any other one by `load_pruned`, and
    a warning says so."""
    family = family_of(model)
    return None if family is None else axes_of_place(Place(model, family))
