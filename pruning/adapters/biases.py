"""Biases of feed-forward outputs that an architecture of transformers has no place for."""

from typing import Any

from torch import nn

from pruning.adapters.families import Place, family_of

BIASES = "pruned_biases"


def takes_biases(model: nn.Module) -> bool:
    """Whether the outputs of the model's feed-forwards are plain Linears of a supported class (Mistral, Qwen2, Qwen3),
    which can be given biases that `load_pruned` finds again."""
    family = family_of(model)
    return family is not None and bool(family.hidden) and not family.transposed


def give_biases(model: nn.Module) -> None:
    """A zero bias for the second Linear of every feed-forward that has none; the config records it.

    Stock from_pretrained would leave the biases out and give another model, with a word about unexpected keys alone.
    So from now on the config keeps the number of neurons that it has, whatever goes, and records each layer's
    (`record.describe`): a folder in which a layer has fewer neurons is refused for the shapes of its tensors."""
    family = family_of(model)
    assert family is not None
    for layer in Place(model, family).layers:
        give_bias(layer.get_submodule(family.hidden))
    config: Any = model.config
    setattr(config, BIASES, True)


def give_bias(linear: Any) -> None:
    """A zero bias for a Linear that has none."""
    if linear.bias is None:
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features), linear.weight.requires_grad)
