"""What a cell's training and its model cost, were zeros free: :func:`pruning.diagnostics.run_cost`."""

from collections.abc import Callable
from dataclasses import replace

from pruning.diagnostics import (
    Densities,
    dense_run,
    feedback_run,
    gradual_run,
    momentum_run,
    recorded_run,
    rigl_run,
    run_cost,
    static_run,
    top_kast_run,
)
from pruning.dynamic import NeST, RobustRewiring
from pruning.learned.base import LearnedSparsity
from pruning.learned.chosen import ChosenMasks
from pruning.prescribed import Prescribed
from pruning.retraining import EarlyBirdPruning, GeneralizationDriven, Rewinding
from pruning.retraining.phases import Phases
from pruning.schedules import one_shot
from training.config import RunConfig
from training.fisher_control import Penalised
from training.moments import Masked, Sparsifier
from training.records import Line
from training.sparsity import last_update, pruning_schedule
from training.study.search_cost import NOT_INCLUDED, fisher_passes, found_at_start, found_elsewhere
from training.trainer import Outcome

STATIC = ("static", "set", "dsr", "deep_r", "preferential", "robust_rewiring")


def sparse_cost(config: RunConfig, outcome: Outcome, facts: Line) -> Line:
    """``{"cost": …}``: training FLOPs, those of a dense run of as many steps, energy proxy in joules, forward FLOPs a
    token of the model that it ends with, its sparsity, and the step at which an early bird pruned and whether
    the deadline made it.

    The passes that find a mask are counted (``search_flops``, where that is before the first step), those of Fisher
    traces, and those that look for an attack. A mask that another run gave costs what that run's record says; where
    there is none ``search_flops`` is None and ``search`` says that it is not included. A weight of an expert counts for
    the tokens that use it. What a method that settles its masks at the end trains is counted as dense. NeST, and what
    follows the held-out loss, are counted by their own records of when they grew and pruned.
    """
    densities = run_densities(config, outcome)
    if densities is None:
        return {}
    method = _method(outcome)
    masks = method.masks() if isinstance(method, Masked) else None
    zeros = 0.0 if masks is None else sum(
        2 * int((~kept).sum()) * facts["shares"].get(name, 1.0) for name, kept in masks.kept.items()
    )  # fmt: skip
    sparsity, prunable = 0.0 if masks is None else masks.sparsity, facts["prunable_weights"]
    weight = 1.0 if not sparsity else zeros / (sparsity * facts["prunable_flops"])
    cost = run_cost(
        in_flops(densities, weight),
        steps=config.train.steps,
        tokens=config.train.batch * config.data.length,
        prunable_flops=facts["prunable_flops"],
        other_flops=facts["flops_per_token"] - facts["prunable_flops"],
        prunable_weights=prunable,
        other_weights=facts["parameters"] - prunable,
        attack_steps=method.attack.steps if isinstance(method, RobustRewiring) and method.attack is not None else 0,
        extra_flops=bridging(method) if isinstance(method, NeST) else lambda step: 0.0,
        passes=fisher_passes(config),
    )
    search = _search(config, facts, weight)
    found = {"found": method.found, "forced": method.forced} if isinstance(method, EarlyBirdPruning) else {}
    return {
        "cost": {
            "training_flops": cost.flops + (search.get("search_flops") or 0.0),
            "dense_flops": cost.dense_flops,
            "energy": cost.energy + search.pop("energy", 0.0),
            "inference_flops": facts["flops_per_token"] - zeros,
            "sparsity": sparsity,
            **found,
            **search,
        }
    }


def _method(outcome: Outcome) -> Sparsifier | None:
    """The method that prunes: a Fisher penalty beside it, or alone, is none."""
    return next((method for method in outcome.sparsifiers if not isinstance(method, Penalised)), None)


def _search(config: RunConfig, facts: Line, weight: float) -> Line:
    """``search_flops`` and their ``energy``; {} where no mask was there before the first step."""
    if config.sparsify.mask is not None:
        cost = found_elsewhere(config.sparsify.mask)
        if cost is None:
            return {"search_flops": None, "search": NOT_INCLUDED}
        return {"search_flops": cost["training_flops"], "energy": cost["energy"]}
    found = found_at_start(config, facts, weight=weight)
    return {} if found is None else {"search_flops": found.flops, "energy": found.energy}


def bridging(method: NeST) -> Callable[[int], float]:
    """Step → FLOPs a token of the bridging gradients, in the steps in which neurons may be born."""
    each = float(method.bridging_flops())
    return lambda step: each if method.grows_at(step) else 0.0


def in_flops(densities: Densities, weight: float) -> Densities:
    """Densities of weights as densities of FLOPs, where a zero saves ``weight`` times the mean weight's FLOPs."""
    if weight == 1:
        return densities

    def of(rule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: min(1.0, max(0.0, 1 - weight * (1 - rule(step))))

    return Densities(of(densities.forward), of(densities.gradient), densities.moments)


def run_densities(config: RunConfig, outcome: Outcome) -> Densities | None:
    """Step → density of a run that has ended, by the rule of its method; None where none is known.

    Under optim.sparse_state moments are of the weights that are there (their places, 4 bytes each, are not counted)."""
    found = _by_method(config, outcome)
    return replace(found, moments=found.forward) if found is not None and config.optim.sparse_state else found


def _by_method(config: RunConfig, outcome: Outcome) -> Densities | None:
    sparsify, steps = config.sparsify, config.train.steps
    density, method = 1 - sparsify.sparsity, _method(outcome)
    if method is None:
        return dense_run()
    if sparsify.method in STATIC:
        return static_run(density)
    if sparsify.method == "rigl":
        return rigl_run(density, every=sparsify.every, stop=last_update(sparsify, steps))
    if sparsify.method == "snfs":
        return momentum_run(density)
    if sparsify.method == "top_kast":
        return top_kast_run(density, backward_density=min(1.0, 2 * density))
    if sparsify.method == "magnitude":
        return gradual_run(pruning_schedule(sparsify, sparsify.end))
    if isinstance(method, Rewinding):
        return gradual_run(method.share)
    if isinstance(method, EarlyBirdPruning) and method.found is not None:
        return gradual_run(one_shot(sparsify.sparsity, step=method.found))
    if isinstance(method, Prescribed):
        return static_run(1 - method.masks().sparsity)
    if isinstance(method, Phases):
        return gradual_run(lambda step: sparsify.sparsity if method.sparse_at(step) else 0.0)
    if isinstance(method, ChosenMasks):
        return feedback_run(method.schedule)
    if isinstance(method, NeST):
        return recorded_run(method.history, dense_gradients=method.grows_at)
    if isinstance(method, GeneralizationDriven):
        return recorded_run([(step, 1 - zeros) for step, zeros in method.history])
    return dense_run() if isinstance(method, LearnedSparsity) else None
