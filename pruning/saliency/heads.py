"""Importance of heads and neurons by the gradient of a gate on each, and by leaving each out."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import (
    Batch,
    Loss,
    Progress,
    batch_size,
    evaluating,
    model_batches,
    samples_of,
    scalar_loss,
)
from pruning.gates import gated, masked
from pruning.model_axes import axes_of
from pruning.saliency.record import AxisScores, Normalize, record


def head_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    axes: Sequence[Axis] | None = None,
    normalize: Normalize = "l2",
    progress: Progress = None,
) -> AxisScores:
    """I_h = mean over samples of abs(∂L_b/∂ξ_h) at ξ = 1, ξ_h a gate on the output of head h.

    Michel et al. 2019 (arXiv:1905.10650), eq. 2; the absolute value is taken for each sample, for a batch's mean
    gradient cancels. normalize="l2" divides each layer's scores by their norm, as the paper does; None compares raw
    scores across layers. batches: token ids [B, L] or keyword dicts. progress: wraps the batches, such as
    rich.progress.track. See `gate_importance` for `loss` and errors.

    >>> prune_heads(model, head_importance(model, batches), fraction=0.3)
    """
    return gate_importance(
        model, batches, axes=axes_of(model, "head", axes), loss=loss, normalize=normalize, progress=progress
    )


def neuron_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    axes: Sequence[Axis] | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """mean over samples of abs(∂L_b/∂ξ_n), ξ_n a gate on feed-forward neuron n: `gate_importance` over neurons."""
    return gate_importance(
        model, batches, axes=axes_of(model, "neuron", axes), loss=loss, normalize=normalize, progress=progress
    )


def gate_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis],
    loss: Loss | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """mean over samples of abs(∂L_b/∂ξ_u) at ξ = 1, for every unit u of `axes`.

    loss(model, batch) → scalar, a sum over the samples of the batch (None: next-token cross-entropy, mean over each
    sample's tokens). Each sample has its own gate, so one backward gives every sample's gradient; a loss that is a mean
    over the batch only scales that batch's scores by 1/B. The model runs in evaluation mode; its mode, its
    parameters' requires_grad and .grad, and its hooks are as before afterwards, errors included. Capacity-limited MoE
    layers let samples compete for places: score those with capacity off. With stacked axes among `axes` the samples
    run one by one.
    Raises: ValueError if batches are empty, the loss is no finite scalar, or an axis' gate module does not run."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    samples = 0
    with evaluating(model), torch.enable_grad():
        for batch in model_batches(model, batches, progress=progress):
            samples += batch_size(batch)
            for part in samples_of(batch) if any(axis.stacked for axis in axes) else [batch]:
                found = _gate_gradients(model, part, axes, loss, dtype)
                for axis, gradient in zip(axes, found, strict=True):
                    totals[axis.name] += gradient.double().abs().sum(0).cpu()
    means = {name: total / samples for name, total in totals.items()}
    return record(axes, means, method="gate gradient", samples=samples, normalize=normalize)


def _gate_gradients(
    model: nn.Module, batch: Batch, axes: Sequence[Axis], loss: Loss | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """∂L_b/∂ξ_u [B, size] of each axis."""
    device = next(model.parameters()).device
    one = torch.ones((), device=device, dtype=dtype)
    shapes = {axis.name: (axis.size,) if axis.stacked else (batch_size(batch), axis.size) for axis in axes}
    ones = {name: one.expand(shape).clone().requires_grad_() for name, shape in shapes.items()}
    # backward inside the context: activation checkpointing runs the hooks again
    with gated(model, axes, ones) as ran:
        value = scalar_loss(model, batch, loss)
        _check_ran(axes, ran)
        if not value.requires_grad:
            raise ValueError("loss must depend on the gates differentiably, got a value without gradient")
        found = torch.autograd.grad(value, list(ones.values()), allow_unused=True, materialize_grads=True)
    return tuple(gradient.view(-1, axis.size) for gradient, axis in zip(found, axes, strict=True))


def _check_ran(axes: Sequence[Axis], ran: set[str]) -> None:
    missing = [axis for axis in axes if axis.name not in ran]
    if missing:
        raise ValueError(f"gate module {missing[0].gate!r} of axis {missing[0].name!r} did not run in the forward pass")


def leave_one_out(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss: Loss | None = None,
    axes: Sequence[Axis] | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """L(without unit u) − L, mean over samples: what `head_importance` approximates, and its oracle.

    One pass over `batches` for every unit (heads by default), so it is slow; a score may be negative.
    Raises: as `gate_importance`."""
    chosen = axes_of(model, "head", axes)
    held = list(model_batches(model, batches))
    samples = sum(batch_size(batch) for batch in held)
    units = [(axis, unit) for axis in chosen for unit in range(axis.size)]
    values = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in chosen}
    with evaluating(model), torch.no_grad():
        whole = _total_loss(model, held, loss)
        for axis, unit in progress(units) if progress else units:
            with masked(model, [axis], {axis.name: [other for other in range(axis.size) if other != unit]}):
                values[axis.name][unit] = (_total_loss(model, held, loss) - whole) / samples
    return record(chosen, values, method="leave one out", samples=samples, normalize=normalize)


def _total_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> float:
    return sum(scalar_loss(model, batch, loss).item() for batch in batches)
