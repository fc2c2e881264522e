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
from pruning.batches import Loss, Progress, evaluating, model_batches, scalar_loss
from pruning.learned import L0Units
from pruning.saliency.activations import Response, Statistic
from pruning.saliency.record import record

PASSES, GATE_RATE = 8, 0.1  # of hard-concrete gates
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
    # heads with nothing to do rest on the first token
    return attention_confidence(ask.model, ask.batches, axes=ask.axes, skip_first=1, normalize=ask.normalize,
                                progress=ask.progress)  # fmt: skip


def _leave_one_out(ask: Ask) -> AxisScores:
    return leave_one_out(ask.model, ask.batches, axes=ask.axes, loss=ask.loss, normalize=ask.normalize,
                         progress=ask.progress)  # fmt: skip


def _magnitude(ask: Ask) -> AxisScores:
    return magnitude_importance(ask.model, ask.axes, normalize=ask.normalize)


def _random(ask: Ask) -> AxisScores:
    return random_importance(ask.axes, generator=torch.Generator().manual_seed(ask.seed))


def _hard_concrete(ask: Ask) -> AxisScores:
    """log α of a hard-concrete gate on each unit (Voita et al. 2019, arXiv:1905.09418), after PASSES over the text in
    which the gates alone learn, from the loss and from a nat for keeping all of them."""
    plain = ask.model
    with evaluating(plain, frozen=False):
        method = L0Units(plain, kinds=(ask.axes[0].kind,), axes=ask.axes,
                         generator=torch.Generator().manual_seed(ask.seed))  # fmt: skip
        matrices = {id(plain.get_parameter(name)) for name in method.groups}
        for parameter in plain.parameters():
            parameter.requires_grad_(id(parameter) in matrices)
        # of the model itself alone: its gates draw noise, and no dropout does
        plain.training = True
        _learn_gates(ask, method)
    gates = method.named_gates()
    values = {group.name: gates[name].detach() for name, group in method.groups.items()}
    samples = sum(map(len, ask.batches))
    return record(ask.axes, values, method="hard-concrete gate", samples=samples, normalize=ask.normalize)


def _learn_gates(ask: Ask, method: L0Units) -> None:
    optimizer = torch.optim.Adam(method.named_gates().values(), lr=GATE_RATE)
    batches = list(model_batches(ask.model, list(ask.batches) * PASSES))
    for batch in ask.progress(batches) if ask.progress else batches:
        with method.parametrise():
            (scalar_loss(ask.model, batch, ask.loss) / len(batch)).backward()
        method.before_step(optimizer)
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        for name in method.groups:
            ask.model.get_parameter(name).grad = None


IMPORTANCES: dict[str, Importance] = {
    "gradient": Importance(_gradient, by_layer=("heads",)),
    "taylor": Importance(partial(_response, response="taylor")),
    "sensitivity": Importance(partial(_response, response="sensitivity")),
    "leave-one-out": Importance(_leave_one_out),
    "confidence": Importance(_confidence, kinds=("heads",)),
    "hard-concrete": Importance(_hard_concrete),
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
