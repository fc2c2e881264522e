"""Whole units that `prune` removes: a share of them, or as many as a budget asks for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pruning import (
    Axis,
    AxisScores,
    expert_importance,
    expert_neuron_importance,
    layer_importance,
    magnitude_importance,
    prunable_axes,
    prune_expert_neurons,
    prune_experts,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_to_budget,
    prune_width,
    shrink,
)
from pruning.batches import Loss
from training.prune_arguments import UNITS, PruneArguments
from training.prune_importance import scores_of
from training.prune_models import UNIT
from training.prune_progress import Passes

BY_DEFAULT = ("experts", "heads", "neurons")  # what a budget takes where nothing else is said
REMOVE = {"layers": prune_layers, "experts": prune_experts, "expert_neurons": prune_expert_neurons,
          "heads": prune_heads, "neurons": prune_neurons, "width": prune_width}  # fmt: skip
Record = dict[str, Any]


@dataclass(frozen=True)
class Scoring:
    """What units are scored by. loss: None is the next-token loss."""

    arguments: PruneArguments
    batches: Sequence[Tensor]
    loss: Loss | None
    passes: Passes

    def of(self, model: nn.Module, kind: str) -> AxisScores:
        """Heads and neurons by --importance, experts and neurons inside them by what they add (REAP), layers by how far
        they turn the stream (ShortGPT), width by magnitude."""
        axes, progress = axes_of_kind(model, kind), self.passes.over(f"importance of {kind.replace('_', ' ')}")
        if kind == "layers":
            return layer_importance(model, self.batches, progress=progress)
        if kind == "experts":
            return expert_importance(model, self.batches, progress=progress)
        if kind == "expert_neurons":
            return expert_neuron_importance(model, self.batches, progress=progress)
        if kind == "width":
            return magnitude_importance(model, axes)
        asked = self.arguments
        return scores_of(asked.importance, kind, model, axes, self.batches, loss=self.loss, normalize=asked.normalize,
                         seed=asked.seed, progress=progress)  # fmt: skip


def axes_of_kind(model: nn.Module, kind: str) -> list[Axis]:
    """The model's axes of "heads", "neurons", ..."""
    return [axis for axis in prunable_axes(model) if axis.kind == UNIT[kind]]


def remove_units(model: nn.Module, kind: str, fraction: float, scoring: Scoring) -> tuple[Record, str]:
    """⌊fraction · units⌋ of a kind go, the least important first; the record of it, and the words."""
    layerwise = {} if kind in ("layers", "width") else {"layerwise": scoring.arguments.layerwise}
    report = REMOVE[kind](model, scoring.of(model, kind), fraction=fraction, **layerwise)
    return asdict(report), str(report)


def remove_again(model: nn.Module, units: Sequence[Record]) -> None:
    """What an earlier run decided, done to the same model: whole layers last, for they renumber the others."""
    kept = {axis: list(ids) for one in units for axis, ids in one["kept"].items()}
    axes = sorted((axis for axis in prunable_axes(model) if axis.name in kept), key=lambda axis: axis.kind == "layer")
    shrink(model, axes, kept)


def budget_kinds(model: nn.Module, arguments: PruneArguments) -> list[str]:
    """The kinds of --budget-units, or all of BY_DEFAULT that the model has, in the order of UNITS."""
    named = arguments.budget_kinds
    if named:
        return [kind for kind in UNITS if kind in named]
    held = {axis.kind for axis in prunable_axes(model)}
    return [kind for kind in UNITS if kind in BY_DEFAULT and UNIT[kind] in held]


def remove_to_budget(
    model: nn.Module, scoring: Scoring, *, length: int, run: Callable[[nn.Module], object]
) -> tuple[Record, str]:
    """The fewest units go that meet --budget, an equal share of every kind (`prune_to_budget`); the record of it, and
    the words. length: tokens of a sequence, for FLOPs; run: what latency is measured on."""
    name, share = scoring.arguments.parsed_budget
    kinds = budget_kinds(model, scoring.arguments)
    scores = {UNIT[kind]: scoring.of(model, kind) for kind in kinds}
    sizes = {UNIT[kind]: {axis.name: axis.size for axis in axes_of_kind(model, kind)} for kind in kinds}
    report = prune_to_budget(model, scores, **{name: share}, length=length, run=run)  # type: ignore[arg-type]
    units = [_unit_record(kind, held, report.kept, report.removed[kind], report.total[kind])
             for kind, held in sizes.items()]  # fmt: skip
    told = asdict(report)
    quartiles = None if report.quartiles is None else list(report.quartiles)
    return {"units": units, "quartiles": quartiles,
            **{key: told[key] for key in ("budget", "asked", "achieved", "parameters_before", "parameters_after",
                                          "steps")}}, str(report)  # fmt: skip


def _unit_record(
    kind: str, sizes: Mapping[str, int], kept: Mapping[str, tuple[int, ...]], removed: int, total: int
) -> Record:
    gone = {name: sorted(set(range(size)) - set(kept[name])) for name, size in sizes.items()}
    return {"kind": kind, "achieved": removed / total, "kept": {name: list(kept[name]) for name in sizes},
            "removed": gone}  # fmt: skip
