"""Neurons that compute the same become one, and neurons that hardly change become a bias."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.adapters.biases import give_bias, give_biases, takes_biases
from pruning.axes import Axis, Slice
from pruning.batches import Batch, Progress, evaluating, row_batches
from pruning.model_axes import axes_of
from pruning.structure import removal_count
from pruning.surgery import count_parameters, shrink


@dataclass(frozen=True)
class MergeReport:
    """What a merging did, by axis name; units by their indices before it.

    gone: units that left, in order; into: the unit that took each over (none for those that became a bias); errors: for
    each layer the sum of the estimated squared errors of its output, 0 where only duplicates went."""

    kind: str
    gone: dict[str, tuple[int, ...]]
    into: dict[str, tuple[int, ...]]
    errors: dict[str, float]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [f"{sum(map(len, self.gone.values()))} {self.kind}s merged"]
        lines += [f"  {name}: {len(units)}, error {self.errors[name]:.3g}" for name, units in self.gone.items()]
        return "\n".join([*lines, f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"])


@dataclass(frozen=True)
class Moments:
    """Of the values h that a gate module multiplies: Σ h hᵀ / n [U, U] and Σ h / n [U], float64."""

    products: Float[Tensor, "U U"]
    mean: Float[Tensor, "U"]


def merge_neurons(
    model: nn.Module,
    *,
    fraction: float,
    batches: Iterable[Batch] | None = None,
    incoming: Literal["kept", "average"] = "kept",
    axes: Sequence[Axis] | None = None,
    progress: Progress = None,
) -> MergeReport:
    """Merge ⌊fraction · neurons⌋ feed-forward neurons of each layer into others, in place; the model gets smaller.

    Neuron j goes into i by w_i ← w_i + a·w_j, w the outgoing weights, in the order of the least error, taken again
    after each merging:
    without batches a = 1 and the error is ‖in_i − in_j‖² · ‖w_j‖², in the incoming weights (Srinivas & Babu 2015,
    arXiv:1507.06149); incoming="average" then gives i the mean of the incoming weights of all that it stands for;
    with batches a = ⟨h_i, h_j⟩ / ⟨h_i, h_i⟩ and the error is min_a ‖h_j − a·h_i‖² · ‖w_j‖² / n over the n calibration
    tokens, h the neuron's values: multiples of one another merge too. Duplicates merge without error, and first.
    Optimisers hold the old parameters: make a new one.
    Raises: ValueError for a fraction outside [0, 1), incoming="average" with batches, and as `axes_of`."""
    if incoming not in ("kept", "average"):
        raise ValueError(f"incoming must be 'kept' or 'average', got {incoming!r}")
    if incoming == "average" and batches is not None:
        raise ValueError("incoming must be 'kept' where activations say what a neuron computes, got 'average'")
    chosen = axes_of(model, "neuron", axes)
    counts = {axis.name: removal_count(fraction, axis.size) for axis in chosen}
    moments = {} if batches is None else activation_moments(model, chosen, batches, progress=progress)
    before, pairs, errors = count_parameters(model)[0], {}, {}
    for axis in chosen:
        into, outgoing = _incoming(model, axis), _outgoing(model, axis)
        merging = _Merging(into, outgoing, moments.get(axis.name), averaging=incoming == "average")
        pairs[axis.name] = [merging.merge() for _ in range(counts[axis.name])]
        errors[axis.name] = merging.error
        _write(model, axis, merging)
    _leave(model, chosen, {name: [gone for gone, _ in made] for name, made in pairs.items()})
    return MergeReport(
        kind="neuron",
        gone={name: tuple(gone for gone, _ in made) for name, made in pairs.items()},
        into={name: tuple(kept for _, kept in made) for name, made in pairs.items()},
        errors=errors,
        parameters_before=before,
        parameters_after=count_parameters(model)[0],
    )


def fold_constant_neurons(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    fraction: float | None = None,
    tolerance: float | None = None,
    axes: Sequence[Axis] | None = None,
    progress: Progress = None,
) -> MergeReport:
    """Replace neurons whose value hardly changes by their mean, in place: bias ← bias + Σ_j mean(h_j)·w_j.

    The error of neuron j is var(h_j)·‖w_j‖² over the calibration tokens. fraction: the ⌊fraction · neurons⌋ of least
    error of each layer; or tolerance: all whose standard deviation is at most tolerance times the root mean square of
    the layer's values (0: the constant ones). A layer keeps at least one neuron.
    A second Linear without bias gets one: where the config can say so (`mlp_bias` of Llama; its other feed-forward
    biases are then 0), and in Mistral, Qwen2 and Qwen3, whose configs cannot: what they are saved as is for
    `load_pruned` alone, as a warning says, and stock transformers refuses it: their config keeps the number of neurons
    that it had, which the tensors do not.
    Raises: ValueError without exactly one of fraction and tolerance, and for a layer that has no bias and a config
    without place for one."""
    if (fraction is None) == (tolerance is None):
        raise ValueError(f"fraction or tolerance must be given, one of them, got {fraction} and {tolerance}")
    chosen = axes_of(model, "neuron", axes)
    counts = {axis.name: removal_count(fraction or 0.0, axis.size) for axis in chosen}
    bare = [axis.gate for axis in chosen if getattr(axis.gate_module(model), "bias", None) is None]
    _check_biases(model, bare)
    moments = activation_moments(model, chosen, batches, progress=progress)
    before, gone, errors = count_parameters(model)[0], {}, {}
    for axis in chosen:
        found = moments[axis.name]
        error = _variance(found) * _outgoing(model, axis).square().sum(1)
        many = _constant(found, tolerance) if tolerance is not None else counts[axis.name]
        order = (_variance(found) if tolerance is not None else error).argsort(stable=True)
        gone[axis.name] = sorted(order[: min(many, axis.size - 1)].tolist())
        errors[axis.name] = float(error[gone[axis.name]].sum())
    if bare and any(gone.values()):
        _give_biases(model, chosen)
        chosen = axes_of(model, "neuron")
    for axis in (axis for axis in chosen if gone[axis.name]):
        constant = moments[axis.name].mean[gone[axis.name]] @ _outgoing(model, axis)[gone[axis.name]]
        bias = model.get_parameter(f"{axis.gate}.bias").data
        bias += constant.to(bias)
    _leave(model, chosen, gone)
    units = {name: tuple(found) for name, found in gone.items()}
    return MergeReport("neuron", units, {}, errors, before, count_parameters(model)[0])


def activation_moments(
    model: nn.Module, axes: Sequence[Axis], batches: Iterable[Batch], *, progress: Progress = None
) -> dict[str, Moments]:
    """Axis name → moments of the inputs of its gate module over the tokens of `batches` that are not padding.

    Raises: ValueError without batches, if a module does not run, or for values that are not finite."""
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    with evaluating(model), torch.no_grad():
        for batch in row_batches(model, batches, progress=progress):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            with ExitStack() as hooks:
                for axis in axes:
                    hook = partial(_add, sums, axis.name, mask)
                    hooks.callback(axis.gate_module(model).register_forward_pre_hook(hook).remove)
                model(batch) if isinstance(batch, Tensor) else model(**batch)
    for axis in axes:
        if axis.name not in sums:
            raise ValueError(f"gate module {axis.gate!r} of axis {axis.name!r} did not run in the forward pass")
        if not sums[axis.name][0].isfinite().all():
            raise ValueError(f"inputs of {axis.gate!r} must be finite on the calibration batches")
    return {name: Moments(products / count, total / count) for name, (products, total, count) in sums.items()}


def _add(sums: dict[str, Any], name: str, mask: Tensor | None, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    x = arguments[0]
    if mask is not None and mask.shape == x.shape[:-1]:
        x = x[mask.bool()]
    rows = x.reshape(-1, x.shape[-1]).double().cpu()
    products, total, count = sums.get(name, (0.0, 0.0, 0))
    sums[name] = (products + rows.mT @ rows, total + rows.sum(0), count + len(rows))


class _Merging:
    """The state of a greedy merging: weights in and out of each neuron, and each one's nearest."""

    def __init__(self, into: Tensor, out: Tensor, moments: Moments | None, *, averaging: bool) -> None:
        self.into, self.out, self.averaging = into, out, averaging
        self.factor, self.distance = _by_weights(into) if moments is None else _by_activations(moments.products)
        self.alive, self.members = torch.ones(len(out), dtype=torch.bool), torch.ones(len(out), dtype=torch.float64)
        self.norms, self.error = out.square().sum(1), 0.0
        self.best, self.nearest = self.distance.min(0)

    def merge(self) -> tuple[int, int]:
        """Merge the cheapest pair; (the neuron that goes, the one that stays)."""
        costs = torch.where(self.alive, self.best * self.norms, torch.inf)
        gone = int(costs.argmin())
        kept = int(self.nearest[gone])
        self.error += float(costs[gone])
        self.out[kept] += self.factor[kept, gone] * self.out[gone]
        self.norms[kept] = self.out[kept].square().sum()
        self.alive[gone] = False
        self.distance[gone, :] = self.distance[:, gone] = torch.inf
        stale = self.nearest == gone
        if self.averaging:
            self._average(kept, gone)
            stale = torch.ones_like(stale)
        self.best[stale], self.nearest[stale] = self.distance[:, stale].min(0)
        return gone, kept

    def _average(self, kept: int, gone: int) -> None:
        many, more = self.members[kept], self.members[gone]
        self.into[kept] = (many * self.into[kept] + more * self.into[gone]) / (many + more)
        self.members[kept] = many + more
        row = (self.into - self.into[kept]).square().sum(1).masked_fill(~self.alive, torch.inf)
        row[kept] = torch.inf
        self.distance[kept, :] = self.distance[:, kept] = row


def _by_weights(into: Float[Tensor, "U I"]) -> tuple[Tensor, Tensor]:
    products = into @ into.mT
    squares = products.diagonal()
    distance = (squares[:, None] + squares[None, :] - 2 * products).clamp_min(0)
    return torch.ones(()).double().expand_as(distance), distance.fill_diagonal_(torch.inf)


def _by_activations(products: Float[Tensor, "U U"]) -> tuple[Tensor, Tensor]:
    own = products.diagonal()
    # a neuron that is always 0 stands for nothing: factor 0
    factor = torch.where(own[:, None] > 0, products / own[:, None].clamp_min(1e-300), 0.0)
    distance = (own[None, :] - factor * products).clamp_min(0)
    return factor, distance.fill_diagonal_(torch.inf)


def _variance(moments: Moments) -> Float[Tensor, "U"]:
    return (moments.products.diagonal() - moments.mean.square()).clamp_min(0)


def _constant(moments: Moments, tolerance: float) -> int:
    # rounding leaves some 1e-16 of the square where a value is constant
    square = moments.products.diagonal()
    floor = 1e-12 * square
    return int((_variance(moments) <= tolerance**2 * square.mean() + floor).sum())


def _is_outgoing(axis: Axis, piece: Slice) -> bool:
    return piece.parameter == f"{axis.gate}.weight"


def _units(model: nn.Module, axis: Axis, piece: Slice) -> Tensor:
    """The piece's weights with the units first, sharing memory."""
    tensor = model.get_parameter(piece.parameter).detach().movedim(piece.dim, 0)
    return tensor[piece.offset : piece.offset + axis.size * piece.width]


def _rows(model: nn.Module, axis: Axis, piece: Slice) -> Float[Tensor, "U I"]:
    return _units(model, axis, piece).reshape(axis.size, -1).double().cpu()


def _incoming(model: nn.Module, axis: Axis) -> Float[Tensor, "U I"]:
    return torch.cat([_rows(model, axis, piece) for piece in axis.slices if not _is_outgoing(axis, piece)], dim=1)


def _outgoing(model: nn.Module, axis: Axis) -> Float[Tensor, "U O"]:
    return torch.cat([_rows(model, axis, piece) for piece in axis.slices if _is_outgoing(axis, piece)], dim=1)


def _write(model: nn.Module, axis: Axis, merging: _Merging) -> None:
    """The merged weights into the model, where they changed."""
    start = 0
    for piece in axis.slices:
        place = _units(model, axis, piece)
        if _is_outgoing(axis, piece):
            place.copy_(merging.out.view(place.shape))
        elif merging.averaging:
            width = place[0].numel()
            place.copy_(merging.into[:, start : start + width].view(place.shape))
            start += width


def _leave(model: nn.Module, axes: Sequence[Axis], gone: Mapping[str, Sequence[int]]) -> None:
    kept = {axis.name: sorted(set(range(axis.size)) - set(gone[axis.name])) for axis in axes}
    shrink(model, axes, kept)


def _check_biases(model: nn.Module, bare: Sequence[str]) -> None:
    config = getattr(model, "config", None)
    if not bare or takes_biases(model):
        return
    if not (isinstance(model.get_submodule(bare[0]), nn.Linear) and hasattr(config, "mlp_bias")):
        raise ValueError(
            f"{bare[0]!r} has no bias to fold neurons into, and {type(config).__name__} has no place for one: use "
            "merge_neurons or prune_neurons; models with biases (GPT-2, OPT, BERT), configs with mlp_bias, Mistral, "
            "Qwen2 and Qwen3 can fold"
        )


def _give_biases(model: Any, axes: Sequence[Axis]) -> None:
    """Zero biases for every Linear of the feed-forwards, as mlp_bias says of all of them; without mlp_bias, for their
    outputs."""
    if not hasattr(model.config, "mlp_bias"):
        give_biases(model)
        return
    modules = {piece.parameter.rpartition(".")[0] for axis in axes for piece in axis.slices}
    for linear in (model.get_submodule(name) for name in sorted(modules)):
        give_bias(linear)
    model.config.mlp_bias = True
