"""Thresholded feed-forward networks, and attention projections, in place of a model's own, and back again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.column_products import Execution
from moe.thresholded import Activation, ThresholdedFeedForward, Thresholds
from moe.thresholded_linear import AttentionThresholds, ThresholdedLinear

# names of the four maps of an attention: of Hugging Face's Llama and its kin, and of this library
PROJECTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("query", "key", "value", "output"))

# what method "relu" puts for the functions that are not zero below 0; the others stay
RELU_FOR: Mapping[Activation, Activation] = {"swiglu": "reglu", "gelu": "relu"}


@dataclass(frozen=True)
class FeedForwardSite:
    """A module of a model with two or three linear children, read as a feed-forward network."""

    module: nn.Module
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    activation: Activation


@dataclass(frozen=True)
class AttentionSite:
    """A module of a model with four linear children, read as an attention, and their names, query first."""

    module: nn.Module
    names: tuple[str, str, str, str]

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """query, key, value and output."""
        return {part: getattr(self.module, name) for part, name in zip(PROJECTIONS[1], self.names, strict=True)}


@dataclass(frozen=True)
class SparsifiedActivations:
    """The thresholded layers that stand in a model, by name, and the modules that they replaced.

    layers: feed-forward networks; projections: of attention, ``<attention>.<name of the Linear>``.
    """

    model: nn.Module
    layers: Mapping[str, ThresholdedFeedForward]
    originals: Mapping[str, nn.Module]
    projections: Mapping[str, ThresholdedLinear] = field(default_factory=dict)

    def restore(self) -> None:
        """Put the replaced modules back; they share their weights with the layers, so training is not lost.

        Do so before saving: the state dict has the original names again.
        """
        standing: dict[str, nn.Module] = {**self.layers, **self.projections}
        for name, module in self.originals.items():
            _put(self.model, name, module.train(standing[name].training))


def feedforward_sites(model: nn.Module) -> dict[str, FeedForwardSite]:
    """The feed-forward networks of a model, by module name, in order: modules with the Linear children gate_proj,
    up_proj and down_proj (Hugging Face Llama) or up, down and perhaps gate (this library's FeedForward).

    Raises: ValueError for one whose activation is none of those of :class:`ThresholdedFeedForward`.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ThresholdedFeedForward):
            raise ValueError(f"model must not be sparsified already, got a ThresholdedFeedForward at {name!r}: restore")
        for suffix in ("_proj", ""):
            gate, up, down = (getattr(module, part + suffix, None) for part in ("gate", "up", "down"))
            if isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and (gate is None or _is_linear(gate)):
                found[name] = FeedForwardSite(module, gate, up, down, _activation_of(name, module, gate is not None))
    return found


def attention_sites(model: nn.Module) -> dict[str, AttentionSite]:
    """The attentions of a model, by module name, in order: modules with the Linear children q_proj, k_proj, v_proj and
    o_proj (Hugging Face Llama) or query, key, value and output (this library's).

    Raises: ValueError for one that has thresholds already.
    """
    found = {}
    for name, module in model.named_modules():
        for names in PROJECTIONS:
            children = [getattr(module, child, None) for child in names]
            if any(isinstance(child, ThresholdedLinear) for child in children):
                raise ValueError(f"model must not be sparsified already, got thresholds in {name!r}: restore")
            if all(_is_linear(child) for child in children):
                found[name] = AttentionSite(module, names)
    return found


def sparsify_activations(
    model: nn.Module,
    *,
    method: Literal["hard", "cats", "teal", "cett", "relu"],
    thresholds: float | Thresholds | Mapping[str, Thresholds] = 0.0,
    execution: Execution = "auto",
    top_k: int | None = None,
    predictors: Mapping[str, nn.Module] | None = None,
    attention: float | AttentionThresholds | Mapping[str, AttentionThresholds] | None = None,
) -> SparsifiedActivations:
    """Replace, in place, every feed-forward network of the model by a thresholded one over the same weights.

    method: as in :class:`ThresholdedFeedForward`; "relu" puts relu where silu or gelu was (arXiv:2310.04564), another
    function that wants some training, leaves reglu, drelu, relu and relu2 as they are, and drops what is at most the
    threshold. thresholds: one for all, or one for each module
    name, as ``calibrate_thresholds`` returns them. top_k: instead, with method "hard", so many neurons of each token.
    predictors: for each module name, which neurons are computed at all (see ``train_predictor``); they become part of
    the model until it is restored. attention: with method "teal", also thresholds for the inputs of attention's four
    projections, given like ``thresholds`` (see ``calibrate_teal``); None leaves attention dense. A model without dense
    feed-forward networks, as a mixture of experts, can have those alone.
    Raises: ValueError if the model has no such network, is sparsified already, or thresholds, attention or predictors
    miss a name or have more; for options that ThresholdedFeedForward refuses.
    """
    sites = feedforward_sites(model)
    attentions = _attentions_of(model, method, attention)
    if not (sites or attentions):
        raise ValueError("model must hold Linear children gate_proj, up_proj, down_proj or up, down, got none")
    for kind, named in (("thresholds", thresholds), ("predictors", predictors)):
        if isinstance(named, Mapping) and named.keys() != sites.keys():
            raise ValueError(f"{kind} must name {', '.join(sites)}, got {', '.join(named) or 'none'}")
    layers = {}
    for name, site in sites.items():
        layers[name] = ThresholdedFeedForward.from_linear(
            site.gate, site.up, site.down,
            activation=RELU_FOR.get(site.activation, site.activation) if method == "relu" else site.activation,
            method="hard" if method == "relu" else method,
            threshold=thresholds[name] if isinstance(thresholds, Mapping) else thresholds,
            top_k=top_k, predictor=None if predictors is None else predictors[name],
            execution=execution,
        ).train(site.module.training)  # fmt: skip
    projections: dict[str, ThresholdedLinear] = {}
    originals = {name: site.module for name, site in sites.items()}
    for name, (attended, limits) in attentions.items():
        for child, (part, linear) in zip(attended.names, attended.projections.items(), strict=True):
            where = f"{name}.{child}" if name else child
            projections[where] = ThresholdedLinear.from_linear(
                linear, threshold=getattr(limits, part), execution=execution
            )
            originals[where] = linear
    for name, layer in (layers | projections).items():
        _put(model, name, layer)
    return SparsifiedActivations(model, layers, originals, projections)


def _attentions_of(
    model: nn.Module, method: str, given: float | AttentionThresholds | Mapping[str, AttentionThresholds] | None
) -> dict[str, tuple[AttentionSite, AttentionThresholds]]:
    """Where attention gets thresholds, and which."""
    if given is None:
        return {}
    if method != "teal":
        raise ValueError(f"method must be 'teal' with thresholds for attention, got {method!r}")
    sites = attention_sites(model)
    if not sites:
        raise ValueError(f"model must hold the Linear children {' or '.join(map(', '.join, PROJECTIONS))}, got none")
    if isinstance(given, Mapping):
        if given.keys() != sites.keys():
            raise ValueError(f"attention must name {', '.join(sites)}, got {', '.join(given) or 'none'}")
        return {name: (site, given[name]) for name, site in sites.items()}
    limits = given if isinstance(given, AttentionThresholds) else AttentionThresholds(*[given] * 4)
    return {name: (site, limits) for name, site in sites.items()}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear)


def _activation_of(name: str, module: nn.Module, gated: bool) -> Activation:
    declared = getattr(module, "activation", None)
    known_names: tuple[Activation, ...] = get_args(Activation)
    for activation in known_names:
        if declared == activation:
            return activation
    function = getattr(module, "act_fn", None)
    probe = torch.linspace(-3.0, 3.0, 13)
    known: dict[Activation, Tensor]
    known = {"swiglu": F.silu(probe), "reglu": F.relu(probe)} if gated else {"relu": F.relu(probe)}
    for activation, expected in known.items():
        if callable(function) and torch.equal(function(probe), expected):
            return activation
    raise ValueError(f"{name}: activation must be silu or relu with a gate, or declared, got {declared or function!r}")
