"""What a shrunk model's config says: the common sizes where it can, else those of every layer."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from pruning.adapters.biases import BIASES
from pruning.adapters.empty import HeadlessAttention
from pruning.adapters.families import Family, Place, features, weight_of

LAYERS = "pruned_layers"
WIDTH = "pruned_width"
_WARNING = (
    "{reason} (heads/key-value heads/neurons{experts}: {sizes}; width {width}): stock transformers cannot load it once "
    "saved. pruning.load_pruned(folder) of this library can{reader}.{hint}"
)
_DIFFER, _UNSAID, _BIASED = (
    "the layers of this model now differ in size",
    "the config of a {kind} has no setting for its new sizes",
    "the config of a {kind} has no setting for the biases that its feed-forwards now have",
)
_HINT = " For equal layers prune with layerwise=True, which takes the same share from each"


@dataclass(frozen=True)
class Sizes:
    """heads, kv_heads and neurons of a layer; experts, where it has them (neurons are then those of each)."""

    heads: int
    kv_heads: int
    neurons: int
    experts: int | None = None

    def as_list(self) -> list[int]:
        """As the config records it."""
        return [self.heads, self.kv_heads, self.neurons, *([] if self.experts is None else [self.experts])]


def sizes_of(family: Family, layer: nn.Module) -> Sizes:
    """What a layer's tensors say."""
    if family.experts is None:
        return Sizes(*head_counts(family, layer), features(family, layer, family.hidden)[0])
    down = weight_of(layer, family.experts, "down_proj")
    return Sizes(*head_counts(family, layer), down.shape[2], down.shape[0])


def head_counts(family: Family, layer: nn.Module) -> tuple[int, int]:
    """(heads, key-value heads) of a layer."""
    attention: Any = layer.get_submodule(family.attention)
    if isinstance(attention, HeadlessAttention):
        return 0, 0
    width = getattr(attention, family.head_dim)
    heads = features(family, layer, family.output)[0] // width
    shared = [part.module for part in family.projections if part.grouped]
    return heads, features(family, layer, shared[0])[1] // width if shared else heads


def width_of(place: Place) -> int:
    """Channels of the residual stream."""
    tables = place.family.positions or (place.family.embedding,)
    return place.base.get_submodule(tables[0]).weight.shape[1]


def projected(place: Place) -> bool:
    """Whether the words' embedding has a width of its own, and is projected onto the stream."""
    entry = place.family.entry
    return entry is not None and entry in dict(place.base.named_modules())


def describe(place: Place) -> None:
    """Write into the config what all layers have in common, as far as it can say it; else record every layer's sizes.

    Where feed-forwards have biases that it cannot say, its number of neurons stays too large for stock transformers.
    A warning says so when the record changes: stock transformers does not read it."""
    config, family = place.model.config, place.family
    forget_file(place.model)
    sizes = [sizes_of(family, layer) for layer in place.layers]
    config.num_hidden_layers = len(sizes)
    if family.heads_in_config:
        config.head_dim = getattr(place.layers[0].get_submodule(family.attention), family.head_dim)
    width = width_of(place)
    _set_common(place, sizes, width)
    said = _said(config, family)
    unsaid = [size.as_list() for size in sizes] if any(size != said for size in sizes) else None
    changed = _set_record(config, LAYERS, unsaid)
    if _set_record(config, WIDTH, width if config.hidden_size != width else None) or changed:
        warnings.warn(_warning(place, sizes, width), stacklevel=2)


def forget_file(model: nn.Module) -> None:
    """Let a model that was read from a .gguf file be saved: transformers marks it as packed, though its weights are
    plain (others are refused) and no longer those of the file."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        quantizer.remove_quantization_config(model)


def _warning(place: Place, sizes: list[Sizes], width: int) -> str:
    differ = len(set(sizes)) > 1
    unsaid = _BIASED if getattr(place.model.config, BIASES, False) else _UNSAID
    reason = _DIFFER if differ else unsaid.format(kind=type(place.model).__name__)
    # this library reads the record of layers into its own model, from Llama alone
    reads = place.family.prefix == "Llama" and place.model.config.hidden_size == width
    return _WARNING.format(
        reason=reason, experts="/experts" if place.family.experts else "", width=width,
        sizes=", ".join("/".join(map(str, size.as_list())) for size in sizes),
        reader=", and so can transformer.from_hugging_face(folder)" if reads else "", hint=_HINT if differ else "",
    )  # fmt: skip


def _set_common(place: Place, sizes: list[Sizes], width: int) -> None:
    first, config, family = sizes[0], place.model.config, place.family
    biased = getattr(config, BIASES, False)
    if first.neurons and _alike(sizes, lambda size: size.neurons) and not biased:
        setattr(config, family.hidden_key, first.neurons)
    elif getattr(config, family.hidden_key) is None:
        # None means four times the width, which may change below
        setattr(config, family.hidden_key, 4 * config.hidden_size)
    if first.experts is not None and _alike(sizes, lambda size: size.experts or 0):
        config.num_local_experts = first.experts
    alike = first.heads and _alike(sizes, lambda size: (size.heads, size.kv_heads))
    values: dict[str, int] = {}
    if family.heads_in_config and alike:
        values = {"num_attention_heads": first.heads, "num_key_value_heads": first.kv_heads}
    if family.width_in_config:
        values["hidden_size"] = width
    if alike and not (family.heads_in_config or family.width_in_config):
        values = _of_heads_and_width(place, first.heads, width)
    _set_if_valid(config, values)


def _of_heads_and_width(place: Place, heads: int, width: int) -> dict[str, int]:
    """What to set where a config means by a head's size the width over the heads; nothing if that is not so."""
    attention, config = place.layers[0].get_submodule(place.family.attention), place.model.config
    if heads * getattr(attention, place.family.head_dim) != width:
        return {}
    values = {"num_attention_heads": heads, "hidden_size": width}
    if place.family.entry is None:
        return values
    # OPT takes an embedding as wide as the stream for one without projections
    if projected(place):
        return {} if config.word_embed_proj_dim == width else values
    return {**values, "word_embed_proj_dim": width}


def _alike(sizes: list[Sizes], part: Callable[[Sizes], Any]) -> bool:
    return len({part(size) for size in sizes}) == 1


def _set_if_valid(config: Any, values: dict[str, int]) -> None:
    """All of `values`, or none if the config refuses them together (Llama's wants heads that divide the width)."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        config.validate_architecture()  # not validate(): that wraps the ValueError in huggingface_hub's own class
    except ValueError:
        for name, value in before.items():
            setattr(config, name, value)


def _said(config: Any, family: Family) -> Sizes:
    heads, hidden = config.num_attention_heads, getattr(config, family.hidden_key)
    shared = getattr(config, "num_key_value_heads", None)
    experts = None if family.experts is None else config.num_local_experts
    return Sizes(heads, shared or heads, 4 * config.hidden_size if hidden is None else hidden, experts)


def _set_record(config: Any, name: str, value: Any) -> bool:
    """Whether a record was made or changed, for which a warning is due."""
    before = getattr(config, name, None)
    if value is None:
        if before is not None:
            delattr(config, name)
        return False
    setattr(config, name, value)
    return before != value
