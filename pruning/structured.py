"""Heads and neurons removed for good: scores → choice → surgery → report."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pruning.axes import Axis
from pruning.model_axes import axes_of
from pruning.saliency.data_free import magnitude_importance
from pruning.selection import select_alike, select_units
from pruning.structure import removal_count
from pruning.surgery import count_parameters, predict_parameters, shrink


@dataclass(frozen=True)
class PruneReport:
    """What a structured removal did. kept and removed: axis name → units, by their indices before the removal.

    asked and achieved are shares of the units; `parameters_predicted` and `bytes_predicted` were computed from the axes
    before surgery, `parameters_after` and `bytes_after` counted after it (tied tensors once; bytes of tensor data)."""

    kind: str
    asked: float
    achieved: float
    kept: dict[str, tuple[int, ...]]
    removed: dict[str, tuple[int, ...]]
    parameters_before: int
    parameters_predicted: int
    parameters_after: int
    bytes_before: int
    bytes_predicted: int
    bytes_after: int

    def __str__(self) -> str:
        gone, total = sum(map(len, self.removed.values())), sum(map(len, self.kept.values()))
        units = "channels" if self.kind == "width" else f"{self.kind.replace('_', ' ')}s"
        lines = [f"removed {gone} of {gone + total} {units} ({self.achieved:.1%}; asked {self.asked:.1%})"]
        for name, left in self.removed.items():
            if left:
                lines.append(f"  {name}: {len(left) + len(self.kept[name])} -> {len(self.kept[name])}{_listed(left)}")
        lines.append(
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,} "
            f"({self.parameters_after / self.parameters_before - 1:+.1%}), "
            f"{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB"
        )
        return "\n".join(lines)


def _listed(units: Sequence[int]) -> str:
    return f", without {', '.join(map(str, units))}" if len(units) <= 16 else ""


def prune_heads(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    fraction: float,
    layerwise: bool = False,
    min_heads: int = 0,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · heads⌋ attention heads from `model`, in place, lowest scores first; the model gets smaller.

    The count is taken over all layers together, or over each layer if `layerwise`; each layer keeps at least
    min(min_heads, its heads), and with 0 a layer may lose all. Of equal scores the earlier head goes first. Under
    grouped queries a layer loses whole key-value groups, or every surviving group the same number of heads: the choice
    is the exact optimum, least total score at the largest feasible count that does not exceed the one asked
    (`selection.select_units`); the report says what was asked and what was achieved. With `layerwise`, layers that were
    alike end alike, with equally many groups of equally many heads, so that stock transformers can load the model.
    Optimisers hold the old parameters: make a new one.

    >>> print(prune_heads(model, head_importance(model, batches), fraction=0.3))
    Raises: ValueError if fraction is outside [0, 1), or scores do not fit the model's heads."""
    return _prune(model, "head", scores, axes_of(model, "head", axes), fraction, layerwise, min_heads)


def prune_neurons(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    fraction: float,
    layerwise: bool = False,
    min_neurons: int = 1,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · neurons⌋ feed-forward neurons from `model`, in place, as `prune_heads` does with heads.

    scores: None ranks by magnitude (‖weights of the neuron‖₂); `neuron_importance` ranks by gate gradients.
    Raises: as `prune_heads`."""
    chosen = axes_of(model, "neuron", axes)
    scores = magnitude_importance(model, chosen) if scores is None else scores
    return _prune(model, "neuron", scores, chosen, fraction, layerwise, min_neurons)


def prune_experts(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    fraction: float,
    layerwise: bool = False,
    min_experts: int = 1,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · experts⌋ experts of the model's mixture layers, in place, as `prune_heads` does with heads.

    Their rows leave the router too, so that its softmax is over the experts that stay; each layer keeps at least the k
    that a token needs, and layers may end unequal. `expert_importance` makes the scores.

    >>> print(prune_experts(model, expert_importance(model, batches), fraction=0.25))
    Raises: as `prune_heads`."""
    return _prune(model, "expert", scores, axes_of(model, "expert", axes), fraction, layerwise, min_experts)


def prune_expert_neurons(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    fraction: float,
    layerwise: bool = False,
    min_neurons: int = 1,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · neurons⌋ neurons inside the experts of `model`, in place, so that its stacks get narrower.

    Each expert loses its own least important neurons, and all experts of a layer equally many: E neurons are a step,
    and where grouped products ask for rows of 16 bytes, a multiple of it (`Axis.multiple`). Layers go by the mean score
    of the next step. The shared expert of this library's layers counts as a stack of one.
    scores: [E·F] by axis, expert by expert, as `expert_neuron_importance`, `gate_importance` and
    `magnitude_importance` make them; None ranks by magnitude. Units of the report are e·F + f, neuron f of expert e.
    min_neurons: that each expert keeps, 1 at least.

    >>> print(prune_expert_neurons(model, expert_neuron_importance(model, batches), fraction=0.25))
    Raises: as `prune_heads`."""
    chosen = axes_of(model, "expert_neuron", axes)
    scores = magnitude_importance(model, chosen) if scores is None else scores
    return _prune(model, "expert_neuron", scores, chosen, fraction, layerwise, min_neurons)


def prune_layers(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    fraction: float,
    min_layers: int = 1,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · layers⌋ whole layers of `model`, in place, lowest scores first; at least one stays.

    `layer_importance` makes the scores. Caches and optimisers belong to the old layers: make new ones.

    >>> print(prune_layers(model, layer_importance(model, batches), fraction=0.25))
    Raises: as `prune_heads`."""
    return _prune(model, "layer", scores, axes_of(model, "layer", axes), fraction, False, min_layers)


def prune_width(
    model: nn.Module,
    scores: Mapping[str, Tensor] | None = None,
    *,
    fraction: float,
    multiple: int = 8,
    min_width: int = 1,
    axes: Sequence[Axis] | None = None,
) -> PruneReport:
    """Remove ⌊fraction · D⌋ channels of the residual stream from the whole model, in place, lowest scores first.

    A channel goes from every tensor that lies along the stream: embeddings, norms, what reads it, what writes to it,
    and the head. Heads keep their number and size, for the width is independent of them; so does rotary embedding.
    scores: one for each channel; None ranks by magnitude (‖all weights of the channel‖₂).
    multiple: the width that stays is one of it, and so fewer channels may go than asked; matrix kernels like rows of 16
    bytes, and transformers' grouped products over stacked experts demand them (`Axis.multiple`). Stock transformers
    loads a Llama only if its number of heads divides the width, and a GPT-2, OPT or BERT if the width is its heads
    times their size.

    The result equals the model in which the channels that go are zero wherever the stream is written (embedding rows,
    output columns, and what a LayerNorm puts out), and in which every norm over the stream takes its mean over the D'
    channels that stay: y_i = w_i · x_i / √(Σ_{j kept} x_j² / D' + ε); of a LayerNorm the mean and the variance. Zeros
    alone would not do it: the model's own norms divide by D, so that their outputs would be √(D / D') larger. BERT's
    pooler and the transform before its vocabulary map the stream to a vector as wide, and lose the same channels of it.

    >>> print(prune_width(model, fraction=0.1))
    Raises: as `prune_heads`; ValueError if multiple is below 1, or leaves a width that the model's experts refuse."""
    if multiple < 1:
        raise ValueError(f"multiple must be >= 1, got {multiple}")
    chosen = axes_of(model, "width", axes)
    scores = magnitude_importance(model, chosen) if scores is None else scores
    return _prune(model, "width", scores, chosen, fraction, False, min_width, multiple)


def _prune(
    model: nn.Module,
    kind: str,
    scores: Mapping[str, Tensor],
    axes: Sequence[Axis],
    fraction: float,
    layerwise: bool,
    least: int,
    multiple: int = 1,
) -> PruneReport:
    if layerwise:
        kept = _alike(scores, axes, fraction, least)
    else:
        size = sum(axis.size for axis in axes)
        left = -(-(size - removal_count(fraction, size)) // multiple) * multiple
        kept = select_units(scores, axes, count=max(0, size - left), min_units=least)
        if size > left and all(axis.stacked and len(kept[axis.name]) == axis.size for axis in axes):
            _warn_whole(scores, axes, size - left, least)
    before, predicted = count_parameters(model), predict_parameters(model, axes, kept)
    shrink(model, axes, kept)
    after = count_parameters(model)
    gone = {axis.name: tuple(sorted(set(range(axis.size)) - set(kept[axis.name]))) for axis in axes}
    total = sum(axis.size for axis in axes)
    return PruneReport(
        kind=kind,
        asked=fraction,
        achieved=sum(map(len, gone.values())) / total,
        kept={name: tuple(units) for name, units in kept.items()},
        removed=gone,
        parameters_before=before[0],
        parameters_predicted=predicted[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_predicted=predicted[1],
        bytes_after=after[1],
    )


def _alike(scores: Mapping[str, Tensor], axes: Sequence[Axis], fraction: float, least: int) -> dict[str, list[int]]:
    """The same share of each axis; axes of the same shape end with the same shape. Warns where none of it can go."""
    kept: dict[str, list[int]] = {}
    for shape in dict.fromkeys((axis.size, axis.groups) for axis in axes):
        part = [axis for axis in axes if (axis.size, axis.groups) == shape]
        count = removal_count(fraction, shape[0])
        found = select_alike(scores, part, count=count, min_units=least)
        if count and all(len(found[axis.name]) == axis.size for axis in part):
            _warn_whole(scores, part, count, least)
        kept |= found
    return kept


def _steps(axis: Axis, count: int) -> range:
    """Numbers of units above `count` that might go; of a stacked axis the least that can."""
    if axis.stacked:
        step = axis.groups * (axis.group_size % axis.multiple or axis.multiple)
        return range(step, min(step, axis.size - axis.groups) + 1)
    return range(count + 1, axis.size + 1)


def _warn_whole(scores: Mapping[str, Tensor], axes: Sequence[Axis], count: int, least: int) -> None:
    """That nothing goes of these axes, though `count` units of each were asked for, and how many could go at least."""
    axis = axes[0]
    for more in _steps(axis, count):
        left = len(select_alike(scores, axes, count=more, min_units=least)[axis.name])
        if left < axis.size:
            way = f"the least that can go is {more} of {axis.size}, fraction={more / axis.size:.4f}"
            break
    else:
        way = f"none of its {axis.size} can go"
    warnings.warn(
        f"nothing was removed from {axis.name!r} and {len(axes) - 1} axes like it, of each of which {count} "
        f"{axis.kind.replace('_', ' ')}s were asked: {axis.groups} groups must stay alike, and {way}", stacklevel=4,
    )  # fmt: skip
