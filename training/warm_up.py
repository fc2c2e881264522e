"""The warm-up of DeepSeek sparse attention: only its indexers learn."""

from torch import nn

from sparse_attn.selection.dsa import DSA
from transformer import Transformer


def warming(model: nn.Module) -> list[DSA]:
    """The indexers that warm up."""
    return [module for module in model.modules() if isinstance(module, DSA) and module.warm_up]


def freeze_for_warm_up(model: Transformer) -> None:
    """Freeze all but the indexers that warm up, if there are any: the rest gets no gradient and no optimiser state.

    The dense warm-up stage of DeepSeek-V3.2: attention stays dense, and all parameters but the lightning indexer's are
    frozen.
    """
    indexers = warming(model)
    if indexers:
        model.requires_grad_(False)
        for indexer in indexers:
            indexer.requires_grad_(True)


def describe_warm_up(model: nn.Module) -> str:
    """A line that says what learns; nothing outside a warm-up."""
    indexers = warming(model)
    if not indexers:
        return ""
    learning = sum(parameter.numel() for indexer in indexers for parameter in indexer.parameters())
    return (
        f"warm-up: only the {learning:,} parameters of {len(indexers)} indexers learn, under dense attention;"
        " all others are frozen\n"
    )
