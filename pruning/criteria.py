"""Saliencies, allocations and structures by name, and which of them go together."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, nn

from pruning.allocation import Allocation, equal_loss, erk, global_ranking, lamp_ranking, loss_curves, owl, uniform
from pruning.batches import Batch, Loss, Progress
from pruning.mask_selection import select_masks
from pruning.masking import Masks
from pruning.saliency.correlation import correlation_scores
from pruning.saliency.data_free import lamp, magnitude, random_scores
from pruning.saliency.first_order import gradient_scores, snip_scores, taylor_scores
from pruning.saliency.grasp import grasp_scores
from pruning.saliency.outliers import outlier_shares
from pruning.saliency.rounds import Select
from pruning.saliency.second_order import hessian_diagonal, obd
from pruning.saliency.synflow import synflow_scores
from pruning.saliency.wanda import dense_wanda_scores
from pruning.saliency.woodfisher import inverse_fisher, woodfisher_scores, woodfisher_update
from pruning.structure import Structure, named_structure, parse_structure, unstructured, within_rows
from pruning.weights import stored_turned

LEVELS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Request:
    """What a criterion may look at. select: how weights will be chosen from the scores, for those that go in rounds."""

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    sparsity: float
    select: Select
    rounds: int
    calibration: Sequence[Batch]
    loss: Loss | None
    generator: torch.Generator | None
    progress: Progress


@dataclass(frozen=True)
class Scored:
    """Scores by parameter name, and what makes up for the removal once the masks are chosen (None: nothing)."""

    scores: dict[str, Tensor]
    repair: Callable[[Masks], None] | None = None


@dataclass(frozen=True)
class Criterion:
    """A saliency by name.

    data: it needs calibration. loss: it takes one. allocation: the one that its paper uses. rounds: how many it takes
    by default; 0 for one that has none. signed: scores may be negative. among: which weights compete where no other
    structure is asked for."""

    score: Callable[[Request], Scored]
    data: bool = False
    loss: bool = False
    allocation: str = "uniform"
    rounds: int = 0
    signed: bool = False
    among: Structure = unstructured


def _each(saliency: Callable[[Tensor], Tensor]) -> Callable[[Request], Scored]:
    return lambda ask: Scored({name: saliency(weight) for name, weight in ask.weights.items()})


def _random(ask: Request) -> Scored:
    return Scored({name: random_scores(weight, generator=ask.generator) for name, weight in ask.weights.items()})


def _by_gradient(scores: Callable[..., dict[str, Tensor]]) -> Callable[[Request], Scored]:
    return lambda ask: Scored(scores(ask.model, ask.weights, ask.calibration, loss=ask.loss, progress=ask.progress))


def _snip(ask: Request) -> Scored:
    return Scored(snip_scores(ask.model, ask.weights, ask.calibration, sparsity=ask.sparsity, rounds=ask.rounds,
                              select=ask.select, loss=ask.loss, progress=ask.progress))  # fmt: skip


def _synflow(ask: Request) -> Scored:
    return Scored(synflow_scores(ask.model, ask.weights, sparsity=ask.sparsity, rounds=ask.rounds, select=ask.select,
                                 progress=ask.progress))  # fmt: skip


def _correlation(ask: Request) -> Scored:
    return Scored(correlation_scores(ask.model, ask.weights, ask.calibration, progress=ask.progress))


def _obd(ask: Request) -> Scored:
    estimator = "fisher" if ask.loss is None else "empirical_fisher"
    curvature = hessian_diagonal(ask.model, ask.weights, ask.calibration, estimator=estimator, loss=ask.loss,
                                 generator=ask.generator, progress=ask.progress)  # fmt: skip
    return Scored({name: obd(weight, curvature[name]) for name, weight in ask.weights.items()})


def _woodfisher(ask: Request) -> Scored:
    inverse = inverse_fisher(ask.model, ask.weights, ask.calibration, loss=ask.loss, progress=ask.progress)

    @torch.no_grad()
    def repair(masks: Masks) -> None:
        for name, weight in ask.weights.items():
            weight.copy_(woodfisher_update(weight, masks.kept[name], inverse[name]))

    return Scored(woodfisher_scores(ask.weights, inverse), repair)


def _wanda(ask: Request) -> Scored:
    return Scored(dense_wanda_scores(ask.model, ask.weights, ask.calibration, progress=ask.progress))


CRITERIA = {
    "correlation": Criterion(_correlation, data=True),
    "gradient": Criterion(_by_gradient(gradient_scores), data=True, loss=True),
    "grasp": Criterion(_by_gradient(grasp_scores), data=True, loss=True, allocation="global", signed=True),
    "lamp": Criterion(_each(lamp), allocation="global"),
    "magnitude": Criterion(_each(magnitude)),
    "obd": Criterion(_obd, data=True, loss=True),
    "random": Criterion(_random),
    "snip": Criterion(_snip, data=True, loss=True, allocation="global", rounds=10),
    "synflow": Criterion(_synflow, allocation="global", rounds=100),
    "taylor": Criterion(_by_gradient(taylor_scores), data=True, loss=True),
    "wanda": Criterion(_wanda, data=True, among=within_rows),
    "woodfisher": Criterion(_woodfisher, data=True, loss=True),
}
# these choose masks while they change weights, block by block: pruning.calibrated
CALIBRATED = ("admm", "descent", "exact_obs", "obs", "sparsegpt", "wanda")
METHODS = tuple(sorted({*CRITERIA, *CALIBRATED}))
BY_FORMULA: dict[str, Allocation] = {
    "erk": erk, "global": global_ranking, "lamp": lamp_ranking, "uniform": uniform
}  # fmt: skip
ALLOCATIONS = tuple(sorted((*BY_FORMULA, "loss", "owl", "sensitivity")))


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises: ValueError for a name that is not known, with the nearest that is."""
    every = list(known)
    if name not in every:
        near = get_close_matches(name, every, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(every)}, got {name!r}{hint}")


def needs(what: str, calibration: Iterable[Batch] | None) -> list[Batch]:
    """The calibration batches. Raises: ValueError if there are none."""
    if calibration is None:
        raise ValueError(f"{what} needs calibration batches, got None")
    if isinstance(calibration, Tensor | Mapping):
        raise ValueError(f"batches must be an iterable of batches, got one {type(calibration).__name__}; pass [batch]")
    return list(calibration)


def resolve_structure(text: str | None, sparsity: float | None) -> tuple[float, Structure]:
    """The sparsity that is meant, and the structure.

    Raises: ValueError for an unknown text, no sparsity, and one at odds with 'n:m'."""
    if text is None or ":" not in text:
        structure = unstructured if text is None else named_structure(text)
        if sparsity is None:
            raise ValueError("sparsity must be in [0, 1), got None; only structure='n:m' implies one")
        return sparsity, structure
    n, m = parse_structure(text)
    structure = named_structure(text)
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
        raise ValueError(f"structure={text!r} means sparsity={1 - n / m:g}, got {sparsity}")
    return (m - n) / m, structure


def check_pair(
    method: str, allocation: str | Allocation, structure: str | None, rounds: int | None, loss: Loss | None
) -> None:
    """Raises: ValueError naming two choices that do not go together."""
    groups = structure is not None and ":" in structure
    if groups and allocation not in ("uniform", uniform):
        raise ValueError(f"structure={structure!r} fixes every matrix's sparsity: allocation must be 'uniform', "
                         f"got {allocation!r}")  # fmt: skip
    if groups and rounds not in (None, 1):
        raise ValueError(f"structure={structure!r} has no sparsity in between: rounds must be 1, got {rounds}")
    if method == "lamp" and (allocation is uniform or (isinstance(allocation, str) and allocation != "global")):
        raise ValueError(f"method='lamp' orders each matrix as 'magnitude' does and compares matrices: allocation must "
                         f"be 'global', got {allocation!r}")  # fmt: skip
    if rounds is not None and not CRITERIA[method].rounds:
        taking = ", ".join(name for name, criterion in CRITERIA.items() if criterion.rounds)
        raise ValueError(f"method={method!r} scores once: rounds must be None, got {rounds}; {taking} take rounds")
    if loss is not None and not CRITERIA[method].loss and allocation != "sensitivity":
        raise ValueError(f"method={method!r} with allocation={allocation!r} takes no loss: loss must be None")
    if allocation == "lamp" and CRITERIA[method].signed:
        raise ValueError(f"allocation='lamp' squares scores, and those of method={method!r} have a sign")


def default_allocation(method: str, allocation: str | Allocation | None, structure: str | None) -> str | Allocation:
    """The allocation as given, else that of the method's paper, else 'uniform' under 'n:m'.

    Raises: ValueError for an unknown name."""
    if allocation is None:
        grouped = structure is not None and ":" in structure and method != "lamp"
        return "uniform" if grouped or method not in CRITERIA else CRITERIA[method].allocation
    if isinstance(allocation, str):
        check_name("allocation", allocation, ALLOCATIONS)
    return allocation


def make_allocation(
    name: str | Allocation,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    calibration: Iterable[Batch] | None,
    loss: Loss | None,
) -> Allocation:
    """The allocation of this name. "owl" and "sensitivity" look at calibration data: `outlier_shares`, and
    `loss_curves` of magnitude pruning at LEVELS. Raises: ValueError if they get none."""
    if not isinstance(name, str):
        return name
    if name in BY_FORMULA:
        return BY_FORMULA[name]
    if name == "loss":
        raise ValueError(f"allocation='loss' goes with the methods {', '.join(CALIBRATED)}")
    batches = needs(f"allocation={name!r}", calibration)
    if name == "owl":
        return owl(outlier_shares(model, weights, batches))
    scores = {key: magnitude(weight) for key, weight in weights.items()}
    return equal_loss(loss_curves(model, scores, batches, sparsities=LEVELS, loss=loss), LEVELS)


def score_weights(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    *,
    method: str,
    sparsity: float,
    allocation: Allocation,
    structure: Structure,
    rounds: int | None,
    calibration: Iterable[Batch] | None,
    loss: Loss | None,
    generator: torch.Generator | None,
    progress: Progress,
) -> Scored:
    """The scores of a method by name. Raises: ValueError if it needs data without data."""
    criterion = CRITERIA[method]
    batches = needs(f"method={method!r}", calibration) if criterion.data else []
    select = partial(_select, allocation, structure, stored_turned(model))
    ask = Request(model, weights, sparsity, select, rounds or criterion.rounds, batches, loss, generator, progress)
    return criterion.score(ask)


def _select(
    allocation: Allocation, structure: Structure, turned: Collection[str], scores: Mapping[str, Tensor], sparsity: float
) -> Masks:
    return select_masks(scores, sparsity=sparsity, allocation=allocation, structure=structure, turned=turned)
