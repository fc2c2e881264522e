"""Another pattern for a model's attention: weights trained with full attention, used with less of it."""

import dataclasses
from collections.abc import Sequence

from sparse_attn import Pattern
from transformer.config import TransformerConfig


def with_pattern(
    config: TransformerConfig,
    pattern: str | Pattern | Sequence[str | Pattern | None],
    *,
    prefix_length: int | None = None,
) -> TransformerConfig:
    """The config with this pattern in every layer that attends; a sequence gives one a layer, None keeps its own.

    A window that the layer had is replaced, not narrowed. prefix_length: of a prefix language model; None: as it was.
    Raises ValueError for a sequence of another length, and for
    text that is no pattern or sees the future.
    """
    given = [pattern] * len(config.layers) if isinstance(pattern, str | Pattern) else pattern
    if not isinstance(given, Sequence) or len(given) != len(config.layers):
        found = len(given) if isinstance(given, Sequence) else repr(given)
        raise ValueError(
            f"pattern must be one text or Pattern, or one for each of the {len(config.layers)} layers, got {found}"
        )
    for one in given:
        if one is not None and not isinstance(one, str | Pattern):
            raise ValueError(f"pattern of a layer must be text, a Pattern or None, got {one!r}")
    layers = []
    for layer, text in zip(config.layers, given, strict=True):
        if layer.attention is not None and text is not None:
            layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, pattern=str(text)))
        layers.append(layer)
    prefix = config.prefix_length if prefix_length is None else prefix_length
    return dataclasses.replace(config, layers=tuple(layers), prefix_length=prefix)
