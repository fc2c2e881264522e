"""How sure a head is of where it looks: the mean of its largest attention weight."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Progress, batch_size, evaluating, model_batches
from pruning.calibrated.blocks import run_model, without_cache
from pruning.model_axes import axes_of
from pruning.saliency.activations import units_of
from pruning.saliency.record import AxisScores, Normalize, record

VALUES = ("value", "v_proj", "v")


def attention_confidence(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis] | None = None,
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """mean over queries of max_s P_hts, the largest attention weight of head h; larger = more important.

    Voita et al. 2019 (arXiv:1905.09418), section 4. Attention is linear in its values: with unit vectors in their place
    a layer puts out its probabilities, whatever kernel or pattern computes them, `width` keys in each pass. So a batch
    costs one pass of the model and L/width passes of each attention. Padding under ``attention_mask`` does not count.
    The value projection is a module named value, v_proj or v in the nearest module around the axis' gate that has one;
    attention must not depend on the values in any other way.
    Raises: ValueError without batches, if no value projection is found, or if an attention does not run."""
    chosen = axes_of(model, "head", axes)
    sums = {axis.name: torch.zeros(axis.size + 1, dtype=torch.float64) for axis in chosen}
    samples = 0
    with evaluating(model), without_cache(model), torch.no_grad(), ExitStack() as hooks:
        real: list[Tensor | None] = [None]
        for axis in chosen:
            owner, value = _attention(model, axis)
            hook = _reader(axis, axis.gate_module(model), value, sums[axis.name], real)
            hooks.callback(owner.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in model_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            real[0] = None if mask is None else mask.bool()
            run_model(model, batch)
            samples += batch_size(batch)
    for axis in chosen:
        if not sums[axis.name][-1]:
            raise ValueError(f"the attention of axis {axis.name!r} saw no token in the calibration batches")
    values = {name: total[:-1] / total[-1] for name, total in sums.items()}
    return record(chosen, values, method="attention confidence", samples=samples, normalize=normalize)


def _attention(model: nn.Module, axis: Axis) -> tuple[nn.Module, nn.Module]:
    """The nearest module around the gate that holds a value projection, and that projection."""
    path = axis.gate
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        for name, module in owner.named_modules():
            if name.rpartition(".")[2] in VALUES and isinstance(module, nn.Linear):
                return owner, module
    raise ValueError(f"axis {axis.name!r} must have a Linear named {', '.join(VALUES)} near {axis.gate!r}, got none")


def _reader(
    axis: Axis, gate: nn.Module, value: nn.Module, sums: Tensor, real: list[Tensor | None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """After an attention ran, runs it again with unit vectors for values; adds up the maxima, and last the queries."""

    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read: list[Tensor] = []
        first, best = 0, torch.empty(0)
        with ExitStack() as stack:
            stack.callback(value.register_forward_hook(lambda _, a, v: _units(v, axis.width, first)).remove)
            stack.callback(gate.register_forward_pre_hook(lambda _, a: read.append(units_of(a[0], axis))).remove)
            length = None
            while length is None or first < length:
                # past the hooks of the owner, of which this is one
                owner.forward(*args, **kwargs)
                found = read.pop().amax(-1)
                best = torch.maximum(best, found) if first else found
                length, first = found.shape[1], first + axis.width
        rows = best.flatten(0, 1) if real[0] is None else best[real[0]]
        sums[:-1] += rows.double().sum(0).cpu()
        sums[-1] += len(rows)

    return hook


def _units(values: Float[Tensor, "B S U"], width: int, first: int) -> Float[Tensor, "B S U"]:
    """Key s of [first, first + width) gets the unit vector s − first in every head, all other keys 0."""
    unit = torch.zeros(values.shape[1], width, dtype=values.dtype, device=values.device)
    here = torch.arange(first, min(first + width, values.shape[1]), device=values.device)
    unit[here, here - first] = 1
    return unit.repeat(1, values.shape[-1] // width).expand_as(values)
