"""The axes of Hugging Face models, chosen by the model's class name; transformers itself is not imported."""

from collections.abc import Callable

from torch import nn

from pruning.adapters.llama import llama_axes
from pruning.axes import Axis

ADAPTERS: dict[str, Callable[[nn.Module], list[Axis]]] = {"LlamaForCausalLM": llama_axes}


def adapted_axes(model: nn.Module) -> list[Axis] | None:
    """The axes of a model of a supported class, None for any other class."""
    adapter = ADAPTERS.get(type(model).__name__)
    return None if adapter is None else adapter(model)
