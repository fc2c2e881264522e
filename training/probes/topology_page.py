"""What the records of ratios, topologies and rankings say."""

import statistics
from collections.abc import Mapping

from pruning.diagnostics import RankingStability
from training.config import from_dict
from training.probes.chart import Dots, dots_svg, mean_points
from training.probes.page import Findings
from training.probes.spec import Probe
from training.probes.summary import Result, arm_row, expectations, mean_spread, outcome, result_of, table, versus
from training.probes.topology import (
    DENSE,
    RATIO_LABELS,
    RATIOS,
    TOPOLOGIES,
    Options,
    ranking_tasks,
    sparse_tasks,
)
from training.records import Line
from training.study.panels import Panel, panels_svg
from training.study.summary import compare_values

THRESHOLDS = (0.8, 0.9)
Arms = dict[str, Result]


def findings(probe: Probe, lines: list[Line]) -> Findings:
    """Verdict, tables and figures from the records alone."""
    options: Options = from_dict(Options, probe.options, where=f"options of {probe.name!r}")
    dense = result_of(probe, lines, DENSE)
    groups = {
        f"{sparsity:.0%}": {task.arm: result_of(probe, lines, task) for task in sparse_tasks(sparsity)}
        for sparsity in options.sparsities
    }
    followed = [result_of(probe, lines, task) for task in ranking_tasks()]
    said = [sentence for name, arms in groups.items() for sentence in _verdict(name, arms, dense)]
    said += [_ranking_sentence(result, probe.steps) for result in followed]
    return Findings(
        verdict=(*said, expectations(_checks(groups, followed, probe.steps))),
        tables={
            "Held-out bits a byte": _losses(dense, groups),
            "Share of the weights that each matrix keeps": _densities(groups),
            "Step from which the ranking is stable": _stable(followed),
        },
        figures={
            "losses": ("Held-out bits a byte of each mask, a dot a seed", _loss_figure(groups)),
            "ranking": ("Agreement of the ranking with the last one", _ranking_figure(followed)),
        },
        results=(dense, *(result for arms in groups.values() for result in arms.values()), *followed),
        method=_method(probe, options),
    )


def _verdict(name: str, arms: Arms, dense: Result) -> list[str]:
    places = [
        versus(f"the largest weights at {_low(RATIO_LABELS[ratio])}", "random places",
               compare_values(arms[f"{ratio} magnitude"].bits, arms[f"{ratio} random"].bits))
        for ratio in RATIOS
    ]  # fmt: skip
    ratios = [
        versus(f"{_low(RATIO_LABELS[ratio])}, {TOPOLOGIES[topology]},", "uniform ones",
               compare_values(arms[f"{ratio} {topology}"].bits, arms[f"uniform {topology}"].bits))
        for topology in TOPOLOGIES
        for ratio in ("erk", "global")
    ]  # fmt: skip
    chance = arms["uniform random"].bits
    against = versus("uniform ratios, random places,", "dense", compare_values(chance, dense.bits))
    return [
        f"**{name} sparse.** Topology at equal ratios: {'; '.join(places)}.",
        f"{name}, ratios at equal topology: {'; '.join(ratios)}.",
        f"{name}: {_which(arms)}",
        f"{name}, at equal steps: {against}.",
    ]


def _which(arms: Arms) -> str:
    """Main effects over the six masks, by seed: the places' mean gain, and the distance between the two ratios whose
    means lie furthest apart."""
    seeds = set.intersection(*(set(result.bits) for result in arms.values()))
    if not seeds:
        return "no comparison of both choices, for want of a result."
    bits = {seed: {arm: result.bits[seed] for arm, result in arms.items()} for seed in sorted(seeds)}
    mean = {ratio: statistics.fmean(b[f"{ratio} {t}"] for b in bits.values() for t in TOPOLOGIES) for ratio in RATIOS}
    best, worst = min(mean, key=lambda r: mean[r]), max(mean, key=lambda r: mean[r])
    places = [statistics.fmean(b[f"{r} magnitude"] - b[f"{r} random"] for r in RATIOS) for b in bits.values()]
    ratios = [statistics.fmean(b[f"{best} {t}"] - b[f"{worst} {t}"] for t in TOPOLOGIES) for b in bits.values()]
    gaps = [place - ratio for place, ratio in zip(places, ratios, strict=True)]
    words = "the places change more" if max(gaps) < 0 else "the ratios change more" if min(gaps) > 0 else None
    return (
        f"averaged over the ratios, the largest weights change the loss of random places by "
        f"{mean_spread(places)} bits a byte; averaged over the places, {_low(RATIO_LABELS[best])} change that of "
        f"{_low(RATIO_LABELS[worst])} by {mean_spread(ratios)}: "
        f"{f'{words}, with every seed' if words else 'which of the two changes more depends on the seed'}."
    )


def _checks(groups: Mapping[str, Arms], followed: list[Result], steps: int) -> dict[str, bool]:
    checks: dict[str, bool] = {}
    for name, arms in groups.items():
        chance, largest = arms["global random"].bits, arms["global magnitude"].bits
        checks[f"random places at magnitude's ratios no worse than its own places at {name}"] = (
            bool(chance) and outcome(chance, largest) != "worse"
        )
        checks[f"ERK ahead of uniform, random places, at {name}"] = (
            outcome(arms["erk random"].bits, arms["uniform random"].bits) == "better"
        )
    for result in followed:
        stable = {kind: statistics.fmean(r.stable_from(kind) for r in _rankings(result)) for kind in _kinds(result)}
        if stable:
            where = f"under a {result.task.label}"
            checks[f"rankings stable before half of the training {where}"] = max(stable.values()) <= steps / 2
            others = [step for kind, step in stable.items() if kind != "attention"]
            checks[f"attention stable first {where}"] = stable["attention"] < min(others)
            others = [step for kind, step in stable.items() if kind != "expert"]
            checks[f"experts stable last {where}"] = stable["expert"] > max(others)
    return checks


def _low(label: str) -> str:
    return label if label.startswith("ERK") else label[0].lower() + label[1:]


def _ranking_sentence(result: Result, steps: int) -> str:
    parts = []
    for kind in _kinds(result):
        values = [record.stable_from(kind) for record in _rankings(result)]
        begin = [record.kendall[kind][0] for record in _rankings(result)]
        half = [_at(record, kind, steps // 2) for record in _rankings(result)]
        parts.append(f"{kind} from step {mean_spread(values, '.0f')} (τ {mean_spread(begin, '.2f')} at step 0, "
                     f"{mean_spread(half, '.2f')} at half)")  # fmt: skip
    if not parts:
        return f"Ranking under a {result.task.label}: no result."
    return (
        f"**Ranking under a {result.task.label}**, τ ≥ {THRESHOLDS[-1]:g} with the last one of {steps} steps: "
        f"{'; '.join(parts)}."
    )


def _at(record: RankingStability, kind: str, step: int) -> float:
    """τ at the last snapshot that is not after ``step``."""
    return max((s, value) for s, value in zip(record.steps, record.kendall[kind], strict=True) if s <= step)[1]


def _rankings(result: Result) -> list[RankingStability]:
    lines = [line["ranking"] for line in result.lines.values()]
    return [
        RankingStability(
            tuple(line["steps"]),
            {kind: tuple(values) for kind, values in line["kendall"].items()},
            {kind: tuple(values) for kind, values in line["spearman"].items()},
        )
        for line in lines
    ]


def _kinds(result: Result) -> list[str]:
    return list(dict.fromkeys(kind for record in _rankings(result) for kind in record.kendall))


def _losses(dense: Result, groups: Mapping[str, Arms]) -> str:
    rows = [["", *arm_row(dense, None)]]
    for name, arms in groups.items():
        rows += [[name, *arm_row(result, arms["uniform random"])] for result in arms.values()]
    head = ["Sparsity", "Mask", "Learning rate", "Bits a byte", "Against uniform, random places", "Training loss"]
    return table(head, rows)


def _densities(groups: Mapping[str, Arms]) -> str:
    rows = []
    for name, arms in groups.items():
        for ratio in RATIOS:
            lines = list(arms[f"{ratio} magnitude"].lines.values())
            by_part: dict[str, list[float]] = {}
            for line in lines:
                for matrix, density in line["densities"].items():
                    by_part.setdefault(matrix.split(".")[-2], []).append(density)
            kept = ", ".join(f"{part} {statistics.fmean(values):.1%}" for part, values in by_part.items())
            rows.append([name, RATIO_LABELS[ratio], kept])
    return table(["Sparsity", "Ratios", "Mean over layers and seeds"], rows)


def _stable(followed: list[Result]) -> str:
    rows = [
        [result.task.label, kind, *(
            mean_spread([record.stable_from(kind, threshold=t) for record in _rankings(result)], ".0f")
            for t in THRESHOLDS
        ), mean_spread([record.kendall[kind][0] for record in _rankings(result)], ".3f"),
         mean_spread([record.spearman[kind][0] for record in _rankings(result)], ".3f")]
        for result in followed for kind in _kinds(result)
    ]  # fmt: skip
    head = ["Schedule", "Kind of layer", *(f"τ ≥ {t:g} from step" for t in THRESHOLDS), "τ at step 0", "ρ at step 0"]
    return table(head, rows)


def _loss_figure(groups: Mapping[str, Arms]) -> str:
    return dots_svg("Held-out bits a byte by mask", [
        Dots(f"{name} sparse: held-out bits a byte, each seed (left is better)",
             {r.task.label: list(r.bits.values()) for r in arms.values()})
        for name, arms in groups.items()
    ])  # fmt: skip


def _ranking_figure(followed: list[Result]) -> str:
    panels = [
        Panel(f"{result.task.label}: Kendall's τ with the last ranking", "step", {
            kind: mean_points(zip(r.steps, r.kendall[kind], strict=True) for r in _rankings(result))
            for kind in _kinds(result)
        })
        for result in followed
    ]  # fmt: skip
    return panels_svg(panels, title="Agreement of the ranking with the last one")


def _method(probe: Probe, options: Options) -> tuple[str, ...]:
    return (
        f"A dense run of {probe.steps} steps ranks the weights by magnitude. Its initial weights are then trained for "
        f"{probe.steps} steps under each mask. Ratios: uniform; ERK; and those that one ranking over all matrices "
        "gives. Places: the largest trained weights of each matrix, or as many shuffled inside it.",
        f"Rankings: in runs of their own ({_changes(options)}), at the dense arm's best "
        f"rate; magnitudes every {options.snapshot_every} steps, {options.samples} weights of each kind, one draw. "
        "A ranking near the end agrees with the last one because it is near, and under a cosine also because the "
        "rate has fallen: the constant rate is beside it for that.",
    )


def _changes(options: Options) -> str:
    plain = {name: value for name, value in options.ranking_model.items() if name != "layer"}
    layers = options.ranking_model.get("layer", [])
    said = [f"{name} {value}" for name, value in plain.items()]
    said += ["layer " + ", ".join(f"{name} {value}" for name, value in layer.items()) for layer in layers]
    return "; ".join(said)
