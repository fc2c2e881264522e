"""How sure a head is of where it looks: the mean of its largest attention weight."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Progress, batch_size, evaluating, gathers_rows, row_batches
from pruning.calibrated.blocks import run_model, without_cache
from pruning.model_axes import axes_of
from pruning.saliency.activations import units_of
from pruning.saliency.record import AxisScores, Normalize, record

VALUES = ("value", "v_proj", "v")
# the value is the last third of what it gives
FUSED = "c_attn"


def attention_confidence(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    axes: Sequence[Axis] | None = None,
    skip_first: int = 0,
    skip_ids: Collection[int] = (),
    normalize: Normalize = None,
    progress: Progress = None,
) -> AxisScores:
    """mean over queries of max_s P_hts, the largest attention weight of head h; larger = more important.

    Voita et al. 2019 (arXiv:1905.09418), section 4, who leave the end of a sentence out of the maximum: a head that
    has nothing to do rests on such a key. skip_first: so many keys at the beginning of each sequence are left out (the
    first token is where causal language models rest); skip_ids: keys of these tokens (BERT's [CLS] and [SEP]).
    Attention is linear in its values: with unit vectors in their place
    a layer puts out its probabilities, whatever kernel or pattern computes them, `width` keys in each pass. So a batch
    costs one pass of the model and L/width passes of each attention. Padding under ``attention_mask`` does not count.
    The value projection is a module named value, v_proj or v, or the last third of a c_attn, in the nearest module
    around the axis' gate that has one; attention must not depend on the values in any other way.
    Raises: ValueError without batches, for skip_first < 0, for keys to skip in a model that gathers rows, if no value
    projection is found, if an attention does not run, or if no token is left."""
    if skip_first < 0:
        raise ValueError(f"skip_first must be >= 0, got {skip_first}")
    if (skip_first or skip_ids) and gathers_rows(model):
        raise ValueError("skip_first and skip_ids must be 0 and () where attention is given gathered rows, not the "
                         f"batch's (Mixture-of-Depths), got {skip_first} and {tuple(skip_ids)}")  # fmt: skip
    chosen = axes_of(model, "head", axes)
    sums = {axis.name: torch.zeros(axis.size + 1, dtype=torch.float64) for axis in chosen}
    samples = 0
    with evaluating(model), without_cache(model), torch.no_grad(), ExitStack() as hooks:
        # what the hooks read of a batch: its real tokens, and the keys that do not count
        real: list[Tensor | None] = [None, None]
        for axis in chosen:
            owner, value = _attention(model, axis)
            hook = _reader(axis, axis.gate_module(model), value, sums[axis.name], real)
            hooks.callback(owner.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in row_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            real[:] = None if mask is None else mask.bool(), _skipped(batch, skip_first, skip_ids)
            run_model(model, batch)
            samples += batch_size(batch)
    for axis in chosen:
        if not sums[axis.name][-1]:
            raise ValueError(f"the attention of axis {axis.name!r} saw no token in the calibration batches")
    values = {name: total[:-1] / total[-1] for name, total in sums.items()}
    return record(chosen, values, method="attention confidence", samples=samples, normalize=normalize)


def _skipped(batch: Batch, first: int, ids: Collection[int]) -> Bool[Tensor, "B S"] | None:
    """Keys that no maximum is taken over."""
    tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
    if not first and not ids:
        return None
    skipped = torch.isin(tokens, torch.tensor(sorted(ids), dtype=tokens.dtype, device=tokens.device))
    skipped[:, :first] = True
    return skipped


def _attention(model: nn.Module, axis: Axis) -> tuple[nn.Module, nn.Module]:
    """The nearest module around the gate that holds a value projection, and that projection."""
    path = axis.gate
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        for name, module in owner.named_modules():
            last = name.rpartition(".")[2]
            if (last in VALUES and isinstance(module, nn.Linear)) or last == FUSED:
                return owner, module
    raise ValueError(
        f"axis {axis.name!r} must have a Linear named {', '.join(VALUES)}, or a {FUSED}, near {axis.gate!r}, got none"
    )


def _reader(
    axis: Axis, gate: nn.Module, value: nn.Module, sums: Tensor, real: list[Tensor | None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """After an attention ran, runs it again with unit vectors for values; adds up the maxima, and last the queries."""

    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read: list[Tensor] = []
        first, best = 0, torch.empty(0)
        with ExitStack() as stack:
            # `first` is read when the hook runs
            stack.callback(value.register_forward_hook(lambda m, a, v: _units(m, v, axis, first, real[1])).remove)
            stack.callback(gate.register_forward_pre_hook(lambda _, a: read.append(units_of(a[0], axis))).remove)
            length = None
            while length is None or first < length:
                # past the hooks of the owner, of which this is one
                owner.forward(*args, **kwargs)
                found = read.pop().amax(-1)
                best = torch.maximum(best, found) if first else found
                length, first = found.shape[1], first + axis.width
        fits = real[0] is not None and real[0].shape == best.shape[:2]
        rows = best[real[0]] if fits else best.flatten(0, 1)
        sums[:-1] += rows.double().sum(0).cpu()
        sums[-1] += len(rows)

    return hook


def _units(
    module: nn.Module, made: Float[Tensor, "B S U"], axis: Axis, first: int, skipped: Tensor | None
) -> Float[Tensor, "B S U"]:
    """Key s of [first, first + width) gets the unit vector s − first in every head, all other keys 0, skipped too."""
    parts = [] if isinstance(module, nn.Linear) else list(made.chunk(3, -1))
    values = parts[-1] if parts else made
    unit = torch.zeros(*values.shape[:2], axis.width, dtype=values.dtype, device=values.device)
    here = torch.arange(first, min(first + axis.width, values.shape[1]), device=values.device)
    unit[:, here, here - first] = 1
    if skipped is not None:
        unit[skipped] = 0
    units = unit.repeat(1, 1, values.shape[-1] // axis.width)
    return torch.cat([*parts[:-1], units], -1)
