"""A trained model pruned by magnitude and by Hessian methods, and what a little and much retraining leaves of it."""

import copy
import statistics
from collections.abc import Mapping, Sequence

from pruning import sparsify
from pruning.batches import Batch
from pruning.diagnostics import mean_loss
from training.config import RunConfig
from training.records import Line
from training.study.fitting import Fit
from training.study.summary import Comparison, compare_values
from transformer import Transformer

CRITERIA = {"magnitude": "Magnitude", "obd": "OBD", "woodfisher": "WoodFisher", "sparsegpt": "SparseGPT"}
SPARSITIES = (0.5, 0.9)
BUDGETS = (8, 320)
FACTORS = (0.3, 1.0)
CALIBRATION = 8  # batches


def retraining(model: Transformer, batches: Sequence[Batch], held_out: Sequence[Batch], *, config: RunConfig) -> Line:
    """Held-out loss, nats a token: ``sparsity_90 → sparsegpt → after_8 → 0.3``, the last a factor on the cell's rate.

    Every criterion prunes the same share of each matrix (``after_0`` is the loss then) and retrains with its zeros held
    for each of BUDGETS steps at each of FACTORS times the rate, under the cell's schedule."""
    found: Line = {}
    for sparsity in SPARSITIES:
        rows: Line = {}
        for name in CRITERIA:
            pruned = copy.deepcopy(model)
            calibration = None if name == "magnitude" else batches[:CALIBRATION]
            sparsify(pruned, sparsity=sparsity, method=name, allocation="uniform", calibration=calibration)
            rows[name] = {"after_0": mean_loss(pruned, held_out)}
            for steps in BUDGETS:
                rows[name][f"after_{steps}"] = {
                    f"{factor:g}": _after(pruned, batches, held_out, config, steps, factor) for factor in FACTORS
                }
        found[f"sparsity_{round(100 * sparsity)}"] = rows
    return found


def _after(
    pruned: Transformer,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    config: RunConfig,
    steps: int,
    factor: float,
) -> float:
    model = copy.deepcopy(pruned)
    Fit(config, steps=steps, hold=True, lr=factor * config.optim.lr)(model, batches)
    return mean_loss(model, held_out)


def retraining_part(runs: Mapping[int, Line]) -> str:
    """The part of a page: a table, and for each amount of retraining what the comparison with magnitude says.

    runs: seed → the record of a cell with this measurement."""
    measured = {seed: line["measures"]["retraining"] for seed, line in runs.items()}
    stages = [0, *BUDGETS]
    rows, said = [], []
    for sparsity in (round(100 * value) for value in SPARSITIES):
        values = {name: {steps: _values(measured, sparsity, name, steps) for steps in stages} for name in CRITERIA}
        for name, label in CRITERIA.items():
            rows.append(f"| {sparsity}% | {label} | {' | '.join(_cell(values[name][steps]) for steps in stages)} |")
        for steps in stages:
            said.append(_sentence(sparsity, steps, {name: values[name][steps] for name in CRITERIA}))
        said.append(_closing(sparsity, values))
    columns = ["at once", *(f"after {steps} steps" for steps in BUDGETS)]
    header = f"| Sparsity | Criterion | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}"
    return "\n\n".join([_HEAD, "\n".join(f"- {line}" for line in said), "\n".join([header, *rows])])


_HEAD = (
    "## Hessian methods against magnitude, by retraining\n\n"
    "The dense model of each seed, pruned to equal shares of every matrix and retrained with its zeros held. Held-out "
    f"loss in nats a token. Each criterion tried {', '.join(f'{factor:g}' for factor in FACTORS)} times the dense "
    "run's rate for each length; the rate of the lowest mean over the seeds is shown."
)


def _values(measured: Mapping[int, Line], sparsity: int, name: str, steps: int) -> dict[int, float]:
    found = {seed: line[f"sparsity_{sparsity}"][name][f"after_{steps}"] for seed, line in measured.items()}
    if steps == 0:
        return found
    factors = next(iter(found.values()))
    best = min(factors, key=lambda factor: statistics.fmean(line[factor] for line in found.values()))
    return {seed: line[best] for seed, line in found.items()}


def _sentence(sparsity: int, steps: int, values: Mapping[str, Mapping[int, float]]) -> str:
    when = "at once" if steps == 0 else f"after {steps} steps"
    compared = {name: compare_values(values[name], values["magnitude"]) for name in CRITERIA if name != "magnitude"}
    parts = [_against(CRITERIA[name], found) for name, found in compared.items() if found is not None]
    return f"{sparsity}% {when}: {'; '.join(parts) or 'fewer than two seeds'}."


def _closing(sparsity: int, values: Mapping[str, Mapping[int, Mapping[int, float]]]) -> str:
    """Whether what a criterion is ahead of magnitude by at once is less after the most retraining, seed by seed."""
    parts = []
    for name in CRITERIA:
        first, last = (
            {seed: values[name][steps][seed] - value for seed, value in values["magnitude"][steps].items()}
            for steps in (0, BUDGETS[-1])
        )
        found = compare_values(last, first)
        if name == "magnitude" or found is None:
            continue
        lost = "closes" if _mean(first) < 0 else "turns against it"
        word = {"worse": lost, "better": "widens", "undecided": "does not change"}[found.outcome]
        parts.append(f"{CRITERIA[name]}'s {word} ({_mean(first):+.3f}, then {_mean(last):+.3f})")
    return f"{sparsity}%, the gap to magnitude from at once to {BUDGETS[-1]} steps: {'; '.join(parts) or 'one seed'}."


def _mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())


def _against(label: str, found: Comparison) -> str:
    words = {"better": "below magnitude", "worse": "above magnitude", "undecided": "no difference from magnitude"}
    return f"{label} {words[found.outcome]} ({found.difference:+.3f}, spread {found.margin:.3f})"


def _cell(values: Mapping[int, float]) -> str:
    spread = f" ± {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.3f}{spread}"
