"""What units put out on calibration data: energy, how often they are zero or fire, and how the loss feels them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Loss, Progress, batch_size, evaluating, model_batches, row_batches, scalar_loss
from pruning.calibrated.blocks import run_model
from pruning.saliency.record import AxisScores, Normalize, record

Statistic = Literal["energy", "variance", "active", "firing"]
Response = Literal["sensitivity", "taylor"]
Units = Float[Tensor, "tokens size width"]


def activation_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis],
    statistic: Statistic = "energy",
    threshold: float | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """A statistic of what each unit of `axes` hands its gate module, over all tokens; larger = more important.

    a_u: the unit's numbers [width] at a token, one number for a neuron. "energy": mean ‖a_u‖². "variance": mean
    ‖a_u − mean a_u‖², small where the unit could be a bias. "active": share of tokens with ‖a_u‖ > threshold (0 by
    default), which is 1 − APoZ: the average percentage of zeros runs the other way (Hu et al. 2016, arXiv:1607.03250).
    "firing": share of tokens with ‖a_u‖² > threshold (1 by default) times the mean over the layer's units and the
    batch's tokens (each sequence's, of a model that gathers rows, as Mixture-of-Depths does), so that units that fire
    rarely go first where no activation is exactly 0 either.
    batches: token ids or keyword dicts, run in evaluation mode; padding under ``attention_mask`` does not count.
    Raises: ValueError for another statistic, a threshold where none is taken or below 0, for stacked axes, without
    batches, or if a gate module sees no token."""
    limit = _limit(statistic, threshold)
    _check_read(axes)
    sums = {axis.name: _Sums(axis) for axis in axes}
    samples = 0
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        real: list[Tensor | None] = [None]
        for axis in axes:
            hook = _adder(sums[axis.name], statistic, limit, real)
            hooks.callback(axis.gate_module(model).register_forward_pre_hook(hook).remove)
        for batch in row_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            real[0] = None if mask is None else mask.bool()
            run_model(model, batch)
            samples += batch_size(batch)
    values = {axis.name: sums[axis.name].mean(statistic) for axis in axes}
    return record(axes, values, method=f"activation {statistic}", samples=samples, normalize=normalize)


def _check_read(axes: Sequence[Axis]) -> None:
    for axis in axes:
        if axis.stacked:
            raise ValueError(f"units of axis {axis.name!r} are inside stacked experts, whose input is not theirs: "
                             "score them with expert_neuron_importance or gate_importance")  # fmt: skip


def _limit(statistic: str, threshold: float | None) -> float:
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic must be one of {', '.join(get_args(Statistic))}, got {statistic!r}")
    if threshold is not None and (statistic not in ("active", "firing") or threshold < 0):
        raise ValueError(f"threshold must be >= 0 with 'active' and 'firing' alone, got {threshold} with {statistic!r}")
    return float(statistic == "firing") if threshold is None else threshold


class _Sums:
    """Σ over tokens of a unit's numbers [size, width] and of its statistic [size], on the CPU, float64."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.tokens = axis, 0
        self.plain = torch.zeros(axis.size, axis.width, dtype=torch.float64)
        self.total = torch.zeros(axis.size, dtype=torch.float64)

    def mean(self, statistic: str) -> Float[Tensor, "size"]:
        """The statistic over all tokens. Raises: ValueError if there were none."""
        if not self.tokens:
            raise ValueError(f"gate module {self.axis.gate!r} of axis {self.axis.name!r} saw no token")
        mean = self.total / self.tokens
        if statistic == "variance":
            mean = (mean - (self.plain / self.tokens).square().sum(1)).clamp_min(0)
        return mean


def _adder(
    sums: _Sums, statistic: str, limit: float, real: list[Tensor | None]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        units = units_of(arguments[0], sums.axis)
        if real[0] is not None and units.shape[:2] == real[0].shape:
            units = units[real[0]]
        rows = units.flatten(0, -3).double()
        sums.tokens += len(rows)
        sums.plain += rows.sum(0).cpu()
        sums.total += _count(rows, statistic, limit).cpu()

    return hook


def units_of(x: Float[Tensor, "... U"], axis: Axis) -> Float[Tensor, "... size width"]:
    """The input of the axis' gate module, unit by unit. Raises: ValueError unless it ends in size·width."""
    if x.shape[-1] != axis.size * axis.width:
        raise ValueError(f"input of {axis.gate!r} must end in size·width={axis.size * axis.width}, got {list(x.shape)}")
    return x.unflatten(-1, (axis.size, axis.width))


def _count(rows: Units, statistic: str, limit: float) -> Float[Tensor, "size"]:
    squares = rows.square().sum(-1)
    if statistic == "active":
        return (squares > limit**2).double().sum(0)
    if statistic == "firing":
        return (squares > limit * squares.mean()).double().sum(0)
    return squares.sum(0)


def response_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis],
    response: Response = "taylor",
    loss: Loss | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """How the loss answers to each unit's activations a_u, mean over samples of a sum over the sample's tokens.

    "taylor": Σ_t abs(⟨a_ut, ∂L/∂a_ut⟩), what removing the unit at one token does to the loss at first order (Molchanov
    et al. 2017, arXiv:1611.06440). `gate_importance` takes the absolute value of the sum over a sample's tokens, in
    which tokens cancel. "sensitivity": Σ_t ‖∂L/∂a_ut‖₂, however large the activation is.
    loss(model, batch): a sum over samples (None: next-token loss). Parameters are not touched. The model must not
    recompute activations (gradient checkpointing).
    Raises: ValueError for another response, without batches, if a gate module does not run, and for a loss that does
    not depend on the activations."""
    if response not in get_args(Response):
        raise ValueError(f"response must be one of {', '.join(get_args(Response))}, got {response!r}")
    _check_read(axes)
    totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
    samples = 0
    with evaluating(model), torch.enable_grad():
        for batch in model_batches(model, batches, progress=progress):
            samples += batch_size(batch)
            for axis, (given, gradient) in zip(axes, _responses(model, batch, axes, loss), strict=True):
                slopes = units_of(gradient, axis).double()
                felt = slopes.norm(dim=-1) if response == "sensitivity" else (slopes * units_of(given, axis)).sum(-1)
                totals[axis.name] += felt.abs().flatten(0, -2).sum(0).cpu()
    means = {name: total / samples for name, total in totals.items()}
    return record(axes, means, method=f"activation {response}", samples=samples, normalize=normalize)


def _responses(model: nn.Module, batch: Batch, axes: Sequence[Axis], loss: Loss | None) -> list[tuple[Tensor, Tensor]]:
    """Activations and the loss's gradient in them, for each axis."""
    given: dict[str, Tensor] = {}

    def watch(axis: Axis) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            # nothing before the first gate has a gradient when the parameters are frozen
            x = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
            given[axis.name] = x
            return x, *arguments[1:]

        return hook

    with ExitStack() as hooks:
        for axis in axes:
            hooks.callback(axis.gate_module(model).register_forward_pre_hook(watch(axis)).remove)
        value = scalar_loss(model, batch, loss)
    missing = [axis for axis in axes if axis.name not in given]
    if missing:
        raise ValueError(f"gate module {missing[0].gate!r} of axis {missing[0].name!r} did not run in the forward pass")
    if not value.requires_grad:
        raise ValueError("loss must depend on the activations differentiably, got a value without gradient")
    inputs = [given[axis.name] for axis in axes]
    slopes = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return [(x.detach(), slope) for x, slope in zip(inputs, slopes, strict=True)]
