"""Biases of feed-forward outputs that an architecture of transformers has no place for."""

import warnings
from typing import Any

from torch import nn

from pruning.adapters.families import Place, family_of

BIASES = "pruned_biases"
_WARNING = (
    "the config of a {kind} has no setting for the biases that its feed-forwards now have: stock transformers would "
    "leave them out of the saved model, with a warning about unexpected keys. pruning.load_pruned(folder) of this "
    "library reads them"
)


def takes_biases(model: nn.Module) -> bool:
    """Whether the outputs of the model's feed-forwards are plain Linears of a supported class (Mistral, Qwen2, Qwen3),
    which can be given biases that `load_pruned` finds again."""
    family = family_of(model)
    return family is not None and bool(family.hidden) and not family.transposed


def give_biases(model: nn.Module) -> None:
    """A zero bias for the second Linear of every feed-forward that has none; the config records it, with a warning."""
    family = family_of(model)
    assert family is not None
    for layer in Place(model, family).layers:
        give_bias(layer.get_submodule(family.hidden))
    config: Any = model.config
    if not getattr(config, BIASES, False):
        setattr(config, BIASES, True)
        warnings.warn(_WARNING.format(kind=type(model).__name__), stacklevel=3)


def give_bias(linear: Any) -> None:
    """A zero bias for a Linear that has none."""
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), linear.weight.requires_grad)
