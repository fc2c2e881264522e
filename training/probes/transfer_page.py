"""What the records of masks handed on say."""

import statistics
from collections.abc import Mapping

from training.config import from_dict
from training.probes.chart import Dots, dots_svg
from training.probes.page import Findings
from training.probes.spec import Probe
from training.probes.summary import Result, arm_row, expectations, mean_spread, outcome, result_of, table, versus
from training.probes.transfer import DENSE, TARGETS, Options, sparse_tasks, target_of
from training.records import Line
from training.study.summary import compare_values

Arms = dict[str, Result]


def findings(probe: Probe, lines: list[Line]) -> Findings:
    """Verdict, tables and figures from the records alone."""
    options: Options = from_dict(Options, probe.options, where=f"options of {probe.name!r}")
    dense = {target: result_of(probe, lines, task) for target, task in DENSE.items()}
    groups: dict[tuple[str, float], Arms] = {}
    for sparsity in options.sparsities:
        for task in sparse_tasks(sparsity):
            groups.setdefault((target_of(task), sparsity), {})[task.arm] = result_of(probe, lines, task)
    ordered = {key: groups[key] for target in TARGETS for key in groups if key[0] == target}
    return Findings(
        verdict=(
            *(_verdict(target, sparsity, arms) for (target, sparsity), arms in ordered.items()),
            expectations(_checks(ordered)),
        ),
        tables={
            f"{TARGETS[target]}, {sparsity:.0%} sparse": _table(dense[target], arms)
            for (target, sparsity), arms in ordered.items()
        },
        figures={"losses": ("Held-out bits a byte of each mask, a dot a seed", _figure(ordered))},
        results=(*dense.values(), *(result for arms in ordered.values() for result in arms.values())),
        method=_method(probe, options),
    )


def _verdict(target: str, sparsity: float, arms: Arms) -> str:
    own, chance = arms["own"], arms["erk"]
    moved = [arm for arm in arms if arm not in ("own", "erk", "shuffled")]
    parts = [versus("its own mask", "ERK by chance", compare_values(own.bits, chance.bits))]
    for arm in moved:
        label = "the mask handed on" if arm == "transferred" else f"the mask {_low(arms[arm].task.label)}"
        parts.append(versus(label, "its own", compare_values(arms[arm].bits, own.bits)))
        parts.append(versus(label, "ERK by chance", compare_values(arms[arm].bits, chance.bits)))
        parts.append(kept(arms[arm].bits, own.bits, chance.bits, label))
    first = "the mask handed on" if moved == ["transferred"] else "the mask stretched by repetition"
    parts.append(versus(f"{first}", "the same shuffled inside its matrices",
                        compare_values(arms[moved[0]].bits, arms["shuffled"].bits)))  # fmt: skip
    return f"**{TARGETS[target]}, {sparsity:.0%} sparse.** {_sentence('; '.join(part for part in parts if part))}."


def _checks(ordered: Mapping[tuple[str, float], Arms]) -> dict[str, bool]:
    checks: dict[str, bool] = {}
    for (target, sparsity), arms in ordered.items():
        where = f"{_low(TARGETS[target])} at {sparsity:.0%}"
        for arm in (arm for arm in arms if arm not in ("own", "erk", "shuffled")):
            what = "a mask handed on" if arm == "transferred" else f"a mask {_low(arms[arm].task.label)}"
            checks[f"{what} ahead of chance, {where}"] = outcome(arms[arm].bits, arms["erk"].bits) == "better"
            checks[f"{what} no worse than its own, {where}"] = outcome(arms[arm].bits, arms["own"].bits) != "worse"
        first = next(arm for arm in arms if arm not in ("own", "erk"))
        checks[f"no better than the same mask shuffled, {where}"] = (
            outcome(arms[first].bits, arms["shuffled"].bits) != "better"
        )
    for sparsity in dict.fromkeys(sparsity for _, sparsity in ordered):
        costs = {target: _cost(ordered[target, sparsity]) for target in ("corpus", "seed")}
        words = f"another corpus costs less than another seed at {sparsity:.0%}"
        checks[words] = outcome(costs["corpus"], costs["seed"]) == "better"
    return checks


def _cost(arms: Arms) -> dict[int, float]:
    """Seed → bits a byte that the mask handed on costs beyond the own one."""
    moved, own = arms["transferred"].bits, arms["own"].bits
    return {seed: moved[seed] - own[seed] for seed in moved if seed in own}


def kept(moved: Mapping[int, float], own: Mapping[int, float], chance: Mapping[int, float], label: str) -> str:
    """Share of the own mask's gain over chance that a mask handed on keeps; '' where the own mask gains nothing."""
    gain = compare_values(own, chance)
    if gain is None or gain.outcome != "better" or not moved:
        return ""
    means = [statistics.fmean(values.values()) for values in (moved, own, chance)]
    return f"{label} keeps {(means[2] - means[0]) / (means[2] - means[1]):.0%} of its own mask's gain over chance"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _low(label: str) -> str:
    return label[0].lower() + label[1:]


def _table(dense: Result, arms: Arms) -> str:
    rows = [[*arm_row(dense, None), ""]]
    for result in arms.values():
        distances = [line["distance"] for line in result.lines.values()]
        rows.append([*arm_row(result, arms["own"]), mean_spread(distances, ".3f")])
    head = ["Mask", "Learning rate", "Bits a byte", "Against its own", "Training loss", "Distance from its own mask"]
    return table(head, rows)


def _figure(ordered: Mapping[tuple[str, float], Arms]) -> str:
    return dots_svg("Held-out bits a byte by mask", [
        Dots(f"{TARGETS[target]}, {sparsity:.0%} sparse: held-out bits a byte, each seed (left is better)",
             {r.task.label: list(r.bits.values()) for r in arms.values()})
        for (target, sparsity), arms in ordered.items()
    ])  # fmt: skip


def _method(probe: Probe, options: Options) -> tuple[str, ...]:
    return (
        f"Every mask is the largest magnitudes of a dense run of {probe.steps} steps, one ranking over all matrices; "
        f"under it a model trains from its own initial weights for {probe.steps} steps. Own: the mask of the dense run "
        "with the same initial weights on the same text.",
        "Another seed: the mask of the next seed's dense run, with other weights and another order of the text. "
        f"Another corpus: trained on {options.other or 'the C++ headers that torch brings'}, with a tokenizer learnt "
        "from it, under the mask of the same seed's run on the first text. "
        f"A deeper model: {probe.base['model']['layers']} layers stretched over {options.layers}.",
        "Shuffled: as many weights in each matrix, in places drawn anew: what is left of the mask is its ratios. "
        "Distance: share of the weights in which two masks differ, of the most in which masks of their densities can; "
        "two drawn at random are at 1 less their density.",
    )
