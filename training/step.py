"""One training step's arithmetic: a batch to its losses and gradients."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moe import Routing, load_balancing_loss, router_z_loss
from training.data import Batch
from transformer import Transformer, chunked_cross_entropy


@dataclass(frozen=True)
class StepOutput:
    """What a forward pass over a batch gives.

    loss: what is minimised, ce + aux·balance + z·z_loss. ce: mean nats a target. balance, z_loss: sums over the layers
    with experts (0 without any). targets: how many predictions ce is the mean of. routings: of those layers, detached.
    """

    loss: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    z_loss: Float[Tensor, ""]
    targets: int
    routings: tuple[Routing, ...]


@dataclass(frozen=True)
class RoutingStats:
    """How a batch used the experts, a number (or list of E numbers) for each layer with experts."""

    loads: list[list[int]]
    entropy: list[float]
    dropped: list[float]


def forward(model: Transformer, batch: Batch, *, aux: float = 0.0, z: float = 0.0) -> StepOutput:
    """Cross-entropy (in chunks: all logits are never held) and side losses of a batch.

    aux: coefficient of the load-balancing loss; z: of the router z-loss. Both are means over this batch's tokens.
    """
    hidden, routings = model.hidden_states(batch.inputs, attention_mask=batch.mask)
    ce = chunked_cross_entropy(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())
    routed = tuple(routing for routing in routings if routing is not None)
    zero = torch.zeros((), dtype=ce.dtype, device=ce.device)
    balance = sum((load_balancing_loss(routing) for routing in routed), zero)
    z_loss = sum((router_z_loss(routing) for routing in routed), zero)
    loss = ce + aux * balance + z * z_loss
    return StepOutput(loss, ce, balance, z_loss, batch.num_targets, tuple(routing.detach() for routing in routed))


def accumulate(
    model: Transformer,
    batch: Batch,
    *,
    micro_batches: int = 1,
    aux: float = 0.0,
    z: float = 0.0,
    autocast: AbstractContextManager[object] | None = None,
) -> StepOutput:
    """Add the gradient of the batch's loss to the parameters, one micro-batch at a time.

    loss = Σ_m n_m/N · loss_m with n_m of the batch's N targets in micro-batch m: the cross-entropy and its gradient
    equal the whole batch's. The z-loss does too without padding; the load-balancing loss is a product of two means
    and is taken within each micro-batch.
    Raises: ValueError if micro_batches does not divide the batch.
    """
    size = len(batch.inputs)
    if micro_batches < 1 or size % micro_batches:
        raise ValueError(f"micro_batches must divide the batch of {size} sequences, got {micro_batches}")
    rows = size // micro_batches
    total = max(1, batch.num_targets)
    outputs = []
    for start in range(0, size, rows):
        with autocast or nullcontext():
            output = forward(model, batch.rows(start, start + rows), aux=aux, z=z)
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


def _combined(outputs: list[StepOutput], total: int) -> StepOutput:
    shares = [output.targets / total for output in outputs]

    def mean(name: str) -> Tensor:
        return torch.stack(
            [getattr(output, name).detach() * share for output, share in zip(outputs, shares, strict=True)]
        ).sum(0)

    routings = tuple(routing for output in outputs for routing in output.routings)
    return StepOutput(mean("loss"), mean("ce"), mean("balance"), mean("z_loss"), total, routings)
