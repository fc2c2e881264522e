"""Whole experts, whole layers and channels of this library's transformer, as axes for :mod:`pruning`."""

import dataclasses
from typing import TYPE_CHECKING, cast

from torch import nn

from moe import HashRouter, MoE
from moe.experts import Experts
from moe.nonlinearity import projections
from pruning.axes import Axis, Slice
from transformer.attention import Attention
from transformer.block import Block
from transformer.feedforward import FeedForward
from transformer.feedforward_config import MoEConfig

if TYPE_CHECKING:
    from transformer.model import Transformer


def expert_axis(model: "Transformer", index: int, layer: MoE) -> Axis | None:
    """The experts of layer ``index``; None under a hash router, whose choice has no part for each expert.

    At least k of them must stay. Under group-limited routing the groups shrink alike, or go whole, and the open groups
    must still hold k.
    """
    router = layer.router
    if isinstance(router, HashRouter):
        return None
    where = f"layers.{index}.feedforward"
    scorers = [f"{where}.router.{name}" for name, parameter in router.named_parameters() if parameter.ndim == 2]
    stacks = ("up", "down") if layer.experts.up_bias is None else ("up", "down", "up_bias", "down_bias")
    names = [*(f"{where}.experts.{name}" for name in stacks), *scorers]
    config = cast(MoEConfig, model.config.layers[index].feedforward)

    def resize(kept: list[int]) -> None:
        layer.keep_experts(kept)
        config = cast(MoEConfig, model.config.layers[index].feedforward)
        groups = len({unit * config.num_groups // config.num_experts for unit in kept})
        smaller = dataclasses.replace(
            config, num_experts=len(kept), num_groups=groups, top_groups=min(config.top_groups, groups)
        )
        model.set_layer(index, dataclasses.replace(model.config.layers[index], feedforward=smaller))

    return Axis(
        kind="expert", layer=index, name=f"{where}.experts", size=layer.num_experts, width=1, gate=where,
        slices=tuple(Slice(name, dim=0, width=1) for name in names), groups=config.num_groups,
        least=config.num_groups * -(-config.k // config.top_groups),
        resize=resize,
    )  # fmt: skip


def expert_neuron_axes(model: "Transformer", index: int, layer: MoE) -> list[Axis]:
    """The neurons inside each expert of layer ``index``, of which every expert keeps equally many, and those of its
    shared expert."""
    where = f"layers.{index}.feedforward"
    # experts that are spread over processes are another class
    stacks = {name: one for name in ("experts", "shared") if isinstance(one := getattr(layer, name), Experts)}
    return [_stack_axis(model, index, f"{where}.{name}", stack) for name, stack in stacks.items()]


def _stack_axis(model: "Transformer", index: int, where: str, stack: Experts) -> Axis:
    def resize(_: list[int]) -> None:
        layer, stack.hidden = model.config.layers[index], stack.down.shape[2]
        config = cast(MoEConfig, layer.feedforward)
        if where.endswith(".shared"):
            smaller = dataclasses.replace(config, shared_hidden=stack.hidden)
        else:
            smaller = dataclasses.replace(config, hidden=stack.hidden)
        model.set_layer(index, dataclasses.replace(layer, feedforward=smaller))

    inputs = [("up", 2)] if stack.up_bias is None else [("up", 2), ("up_bias", 1)]
    return Axis(
        kind="expert_neuron", layer=index, name=f"{where}.neurons", size=stack.num_experts * stack.hidden, width=1,
        gate=where, groups=stack.num_experts, least=stack.num_experts, stacked=True, resize=resize,
        slices=(
            *(
                Slice(f"{where}.{name}", dim=dim, width=1, offset=part * stack.hidden)
                for name, dim in inputs for part in range(projections(stack.activation))
            ),
            Slice(f"{where}.down", dim=2, width=1),
        ),
    )  # fmt: skip


def layer_axis(model: "Transformer") -> Axis:
    """The blocks of the model; at least one must stay."""

    def resize(kept: list[int]) -> None:
        model.layers = nn.ModuleList(model.layers[index] for index in kept)
        model.config = dataclasses.replace(model.config, layers=tuple(model.config.layers[index] for index in kept))
        for index, block in enumerate(model.layers):
            feedforward = cast(Block, block).feedforward
            if isinstance(feedforward, MoE):
                feedforward.name = f"layers.{index}.feedforward"

    size = len(model.layers)
    return Axis(
        kind="layer", layer=0, name="layers", size=size, width=1, gate="layers", slices=(), least=1, resize=resize,
        modules=tuple(f"layers.{index}" for index in range(size)),
    )  # fmt: skip


# of a block, the tensors that lie along the residual stream and the dimension that does
_STREAM = {
    "attention_norm.weight": 0, "feedforward_norm.weight": 0, "attention.query.weight": 1, "attention.key.weight": 1,
    "attention.value.weight": 1, "attention.output.weight": 0, "feedforward.gate.weight": 1,
    "feedforward.up.weight": 1, "feedforward.down.weight": 0, "feedforward.experts.up": 1,
    "feedforward.experts.down": 1, "feedforward.shared.up": 1, "feedforward.shared.down": 1,
    "feedforward.experts.down_bias": 1, "feedforward.shared.down_bias": 1,
    "feedforward.router.weight": 1, "feedforward.router.noise_weight": 1,
}  # fmt: skip
_ASIDE = {
    "attention.query.bias", "attention.key.bias", "attention.value.bias", "attention.query_norm.weight",
    "attention.key_norm.weight", "feedforward.router.bias", "feedforward.experts.up_bias", "feedforward.shared.up_bias",
}  # fmt: skip


def width_axis(model: "Transformer") -> Axis | None:
    """The channels of the residual stream; None where a block has parts that choose tokens, keys or memories by it.

    The model that is left equals the one whose channels are zero and whose norms average over those that stay.
    """
    if not all(_is_plain(cast(Block, block)) for block in model.layers):
        return None
    slices = [Slice("embedding.weight", 1, 1), Slice("norm.weight", 0, 1)]
    slices += [Slice("head.weight", 1, 1)] if model.head is not None else []
    for index, block in enumerate(model.layers):
        names = [name for name, _ in block.named_parameters() if name in _STREAM]
        slices += [Slice(f"layers.{index}.{name}", _STREAM[name], 1) for name in names]

    def resize(kept: list[int]) -> None:
        model.embedding.embedding_dim = len(kept)
        for block in model.layers:
            for module in block.modules():
                if hasattr(module, "dim"):
                    setattr(module, "dim", len(kept))  # noqa: B010 (nn.Module's own type for attributes is a tensor)
        model.config = dataclasses.replace(model.config, dim=len(kept))

    return Axis(
        kind="width", layer=0, name="width", size=model.config.dim, width=1, gate="layers", slices=tuple(slices),
        least=1, resize=resize,
    )  # fmt: skip


def _is_plain(block: Block) -> bool:
    known = isinstance(block.attention, Attention | None) and isinstance(block.feedforward, FeedForward | MoE | None)
    return known and all(name in _STREAM or name in _ASIDE for name, _ in block.named_parameters())
