"""What a run spends beside its steps: on a mask before the first one, and on Fisher traces along the way."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pruning.criteria import CRITERIA
from pruning.diagnostics import Passes, RunCost, search_cost
from pruning.saliency.rounds import exponential
from training.config import RunConfig
from training.records import Line
from training.sparsify_config import BEFORE
from training.sparsity import SCORED_BATCHES

FLOW_TOKENS, FLOW_BYTES = 2, 8  # SynFlow's example has two tokens, its flow is float64
NOT_INCLUDED = "not included: no record.json of the run that gave the mask is beside it"


def found_at_start(config: RunConfig, facts: Line, *, weight: float) -> RunCost | None:
    """The passes in which 'snip', 'grasp' or 'synflow' look for a mask, none of 'random'; None for other methods.

    snip: a loss and its gradient on 8 batches in each of its 10 rounds, at the density that the rounds before left.
    grasp: the same once, then again with a gradient of the gradient, all dense. synflow: two looks at the flow, then a
    flow and its gradient in each of its 100 rounds, of 2 tokens, in float64, through all experts.
    weight: of a zero in FLOPs, the mean weight's being 1."""
    method, sparsity = config.sparsify.method, config.sparsify.sparsity
    if method not in BEFORE or not sparsity:
        return None
    tokens = config.train.batch * config.data.length
    rounds = CRITERIA[method].rounds
    left = [1.0, *(1 - share for share in exponential(sparsity, rounds)[:-1])] if rounds else []
    found: list[tuple[float, Passes]] = []
    if method == "snip":
        each = Passes(SCORED_BATCHES, 2 * SCORED_BATCHES, tokens)
        found = [(max(0.0, 1 - weight * (1 - density)), each) for density in left]
    if method == "grasp":
        found = [(1.0, Passes(2 * SCORED_BATCHES, (2 + 2 + 6) * SCORED_BATCHES, tokens))]
    if method == "synflow":
        looks = [(1.0, Passes(1, 1, FLOW_TOKENS)), (1.0, Passes(1, 2, FLOW_TOKENS))]
        found = looks + [(density, Passes(1, 2, FLOW_TOKENS)) for density in left]
    flow, weights = method == "synflow", facts["prunable_weights"]
    return search_cost(
        found,
        prunable_flops=2 * weights if flow else facts["prunable_flops"],
        other_flops=facts["flops_per_token"] - facts["prunable_flops"],
        prunable_weights=weights,
        other_weights=facts["parameters"] - weights,
        weight_bytes=FLOW_BYTES if flow else 4,
    )


def found_elsewhere(mask: Path) -> Line | None:
    """The cost in the record of the run that gave a mask: in its folder, or up to two above (RUN/checkpoints/STEP)."""
    from training.study.cell import RECORD

    folder = mask if mask.is_dir() else mask.parent
    for place in (folder, *folder.resolve().parents[:2]):
        if (place / RECORD).is_file():
            cost: Line | None = json.loads((place / RECORD).read_text(encoding="utf-8")).get("cost")
            return cost
    return None


def fisher_passes(config: RunConfig) -> Callable[[int], Sequence[Passes]]:
    """Step → passes of the Fisher words of [sparsify] in it.

    fisher_penalty, every ``fisher_every`` steps on a micro-batch: labels drawn (1 forward), a loss, its gradient, and
    the gradient of that one's square. curriculum = "low_fisher", once: labels, loss and gradient of each sample of the
    pool by itself; "random" looks at nothing."""
    sparsify, train, length = config.sparsify, config.train, config.data.length
    penalty = Passes(2, 2 + 6, train.batch // train.accumulation * length)
    pool = sparsify.curriculum_pool
    ranking = Passes(2 * pool, 2 * pool, min(length + 1, config.model.max_length or length))

    def of(step: int) -> list[Passes]:
        penalised = bool(sparsify.fisher_penalty) and step % sparsify.fisher_every == 0
        ranked = sparsify.curriculum == "low_fisher" and step == sparsify.curriculum_begin
        return [penalty] * penalised + [ranking] * ranked

    return of
