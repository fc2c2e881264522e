"""A model whose layers leave out small activations for good: the thresholds stand in its config and are saved."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from moe import ActivePredictor, AttentionThresholds, Thresholds
from transformer.feedforward_config import DenseConfig, ThresholdedConfig
from transformer.layer_config import LayerConfig
from transformer.model import Transformer

T = TypeVar("T")
Method = Literal["hard", "cats", "teal", "cett", "relu"]
# relu puts relu where silu or gelu was (arXiv:2310.04564)
_RECTIFIED = {"swiglu": "reglu", "gelu": "relu"}


def with_thresholds(
    model: Transformer,
    *,
    method: Method,
    thresholds: Mapping[str, Thresholds] | None = None,
    top_k: int | None = None,
    predictors: Mapping[str, ActivePredictor] | None = None,
    attention: Mapping[str, AttentionThresholds] | None = None,
) -> Transformer:
    """A new model with the weights of ``model`` whose layers leave out small activations, as its config says.

    It computes what :func:`moe.sparsify_activations` with these options makes of ``model`` for the time being, and is
    saved and loaded with them. :func:`moe.calibrate_thresholds` and :func:`moe.calibrate_teal` find thresholds, by the
    names of the modules. thresholds, predictors: of dense feed-forward layers, of which others stay as they are;
    top_k: instead, neurons that every one of them keeps. attention: with "teal", of attention layers.
    Nothing is shared with ``model``. Layers that get thresholds lose rates of dropping single weights and errors
    (drop_connect, error_k), which matter in training.
    Raises: ValueError for a name that is no such layer, thresholds beside top_k, none of thresholds, top_k and
    attention, predictors of layers without thresholds, attention with another method than "teal"; and for what
    :class:`transformer.ThresholdedConfig` refuses.

    >>> found = calibrate_teal(model, batches, sparsity=0.4)
    >>> sparse = with_thresholds(model, method="teal", thresholds=found.feedforward, attention=found.attention)
    """
    config = model.config
    dense = [at for at, layer in enumerate(config.layers) if isinstance(layer.feedforward, DenseConfig)]
    limits = _by_layer("thresholds", thresholds, "feedforward", dense)
    if top_k is not None:
        if limits:
            raise ValueError(f"thresholds must be None with top_k={top_k}, got {len(limits)}")
        limits = {at: Thresholds() for at in dense}
    told = _by_layer("predictors", predictors, "feedforward", limits)
    attended = [at for at, layer in enumerate(config.layers) if layer.attention is not None]
    of_attention = _by_layer("attention", attention, "attention", attended)
    if not limits and not of_attention:
        raise ValueError("thresholds, top_k or attention must be given, for a model with such layers, got none of them")
    if of_attention and method != "teal":
        raise ValueError(f"method must be 'teal' with thresholds for attention, got {method!r}")
    layers = list(config.layers)
    for at, found in limits.items():
        layers[at] = _feedforward(layers[at], method, None if top_k is not None else found, top_k, told.get(at))
    for at, bounds in of_attention.items():
        old = layers[at].attention
        new = None if old is None else dataclasses.replace(old, thresholds=bounds)
        layers[at] = dataclasses.replace(layers[at], attention=new)
    tensors = copied(model) | of_predictors(told)
    return with_layers(model, layers, tensors)


def with_layers(model: Transformer, layers: Sequence[LayerConfig], tensors: Mapping[str, Tensor]) -> Transformer:
    """A model with these layers and weights, else configured as ``model``; it holds ``tensors`` themselves."""
    with torch.device("meta"):
        result = Transformer(dataclasses.replace(model.config, layers=tuple(layers)))
    result.load_state_dict(tensors, assign=True)
    return result.train(model.training)


def copied(model: Transformer) -> dict[str, Tensor]:
    """Its state, that shares nothing with it."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def of_predictors(told: Mapping[int, ActivePredictor]) -> dict[str, Tensor]:
    """Copies of the weights of the layers' predictors, by index, under their names in the model."""
    return {
        f"layers.{at}.feedforward.predictor.{name}": tensor.detach().clone()
        for at, predictor in told.items()
        for name, tensor in predictor.state_dict().items()
    }


def _by_layer(what: str, given: Mapping[str, T] | None, part: str, known: Iterable[int]) -> dict[int, T]:
    """What is given for ``layers.<index>.<part>``, by index."""
    names = {f"layers.{at}.{part}": at for at in known}
    for name in given or ():
        if name not in names:
            raise ValueError(f"{what} must name {', '.join(names) or 'no layer of this model'}, got {name}")
    return {names[name]: value for name, value in (given or {}).items()}


def _feedforward(
    layer: LayerConfig,
    method: Method,
    thresholds: Thresholds | None,
    top_k: int | None,
    predictor: ActivePredictor | None,
) -> LayerConfig:
    dense = cast(DenseConfig, layer.feedforward)
    activation = dense.activation
    new = ThresholdedConfig(
        dense.hidden,
        _RECTIFIED.get(activation, activation) if method == "relu" else activation,
        method="hard" if method == "relu" else method,
        top_k=top_k,
        thresholds=thresholds,
        predictor_rank=None if predictor is None else predictor.down.out_features,
        predictor_threshold=None if predictor is None else predictor.threshold,
    )
    return dataclasses.replace(layer, feedforward=new)
