"""The axes of a supported model: every slice of every tensor that goes with a head, neuron, expert, layer, channel."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from pruning.adapters.empty import HeadlessAttention
from pruning.adapters.families import Family, Part, Place, features, neuron_multiple, set_attributes, weight_of
from pruning.adapters.record import describe, head_counts, sizes_of
from pruning.adapters.width import width_axis
from pruning.axes import Axis, Slice

Told = Callable[[], None]
GROUPED_ROWS = 8  # neurons in 16 bytes of bfloat16
NARROW = (
    "{where} has {size} neurons in each expert now, no multiple of 8: transformers' grouped products, its choice by "
    "default, may refuse them; run the model with experts_implementation='eager', as pruning.load_pruned does"
)


def axes_of_place(place: Place, *, record: bool = True) -> list[Axis]:
    """One "head" and one "neuron" axis for each layer (or an "expert" and an "expert_neuron" axis), one "layer" and one
    "width" axis.

    Layers that have lost all heads or neurons have no such axis. record: whether a removal rewrites the config.
    Raises: ValueError for weights that are not plain parameters, and for layers with cross-attention."""
    family = place.family
    if getattr(place.model.config, "add_cross_attention", False):
        raise ValueError("add_cross_attention must be False: no axis covers cross-attention, got True")

    def told() -> None:
        if record:
            describe(place)

    axes = []
    for index, layer in enumerate(place.layers):
        sizes = sizes_of(family, layer)
        axes += [_heads(place, index, told)] if sizes.heads and not family.joined_heads else []
        axes += [_neurons(place, index, told)] if family.inputs and sizes.neurons else []
        axes += [] if family.experts is None else [_experts(place, index, told), _expert_neurons(place, index, told)]
    width = width_axis(place, told)
    return [*axes, _layers(place, told), *([] if width is None else [width])]


def _slices(
    place: Place, index: int, parts: tuple[Part, ...], output: str, units: tuple[int, int], width: int
) -> tuple[Slice, ...]:
    """What `parts` write and `output` reads; units: how many there are, and how many groups of them."""
    layer, where, fused = place.layers[index], place.where(index), max(part.index for part in parts) + 1
    into, out = (0, 1) if place.family.transposed else (1, 0)
    weight_of(layer, output)
    found = [Slice(f"{where}.{output}.weight", into, width)]
    for part in parts:
        count = units[1] if part.grouped else units[0]
        weight_of(layer, part.module)
        has_bias = getattr(layer.get_submodule(part.module), "bias", None) is not None
        for name, dim in (("weight", out), *[("bias", 0)] * has_bias):
            offset = part.index * count * width if fused > 1 else 0
            found.append(Slice(f"{where}.{part.module}.{name}", dim, width, part.grouped, offset))
    return tuple(found)


def _heads(place: Place, index: int, told: Told) -> Axis:
    family, layer, where = place.family, place.layers[index], place.where(index)
    attention: Any = layer.get_submodule(family.attention)
    heads, groups = head_counts(family, layer)
    width = getattr(attention, family.head_dim)
    grouped = any(part.grouped for part in family.projections)
    slices = _slices(place, index, family.projections, family.output, (heads, groups), width)
    held = {piece.parameter for piece in slices} | {f"{where}.{family.output}.bias"}
    inside = [f"{where}.{family.attention}.{name}" for name, _ in attention.named_parameters()]

    def resize(kept: list[int]) -> None:
        if kept:
            _set_heads(family, layer, attention)
        else:
            _set_headless(family, layer, attention)
        told()

    return Axis("head", index, f"{where}.{family.attention}.heads", heads, width, f"{where}.{family.output}", slices,
                resize, groups=groups if grouped else 1,
                orphans=tuple(name for name in inside if name not in held))  # fmt: skip


def _set_heads(family: Family, layer: nn.Module, attention: Any) -> None:
    """The attributes by which transformers splits projections into heads."""
    heads, shared = head_counts(family, layer)
    total = heads * getattr(attention, family.head_dim)
    values = {
        "num_key_value_groups": heads // shared, "num_heads": heads, "num_attention_heads": heads,
        "all_head_size": total, "split_size": total,
    }  # fmt: skip
    for name, value in values.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    for module in {part.module for part in family.projections} | {family.output}:
        _set_features(family, layer, module)


def _set_features(family: Family, layer: nn.Module, name: str) -> None:
    if family.transposed:
        projection: Any = layer.get_submodule(name)
        projection.nx, projection.nf = projection.weight.shape


def _set_headless(family: Family, layer: nn.Module, attention: Any) -> None:
    inside = family.output.removeprefix(f"{family.attention}.")
    output = inside if inside != family.output else None
    empty = HeadlessAttention(
        getattr(attention, family.head_dim), attention.layer_idx, output=output,
        bias=getattr(attention, output).bias if output else None,
        dropout=getattr(attention, family.dropout) if family.dropout else None,
    )  # fmt: skip
    layer.set_submodule(family.attention, empty.train(attention.training))


def _neurons(place: Place, index: int, told: Told) -> Axis:
    family, layer, where = place.family, place.layers[index], place.where(index)
    size = features(family, layer, family.hidden)[0]
    slices = _slices(place, index, family.inputs, family.hidden, (size, size), 1)

    def resize(kept: list[int]) -> None:
        for name in (*(part.module for part in family.inputs), family.hidden):
            _set_features(family, layer, name)
        set_attributes(layer, ("intermediate_size",), len(kept))
        told()

    # Conv1D cannot multiply by a matrix without rows. "mlp" where the projections lie in the layer itself
    return Axis("neuron", index, f"{where}.{family.hidden.rpartition('.')[0] or 'mlp'}.neurons", size, 1,
                f"{where}.{family.hidden}", slices, resize, least=int(family.transposed),
                flattened=family.flattened)  # fmt: skip


def _experts(place: Place, index: int, told: Told) -> Axis:
    family, layer = place.family, place.layers[index]
    assert family.experts is not None
    where, experts = place.where(index), layer.get_submodule(family.experts)
    router: Any = layer.get_submodule(family.router)
    names = [f"{family.experts}.gate_up_proj", f"{family.experts}.down_proj", f"{family.router}.weight"]
    for name in names:
        weight_of(layer, *name.rsplit(".", 1))

    def resize(kept: list[int]) -> None:
        for module in (experts, router):
            module.num_experts = len(kept)
        told()
        if hasattr(place.model, "num_experts"):
            place.model.num_experts = place.model.config.num_local_experts

    return Axis("expert", index, f"{where}.{family.experts}", router.weight.shape[0], 1, f"{where}.{family.experts}",
                tuple(Slice(f"{where}.{name}", 0, 1) for name in names), resize, least=router.top_k)  # fmt: skip


def _expert_neurons(place: Place, index: int, told: Told) -> Axis:
    """The neurons inside each of the stacked experts, of which every expert keeps equally many."""
    layer = place.layers[index]
    assert place.family.experts is not None
    where = f"{place.where(index)}.{place.family.experts}"
    experts: Any = layer.get_submodule(place.family.experts)
    count, _, size = weight_of(layer, place.family.experts, "down_proj").shape

    def resize(_: list[int]) -> None:
        experts.intermediate_dim = weight_of(layer, str(place.family.experts), "down_proj").shape[2]
        if experts.intermediate_dim % GROUPED_ROWS:
            warnings.warn(NARROW.format(where=where, size=experts.intermediate_dim), stacklevel=2)
        told()

    joined = f"{where}.gate_up_proj"
    slices = (Slice(joined, 1, 1), Slice(joined, 1, 1, offset=size), Slice(f"{where}.down_proj", 2, 1))
    return Axis("expert_neuron", index, f"{where}.neurons", count * size, 1, where, slices, resize, groups=count,
                least=count, multiple=neuron_multiple(place), stacked=True)  # fmt: skip


def _layers(place: Place, told: Told) -> Axis:
    """The layers of the model, of which one must stay. Each keeps what it does: the scaling of attention by 1/(layer
    index + 1), an option of GPT-2, goes over into the queries' weights."""
    layers, config = place.layers, place.model.config
    path = f"{place.prefix}{place.family.layers}"

    def resize(kept: list[int]) -> None:
        place.base.set_submodule(place.family.layers, nn.ModuleList(layers[index] for index in kept))
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = len(kept)
        if kinds is not None:
            config.layer_types = [kinds[index] for index in kept]
        for index, layer in enumerate(place.layers):
            _move(place, layer, index)
        told()

    size = len(layers)
    return Axis("layer", 0, path, size, 1, path, (), resize, least=1,
                modules=tuple(f"{path}.{index}" for index in range(size)))  # fmt: skip


def _move(place: Place, layer: nn.Module, index: int) -> None:
    attention: Any = layer.get_submodule(place.family.attention)
    before, attention.layer_idx = attention.layer_idx, index
    if getattr(attention, "scale_attn_by_inverse_layer_idx", False):
        ratio = (index + 1) / (before + 1)
        projection, width = attention.c_attn, attention.split_size
        projection.weight.data[:, :width] *= ratio
        projection.bias.data[:width] *= ratio
        attention.scaling /= ratio
