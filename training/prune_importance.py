"""The importances of heads and neurons that `prune` knows by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pruning import (
    Axis,
    AxisScores,
    activation_importance,
    attention_confidence,
    gate_importance,
    leave_one_out,
    magnitude_importance,
    random_importance,
    response_importance,
)
from pruning.batches import Loss, Progress
from pruning.saliency.activations import Response, Statistic

NORMALIZE: Mapping[str, str | None] = {"layer": "l2", "none": None}


@dataclass(frozen=True)
class Ask:
    """What an importance may look at. normalize: "l2" by layer or None; seed: of chance."""

    model: nn.Module
    axes: Sequence[Axis]
    batches: Sequence[Tensor]
    loss: Loss | None
    normalize: str | None
    seed: int
    progress: Progress


@dataclass(frozen=True)
class Importance:
    """score: of every unit, larger = more important; text: whether it looks at calibration text; kinds: of units that
    it can rank; by_layer: of those, the kinds that its paper compares after normalising each layer."""

    score: Callable[[Ask], AxisScores]
    text: bool = True
    kinds: tuple[str, ...] = ("heads", "neurons")
    by_layer: tuple[str, ...] = ()


def _gradient(ask: Ask) -> AxisScores:
    return gate_importance(ask.model, ask.batches, axes=ask.axes, loss=ask.loss, normalize=ask.normalize,
                           progress=ask.progress)  # fmt: skip


def _response(ask: Ask, response: Response) -> AxisScores:
    return response_importance(ask.model, ask.batches, axes=ask.axes, response=response, loss=ask.loss,
                               normalize=ask.normalize, progress=ask.progress)  # fmt: skip


def _statistic(ask: Ask, statistic: Statistic) -> AxisScores:
    return activation_importance(ask.model, ask.batches, axes=ask.axes, statistic=statistic, normalize=ask.normalize,
                                 progress=ask.progress)  # fmt: skip


def _confidence(ask: Ask) -> AxisScores:
    return attention_confidence(ask.model, ask.batches, axes=ask.axes, normalize=ask.normalize, progress=ask.progress)


def _leave_one_out(ask: Ask) -> AxisScores:
    return leave_one_out(ask.model, ask.batches, axes=ask.axes, loss=ask.loss, normalize=ask.normalize,
                         progress=ask.progress)  # fmt: skip


def _magnitude(ask: Ask) -> AxisScores:
    return magnitude_importance(ask.model, ask.axes, normalize=ask.normalize)


def _random(ask: Ask) -> AxisScores:
    return random_importance(ask.axes, generator=torch.Generator().manual_seed(ask.seed))


IMPORTANCES: dict[str, Importance] = {
    "gradient": Importance(_gradient, by_layer=("heads",)),
    "taylor": Importance(partial(_response, response="taylor")),
    "sensitivity": Importance(partial(_response, response="sensitivity")),
    "leave-one-out": Importance(_leave_one_out),
    "confidence": Importance(_confidence, kinds=("heads",)),
    "energy": Importance(partial(_statistic, statistic="energy")),
    "variance": Importance(partial(_statistic, statistic="variance")),
    "active": Importance(partial(_statistic, statistic="active")),
    "firing": Importance(partial(_statistic, statistic="firing")),
    "magnitude": Importance(_magnitude, text=False),
    "random": Importance(_random, text=False),
}


def scores_of(
    name: str,
    kind: str,
    model: nn.Module,
    axes: Sequence[Axis],
    batches: Sequence[Tensor],
    *,
    loss: Loss | None,
    normalize: str | None,
    seed: int,
    progress: Progress,
) -> AxisScores:
    """The importance `name` of units of a kind ("heads" or "neurons"). loss: None is the next-token loss. normalize:
    "layer" divides each layer's scores by their Euclidean norm, "none" does not, None is as its paper has it: by layer
    for the gradient of head gates alone."""
    chosen = IMPORTANCES[name]
    how = ("layer" if kind in chosen.by_layer else "none") if normalize is None else normalize
    return chosen.score(Ask(model, axes, batches, loss, NORMALIZE[how], seed, progress))
