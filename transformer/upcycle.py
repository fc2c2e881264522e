"""From a dense model to one with mixtures of experts that computes the same at step 0."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from moe import upcycle as upcycle_layer
from moe.nonlinearity import Activation
from transformer.block import Block
from transformer.config import TransformerConfig
from transformer.feedforward import FeedForward
from transformer.feedforward_config import DenseConfig, MoEConfig
from transformer.model import Transformer


def upcycle(
    model: Transformer,
    *,
    num_experts: int,
    k: int,
    granularity: int = 1,
    layers: Sequence[int] | None = None,
    reinitialize: float = 0.0,
    generator: torch.Generator | None = None,
) -> Transformer:
    """A new model whose dense feed-forward layers are mixtures of experts, equal to ``model`` in output.

    Each chosen layer of F neurons gets ``num_experts`` experts of F / granularity and a fresh top-k router with
    renormalised gates: :func:`moe.upcycle` has the rules and the sources. Everything else is copied; nothing is
    shared, and the config says what the layers have become. Rates of dropping single weights (drop_connect)
    and sparse errors (error_k) are not taken over.
    layers: indices of the layers to convert, from the end where negative; None takes every dense one. Komatsuzaki et
    al. (arXiv:2212.05055) convert every second layer, He et al. (arXiv:2410.07524) all.
    reinitialize: share of each expert's neurons drawn anew; the outputs then differ from the dense model's.
    generator: draws routers and neurons; default torch's global one.
    Raises: ValueError for a layer that is not dense or not there, and as :func:`moe.upcycle`.

    >>> sparse = upcycle(Transformer.from_pretrained("dense"), num_experts=8, k=2)
    """
    chosen = _mixtures(_choose(model.config, layers), num_experts, k, granularity)
    parts = tuple(
        dataclasses.replace(layer, feedforward=chosen.get(index, layer.feedforward))
        for index, layer in enumerate(model.config.layers)
    )
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for index in chosen:
        where = f"layers.{index}.feedforward."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(where)}
        dense = cast(FeedForward, cast(Block, model.layers[index]).feedforward)
        layer = upcycle_layer(
            None if dense.gate is None else _weight(dense.gate), _weight(dense.up), _weight(dense.down),
            num_experts=num_experts, k=k, granularity=granularity, activation=cast(Activation, dense.activation),
            reinitialize=reinitialize, generator=generator,
        )  # fmt: skip
        tensors |= {f"{where}{name}": tensor for name, tensor in layer.state_dict().items()}
    with torch.device("meta"):
        result = Transformer(dataclasses.replace(model.config, layers=parts))
    result.load_state_dict(tensors, assign=True)
    return result.train(model.training)


def _mixtures(dense: dict[int, DenseConfig], num_experts: int, k: int, granularity: int) -> dict[int, MoEConfig]:
    """What these layers become. Raises: ValueError where their neurons cannot be divided."""
    for index, config in dense.items():
        if granularity < 1 or config.hidden % granularity:
            raise ValueError(f"granularity must divide the {config.hidden} neurons of layer {index}, got {granularity}")
    return {
        index: MoEConfig(config.hidden // granularity, num_experts, k=k, activation=config.activation)
        for index, config in dense.items()
    }


def _weight(linear: torch.nn.Linear) -> Tensor:
    return linear.weight.detach()


def _choose(config: TransformerConfig, layers: Sequence[int] | None) -> dict[int, DenseConfig]:
    """The dense layers to convert. Raises: ValueError for an index out of range, twice, or of another layer."""
    count = len(config.layers)
    dense = {
        i: layer.feedforward for i, layer in enumerate(config.layers) if isinstance(layer.feedforward, DenseConfig)
    }
    if not dense:
        kinds = sorted({type(layer.feedforward).__name__ for layer in config.layers})
        raise ValueError(f"model must have a dense feed-forward layer to convert, got {count} of {', '.join(kinds)}")
    if layers is None:
        layers = list(dense)
    if not layers:
        raise ValueError(f"layers must name at least one of the {len(dense)} dense layers, got none")
    for index in layers:
        if not -count <= index < count:
            raise ValueError(f"layers must be in [{-count}, {count}), got {index}")
    wanted = [index % count for index in layers]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"layers must differ, got {list(layers)}")
    for index in wanted:
        if index not in dense:
            kind = type(config.layers[index].feedforward).__name__
            raise ValueError(f"layers must be dense, layer {index} has {kind}")
    return {index: dense[index] for index in sorted(wanted)}
