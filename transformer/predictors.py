"""Predictors that a model was made with, trained to tell the neurons that its own thresholds keep."""

import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe import ActivePredictor, Foresight, ThresholdedFeedForward
from moe.predictor import foreseen, train_predictor
from moe.recorded import recorded_inputs
from moe.thresholded import activate_gate, activate_up
from transformer.feedforward_config import ThresholdedConfig
from transformer.model import Transformer
from transformer.thresholds import copied, of_predictors, with_layers


def has_predictors(model: Transformer) -> bool:
    """Whether a layer was made with one."""
    return bool(_ranks(model))


def train_own_predictors(
    model: Transformer,
    batches: Iterable[Any],
    *,
    rows: int = 1024,
    recall: float = 0.99,
    steps: int = 300,
    generator: torch.Generator | None = None,
) -> Transformer:
    """A new model with the weights of ``model`` whose predictors are trained and in use (arXiv:2310.17157).

    Each layer with a ``ThresholdedConfig.predictor_rank`` learns, from up to ``rows`` of its inputs in the model
    without predictors, which neurons its method and threshold, or top_k, keep. recall, steps: as
    :func:`moe.train_predictor`. generator: a CPU generator for the rows and the training.
    Nothing is shared with ``model``. The new one is saved and loaded with its predictors.
    Raises: ValueError for a model without predictors, and as :func:`moe.train_predictor`.
    """
    plain = _untold(model)
    told = {}
    for at, (layer, x) in _with_inputs(plain, batches, rows, generator).items():
        rank = _ranks(plain)[at]
        told[at] = train_predictor(
            x, kept_neurons(layer, x), rank=rank, recall=recall, steps=steps, generator=generator
        )
    thresholds = {at: predictor.threshold for at, predictor in told.items()}
    return _with_predictor_thresholds(plain, thresholds, told)


@torch.no_grad()
def own_foresight(model: Transformer, batches: Iterable[Any], *, rows: int = 1024) -> Foresight:
    """What the model's predictors tell of the neurons that its own thresholds keep, on up to ``rows`` inputs a layer.

    The inputs are those in the model without predictors. Raises: ValueError for a model without predictors.
    """
    layers = _with_inputs(_untold(model), batches, rows, None)
    return foreseen((_predictor(model, at).active(x), kept_neurons(layer, x)) for at, (layer, x) in layers.items())


@torch.no_grad()
def kept_neurons(layer: ThresholdedFeedForward, x: Float[Tensor, "T D"]) -> Bool[Tensor, "T F"]:
    """True for the neurons that the layer's method keeps, whatever its predictor tells."""
    h = activate_up(layer.up(x), layer.activation)
    if layer.gate is not None:
        h = layer.opened(activate_gate(layer.gate(x), layer.activation)) * h
    return layer.keep(h) != 0


def _predictor(model: Transformer, at: int) -> ActivePredictor:
    return cast(ActivePredictor, model.get_submodule(f"layers.{at}.feedforward.predictor"))


def _ranks(model: Transformer) -> dict[int, int]:
    """Of the layers with a predictor, by index."""
    layers = enumerate(model.config.layers)
    kinds = {at: layer.feedforward for at, layer in layers if isinstance(layer.feedforward, ThresholdedConfig)}
    return {at: kind.predictor_rank for at, kind in kinds.items() if kind.predictor_rank is not None}


def _untold(model: Transformer) -> Transformer:
    """A copy whose predictors tell every neuron. Raises: ValueError if there are none."""
    if not has_predictors(model):
        raise ValueError("model must have a layer with a predictor_rank, got none")
    return _with_predictor_thresholds(model, dict.fromkeys(_ranks(model)), {})


def _with_predictor_thresholds(
    model: Transformer, thresholds: dict[int, Any], told: dict[int, ActivePredictor]
) -> Transformer:
    layers = list(model.config.layers)
    for at, threshold in thresholds.items():
        feedforward: Any = layers[at].feedforward
        layers[at] = dataclasses.replace(
            layers[at], feedforward=dataclasses.replace(feedforward, predictor_threshold=threshold)
        )
    return with_layers(model, layers, copied(model) | of_predictors(told))


def _with_inputs(
    model: Transformer, batches: Iterable[Any], rows: int, generator: torch.Generator | None
) -> dict[int, tuple[ThresholdedFeedForward, Tensor]]:
    """The layers with a predictor and what comes to them, by index."""
    layers: dict[int, Any] = {at: model.get_submodule(f"layers.{at}.feedforward") for at in _ranks(model)}
    named = {f"layers.{at}.feedforward": layer for at, layer in layers.items()}
    inputs = recorded_inputs(model, named, batches, rows=rows, generator=generator)
    return {at: (layer, inputs[f"layers.{at}.feedforward"]) for at, layer in layers.items()}
