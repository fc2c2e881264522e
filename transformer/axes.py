"""What can be removed from this library's own transformer, as axes for :mod:`pruning`."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from moe import MoE
from pruning.axes import Axis, Slice, owned_by
from sparse_attn import PerHead
from transformer.attention import Attention
from transformer.block import Block
from transformer.feedforward import FeedForward
from transformer.feedforward_config import DenseConfig
from transformer.unit_axes import expert_axis, expert_neuron_axes, layer_axis, width_axis

if TYPE_CHECKING:
    from transformer.model import Transformer


def prunable_axes(model: "Transformer") -> list[Axis]:
    """One "head" axis for each attention (grouped by key-value head), one "neuron" axis for each dense feed-forward,
    one "expert" axis for each mixture of experts (none under a hash router), one "expert_neuron" axis for the neurons
    inside its experts and another for those of its shared expert, and for the whole model one "layer" axis and one
    "width" axis (the latter unless some block chooses tokens, keys or memories).

    Attention with ``qk_norm="full"`` has no head axis: a head that goes would change the norm of those that stay.
    Nor has one whose heads choose their keys: the choice would change with them.
    """
    axes = []
    for index, layer in enumerate(model.layers):
        if isinstance(layer.attention, Attention) and _heads_part(layer.attention):
            axes.append(_head_axis(model, index, layer.attention))
        if isinstance(layer.feedforward, FeedForward):
            axes.append(_neuron_axis(model, index, layer.feedforward))
        if isinstance(layer.feedforward, MoE) and (experts := expert_axis(model, index, layer.feedforward)):
            axes.append(experts)
        if isinstance(layer.feedforward, MoE):
            axes += expert_neuron_axes(model, index, layer.feedforward)
    width = width_axis(model)
    return owned_by(model, [*axes, layer_axis(model), *([] if width is None else [width])])


def _heads_part(attention: Attention) -> bool:
    return attention.qk_norm != "full" and attention.selection is None


def _head_axis(model: "Transformer", index: int, attention: Attention) -> Axis:
    where, width = f"layers.{index}.attention", attention.head_dim
    biases = ("query", "key", "value") if attention.query.bias is not None else ()
    norms = (f"{where}.query_norm.weight", f"{where}.key_norm.weight") if attention.qk_norm == "head" else ()
    return Axis(
        kind="head", layer=index, name=f"{where}.heads", size=attention.num_heads, width=width,
        gate=f"{where}.output", groups=attention.num_kv_heads, resize=_resize_heads(model, index),
        slices=(
            Slice(f"{where}.query.weight", dim=0, width=width),
            Slice(f"{where}.key.weight", dim=0, width=width, grouped=True),
            Slice(f"{where}.value.weight", dim=0, width=width, grouped=True),
            Slice(f"{where}.output.weight", dim=1, width=width),
            *(Slice(f"{where}.{name}.bias", dim=0, width=width, grouped=name != "query") for name in biases),
        ),
        orphans=(f"layers.{index}.attention_norm.weight", *norms),
    )  # fmt: skip


def _neuron_axis(model: "Transformer", index: int, feedforward: FeedForward) -> Axis:
    where = f"layers.{index}.feedforward"
    names = ("gate", "up") if feedforward.gate is not None else ("up",)
    return Axis(
        kind="neuron", layer=index, name=f"{where}.neurons", size=feedforward.up.out_features, width=1,
        gate=f"{where}.down", resize=_resize_neurons(model, index),
        slices=(
            *(Slice(f"{where}.{name}.weight", dim=0, width=1) for name in names),
            Slice(f"{where}.down.weight", dim=1, width=1),
        ),
        orphans=(f"layers.{index}.feedforward_norm.weight",),
    )  # fmt: skip


def _resize_heads(model: "Transformer", index: int) -> Callable[[list[int]], None]:
    def resize(kept: list[int]) -> None:
        block, layer = cast(Block, model.layers[index]), model.config.layers[index]
        if not kept or block.attention is None or layer.attention is None:
            block.attention = block.attention_norm = None
            model.set_layer(index, dataclasses.replace(layer, attention=None))
            return
        attention = block.attention
        attention.num_heads = len(kept)
        attention.num_kv_heads = attention.key.out_features // attention.head_dim
        if isinstance(attention.pattern, PerHead):
            attention.pattern = attention.pattern.keep(kept)
        if attention.alibi is not None:
            attention.alibi = tuple(attention.alibi[head] for head in kept)
        smaller = dataclasses.replace(
            layer.attention, num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads,
            pattern=str(attention.pattern) if isinstance(attention.pattern, PerHead) else layer.attention.pattern,
            alibi_slopes=attention.alibi,
        )  # fmt: skip
        model.set_layer(index, dataclasses.replace(layer, attention=smaller))

    return resize


def _resize_neurons(model: "Transformer", index: int) -> Callable[[list[int]], None]:
    def resize(kept: list[int]) -> None:
        block, layer = cast(Block, model.layers[index]), model.config.layers[index]
        if not kept or not isinstance(layer.feedforward, DenseConfig):
            block.feedforward = block.feedforward_norm = None
            model.set_layer(index, dataclasses.replace(layer, feedforward=None))
            return
        smaller = dataclasses.replace(layer.feedforward, hidden=len(kept))
        model.set_layer(index, dataclasses.replace(layer, feedforward=smaller))

    return resize
