"""One training step's arithmetic: a batch to its losses and gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moe import DepthRouting, Routing, entropy_loss, importance_loss, load_balancing_loss, load_loss, router_z_loss
from moe.losses import Scope
from training.data import Batch
from transformer import Transformer, TransformerConfig, chunked_cross_entropy
from transformer.selection_config import SIDE_LOSSES


@dataclass(frozen=True)
class SideLosses:
    """Coefficients of the side losses (:mod:`moe.losses`), each loss being summed over the layers.

    balance: load balance, over ``scope``: each micro-batch, each of its sequences, or the micro-batches of all
    processes. z: router z-loss. importance, load: squared variation of the experts' weights, and of the smooth load
    that a noisy router estimates. entropy: of the mean router probability, against a uniform one. predictor: of the
    predictors of Mixture-of-Depths layers, which it trains alone; 1, as there is nothing to weigh it against.
    indexer_kl: of the indexer of a DSA layer, which it trains alone likewise. kmeans_commitment: the distance of
    queries and keys to their centroids.
    """

    balance: float = 0.0
    z: float = 0.0
    importance: float = 0.0
    load: float = 0.0
    entropy: float = 0.0
    predictor: float = 1.0
    indexer_kl: float = 1.0
    kmeans_commitment: float = 1e-4
    scope: Scope = "micro_batch"


NO_SIDE_LOSSES = SideLosses()


@dataclass(frozen=True)
class StepOutput:
    """What a forward pass over a batch gives.

    loss: what is minimised, ce + Σ coefficient · Σ over layers of a side loss. ce: mean nats a target. side: each side
    loss by its name in :class:`SideLosses`, one number a layer that has it, detached and without its coefficient;
    balance, z, predictor and those of selections are always there, the others where their coefficient is not 0.
    targets: how many predictions ce is the mean of. routings, depths: of the layers with experts, and of those that
    only some tokens pass, detached.
    """

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    side: dict[str, Float[Tensor, "_"]]
    targets: int
    routings: tuple[Routing, ...]
    depths: tuple[DepthRouting, ...] = ()


@dataclass(frozen=True)
class RoutingStats:
    """How a batch used the experts, a number (or list of E numbers) for each layer with experts."""

    loads: list[list[int]]
    entropy: list[float]
    dropped: list[float]


@dataclass(frozen=True)
class DepthStats:
    """How many tokens passed each Mixture-of-Depths layer. share: of the tokens; accuracy: of its predictor."""

    share: list[float]
    accuracy: list[float]


def forward(model: Transformer, batch: Batch, *, side: SideLosses = NO_SIDE_LOSSES) -> StepOutput:
    """Cross-entropy (in chunks: all logits are never held) and side losses, which are means over this batch's tokens.

    Raises: ValueError for a load loss where a router estimates no load.
    """
    batch = batch.past_prefix(model.config.prefix_length)
    hidden, routings, depths, selections = model.hidden_states(
        batch.inputs, attention_mask=batch.mask, noise=batch.noise
    )
    routed = tuple(routing for routing in routings if routing is not None)
    passing = tuple(depth for depth in depths if depth is not None)
    ce = chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
    losses = side_losses(routed, side, sequences=len(batch.inputs))
    if passing:
        losses["predictor"] = torch.stack([depth.aux_loss() for depth in passing])
    losses |= selection_losses(model.config, selections, nothing=ce.new_zeros(()))
    loss = ce + sum(getattr(side, name) * values.sum() for name, values in losses.items())
    detached = {name: values.detach() for name, values in losses.items()}
    return StepOutput(
        loss=loss,
        ce=ce,
        side=detached,
        targets=batch.num_targets,
        routings=tuple(routing.detach() for routing in routed),
        depths=tuple(depth.detach() for depth in passing),
    )


def side_losses(
    routings: tuple[Routing, ...], side: SideLosses, *, sequences: int
) -> dict[str, Float[Tensor, "layers"]]:
    """Balance and z-loss, and those of ``side`` that count, of each layer; nothing without a layer.

    sequences: how many equal runs of tokens a routing holds, for ``scope="sequence"``.
    """
    if not routings:
        return {}
    runs = sequences if side.scope == "sequence" else None
    losses = {
        "balance": [load_balancing_loss(routing, scope=side.scope, sequences=runs) for routing in routings],
        "z": [router_z_loss(routing) for routing in routings],
    }
    for name, function in (("importance", importance_loss), ("load", load_loss), ("entropy", entropy_loss)):
        if getattr(side, name):
            losses[name] = [function(routing) for routing in routings]
    return {name: torch.stack(values) for name, values in losses.items()}


def selection_losses(
    config: TransformerConfig, made: tuple[dict[str, Tensor] | None, ...], *, nothing: Float[Tensor, ""]
) -> dict[str, Float[Tensor, "layers"]]:
    """Of each layer whose selection has a side loss, by its name; ``nothing`` where the layer was skipped."""
    found: dict[str, list[Tensor]] = {}
    for layer, losses in zip(config.layers, made, strict=True):
        selection = layer.attention.selection if layer.attention else None
        name = None if selection is None else SIDE_LOSSES.get(type(selection))
        if name is not None:
            found.setdefault(name, []).append((losses or {}).get(name, nothing))
    return {name: torch.stack(values) for name, values in found.items()}


def accumulate(
    model: Transformer,
    batch: Batch,
    *,
    micro_batches: int = 1,
    side: SideLosses = NO_SIDE_LOSSES,
    autocast: AbstractContextManager[object] | None = None,
    run: Callable[[Batch], StepOutput] | None = None,
    around: Callable[[bool], AbstractContextManager[object]] | None = None,
) -> StepOutput:
    """Add the gradient of the batch's loss to the parameters, one micro-batch at a time.

    loss = Σ_m n_m/N · loss_m with n_m of the batch's N targets in micro-batch m: the cross-entropy and its gradient
    equal the whole batch's. The z-loss does too without padding, and load balance by sequence for micro-batches of as
    many targets; the other side losses are no means over tokens and are taken within each micro-batch.
    run: the forward pass of a micro-batch, in place of :func:`forward`. around(last): a context for the passes of each.
    Raises: ValueError if micro_batches does not divide the batch.
    """
    size = len(batch.inputs)
    if micro_batches < 1 or size % micro_batches:
        raise ValueError(f"micro_batches must divide the batch of {size} sequences, got {micro_batches}")
    rows = size // micro_batches
    batch = batch.past_prefix(model.config.prefix_length)
    total = max(1, batch.num_targets)
    outputs = []
    for start in range(0, size, rows):
        part = batch.rows(start, start + rows)
        with nullcontext() if around is None else around(start + rows == size):
            with autocast or nullcontext():
                output = forward(model, part, side=side) if run is None else run(part)
            if output.loss.requires_grad:  # not where a warm-up skipped every layer with an indexer
                (output.loss * (output.targets / total)).backward()
        outputs.append(output)
    return _combined(outputs, total)


def routing_stats(routings: tuple[Routing, ...], *, layers: int) -> RoutingStats:
    """Loads, mean router entropy (nats) and share of dropped choices for each of ``layers`` layers with experts.

    routings: those of one or more micro-batches in order, ``layers`` for each.
    """
    if layers == 0:
        return RoutingStats([], [], [])
    by_layer = [routings[layer::layers] for layer in range(layers)]
    return RoutingStats(
        loads=[torch.stack([r.loads() for r in group]).sum(0).tolist() for group in by_layer],
        entropy=[sum(r.entropy().item() for r in group) / len(group) for group in by_layer],
        dropped=[sum(r.drop_fraction() for r in group) / len(group) for group in by_layer],
    )


def depth_stats(depths: tuple[DepthRouting, ...], *, layers: int) -> DepthStats:
    """Means over the micro-batches, for each of ``layers`` Mixture-of-Depths layers.

    depths: those of one or more micro-batches in order, ``layers`` for each.
    """
    by_layer = [depths[layer::layers] for layer in range(layers)]
    return DepthStats(
        share=[sum(d.share().item() for d in group) / len(group) for group in by_layer],
        accuracy=[sum(d.accuracy().item() for d in group) / len(group) for group in by_layer],
    )


def _combined(outputs: list[StepOutput], total: int) -> StepOutput:
    shares = [output.targets / total for output in outputs]

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value.detach() * share for value, share in zip(values, shares, strict=True)]).sum(0)

    return StepOutput(
        loss=mean([output.loss for output in outputs]),
        ce=mean([output.ce for output in outputs]),
        side={name: mean([output.side[name] for output in outputs]) for name in outputs[0].side},
        targets=total,
        routings=tuple(routing for output in outputs for routing in output.routings),
        depths=tuple(depth for output in outputs for depth in output.depths),
    )
