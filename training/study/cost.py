"""What a cell's training and its model cost, were zeros free: :func:`pruning.diagnostics.run_cost`."""

from pruning.diagnostics import (
    Densities,
    dense_run,
    gradual_run,
    momentum_run,
    rigl_run,
    run_cost,
    static_run,
    top_kast_run,
)
from pruning.retraining import EarlyBirdPruning, Rewinding
from pruning.schedules import one_shot
from training.config import RunConfig
from training.moments import Masked
from training.records import Line
from training.sparsity import last_update, pruning_schedule
from training.trainer import Outcome

STATIC = ("static", "set", "dsr", "deep_r", "preferential")


def sparse_cost(config: RunConfig, outcome: Outcome, facts: Line) -> Line:
    """``{"cost": …}``: training FLOPs, those of a dense run of as many steps, energy proxy in joules, forward FLOPs a
    token of the model that it ends with, its sparsity, and the step at which an early bird was found.

    The dense passes that find a mask are counted. Nothing for a method whose densities are not known, and for a model
    with experts or memories, whose active weights are not all.
    """
    densities = run_densities(config, outcome)
    if densities is None or facts["parameters"] != facts["active_parameters"]:
        return {}
    method = next(iter(outcome.sparsifiers), None)
    masks = method.masks() if isinstance(method, Masked) else None
    prunable = facts["prunable_weights"]
    cost = run_cost(
        densities,
        steps=config.train.steps,
        tokens=config.train.batch * config.data.length,
        prunable_flops=2 * prunable,
        other_flops=facts["flops_per_token"] - 2 * prunable,
        prunable_weights=prunable,
        other_weights=facts["parameters"] - prunable,
    )
    sparsity = 0.0 if masks is None else masks.sparsity
    found = {"found": method.found} if isinstance(method, EarlyBirdPruning) else {}
    return {
        "cost": {
            "training_flops": cost.flops,
            "dense_flops": cost.dense_flops,
            "energy": cost.energy,
            "inference_flops": facts["flops_per_token"] - 2 * prunable * sparsity,
            "sparsity": sparsity,
            **found,
        }
    }


def run_densities(config: RunConfig, outcome: Outcome) -> Densities | None:
    """Step → density of a run that has ended, by the rule of its method; None where none is known."""
    sparsify, steps = config.sparsify, config.train.steps
    density, method = 1 - sparsify.sparsity, next(iter(outcome.sparsifiers), None)
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
    return None
