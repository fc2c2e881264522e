"""The axes of Hugging Face models, chosen by the model's class name; transformers itself is not imported."""

from torch import nn

from pruning.adapters.families import FAMILIES, SUPPORTED, Place, family_of
from pruning.adapters.geometry import axes_of_place
from pruning.adapters.record import forget_file
from pruning.axes import Axis

__all__ = ["FAMILIES", "SUPPORTED", "adapted_axes", "forget_file"]


def adapted_axes(model: nn.Module) -> list[Axis] | None:
    """The axes of a model of a supported class, None for any other class.

    Kinds: "head" (by key-value group), "neuron", "layer" and "width"; Mixtral and OLMoE have whole experts ("expert")
    and the neurons inside them ("expert_neuron") in place of neurons. OLMoE has no "head" axes, for it normalises
    queries and keys over all heads at once, and a model whose head is not one of transformers' own has no "width" axis.
    Each resize updates the modules and the config: a result that the config can describe loads through stock
    transformers, any other one by `load_pruned`, and a warning says so. The configs of GPT-2, OPT and BERT take the
    size of a head for the width over the number of heads: there heads and width that shrink alike can be described
    (one head of twelve and a twelfth of the width)."""
    family = family_of(model)
    return None if family is None else axes_of_place(Place(model, family))
