"""A study's page in Markdown, every number read from its records."""

from collections.abc import Sequence
from pathlib import Path

from training.records import Line
from training.study.answers import answers
from training.study.figure import study_svg
from training.study.sections import sections
from training.study.spec import Study, sweep_cells
from training.study.summary import (
    ArmResult,
    Comparison,
    Outcome,
    best_rates,
    compare,
    missing,
    missing_in_regimes,
    rates_by_held_out,
    results,
)

RULE = (
    "*Better* or *worse* means: the means differ by more than the seeds' spread, √(s² + s²) of the two sample standard "
    "deviations, and every seed, compared with the reference's run of the same seed, points the same way."
)


def write_page(study: Study, lines: list[Line], *, folder: Path) -> Path:
    """Write NAME.md, NAME.svg and the sections' figures into ``folder``; returns the page's path.

    Raises: ValueError without any result."""
    found = results(study, lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{study.name}.svg").write_text(study_svg(found, reference=_reference(study, found)), encoding="utf-8")
    for section in sections(study, found):
        for end, figure in section.figures.items():
            (folder / f"{study.name}-{end}.svg").write_text(figure, encoding="utf-8")
    page = folder / f"{study.name}.md"
    page.write_text(page_text(study, lines), encoding="utf-8")
    return page


def page_text(study: Study, lines: list[Line]) -> str:
    """The page: question, verdict, figure, table, notes, conditions."""
    found = results(study, lines)
    reference = _reference(study, found)
    parts = [
        f"# {study.question}",
        *([f"Expected beforehand: {study.expected}"] if study.expected else []),
        *_incomplete(study, lines),
        "## Verdict\n\n" + "\n".join(f"- {line}" for line in verdict(found, reference)) + f"\n\n{RULE}",
        *(["## Answers", *answers(study, found)] if study.ask else []),
        *(["## Where the expectations do not hold, and why", *study.why] if study.why else []),
        *(section.text for section in sections(study, found) if section.text),
        f"![Held-out bits per byte by arm, and the learning-rate sweeps]({study.name}.svg)",
        "## Numbers\n\n" + _table(study, found, reference),
        *_notes(study, found),
        "## Conditions\n\n" + "\n".join(f"- {line}" for line in _conditions(study, lines)),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(found: Sequence[ArmResult], reference: ArmResult) -> list[str]:
    """Sentences: which arms are better, worse or undecided, which train faster, and which had no finite result."""
    if len(reference.bits) < 2:
        return [f"None: {reference.arm.label}, the reference, has {len(reference.bits)} finished seeds of at least 2."]
    ranked = [result for result in found if result.arm.ranked and result is not reference]
    compared = [(result, c) for result in ranked if (c := compare(result, reference)) is not None]
    lines = []
    for outcome, words in _WORDS.items():
        chosen = sorted(((r, c) for r, c in compared if c.outcome == outcome), key=lambda pair: pair[1].difference)
        listed = ", ".join(_difference(result, comparison) for result, comparison in chosen) or "none"
        lines.append(f"{words.format(reference=reference.arm.label)}: {listed}.")
    lines += _fastest(ranked, reference)
    single = [result.arm.label for result in ranked if len(result.bits) < 2]
    lines += [f"Not compared, for fewer than two finished seeds: {', '.join(single)}."] if single else []
    return lines + _at_edges(found)


def _at_edges(found: Sequence[ArmResult]) -> list[str]:
    """How many arms might be better at a rate that was not tried."""
    count = sum(result.at_edge is not None for result in found)
    if not count:
        return []
    return [
        f"For {count} of {len(found)} arms the best learning rate is an end of the sweep (they are named below the "
        "numbers): what is said of them may turn with a rate beyond it."
    ]


_WORDS: dict[Outcome, str] = {
    "better": "Better than {reference} in bits per byte",
    "undecided": "No difference from {reference} beyond the seeds' spread",
    "worse": "Worse than {reference}",
}


def _difference(result: ArmResult, comparison: Comparison) -> str:
    return f"{result.arm.label} ({comparison.difference:+.4f}, spread {comparison.margin:.4f})"


def _fastest(ranked: Sequence[ArmResult], reference: ArmResult) -> list[str]:
    timed = [result for result in ranked if result.speed is not None]
    if not timed:
        return []
    slower = [f"{r.arm.label} ({r.speed['ratio']:.2f} ×)" for r in timed if r.speed and r.speed["ratio"] > 1]
    faster = [f"{r.arm.label} ({r.speed['ratio']:.2f} ×)" for r in timed if r.speed and r.speed["ratio"] <= 1]
    return [
        f"Time of a training step against {reference.arm.label}: longer for {', '.join(slower) or 'none'}; "
        f"not longer for {', '.join(faster) or 'none'}."
    ]


def _table(study: Study, found: Sequence[ArmResult], reference: ArmResult) -> str:
    names = ["Arm", "Learning rate", "Bits per byte", "Against the reference"]
    rows = [[_label(result, reference), *_quality(result, reference)] for result in found]
    if "cost" not in study.sections:  # which counts what zeros would save
        names += ["Parameters", "Active", "MFLOPs a token", "Training PFLOPs"]
        rows = [row + _sizes(result, reference) for row, result in zip(rows, found, strict=True)]
    if study.speeds:
        names += ["Tokens/s", "Step time"]
        rows = [row + _speed(result) for row, result in zip(rows, found, strict=True)]
    head, *body = [f"| {' | '.join(line)} |" for line in [names, *rows]]
    return "\n".join([head, f"|{'---|' * len(names)}", *body])


def _label(result: ArmResult, reference: ArmResult) -> str:
    label = f"**{result.arm.label}**" if result is reference else result.arm.label
    return label + ("" if result.arm.ranked else " (not ranked)")


def _sizes(result: ArmResult, reference: ArmResult) -> list[str]:
    facts = result.facts
    if facts is None:
        return [""] * 4
    flops = facts.get("training_flops")
    cells = [_millions(facts["parameters"]), _millions(facts["active_parameters"]), _flops(facts, reference)]
    return [*cells, "" if flops is None else f"{flops / 1e15:.3f}"]


def _speed(result: ArmResult) -> list[str]:
    speed = result.speed
    return ["", ""] if speed is None else [f"{speed['tokens_per_s']:,.0f}", f"{speed['ratio']:.2f} ×"]


def _quality(result: ArmResult, reference: ArmResult) -> list[str]:
    if result.lr is None:
        return ["", "no finite result" if result.sweep else "", ""]
    if not result.bits:
        return [f"{result.lr:g}", "", ""]
    spread = "" if result.spread is None else f" ± {result.spread:.4f}"
    lost = f", {len(result.diverged)} diverged" if result.diverged else ""
    against = f"{result.mean / reference.mean - 1:+.2%}" if reference.bits and result is not reference else ""
    return [f"{result.lr:g}", f"{result.mean:.4f}{spread} (n = {len(result.bits)}{lost})", against]


def _flops(facts: Line, reference: ArmResult) -> str:
    text = f"{facts['flops_per_token'] / 1e6:.2f}"
    if reference.facts is None:
        return text
    return f"{text} ({facts['flops_per_token'] / reference.facts['flops_per_token']:.3f} ×)"


def _notes(study: Study, found: Sequence[ArmResult]) -> list[str]:
    notes = [f"{result.arm.label}: {result.arm.note}" for result in found if result.arm.note]
    notes += [
        f"{result.arm.label}: its best learning rate is the {result.at_edge} of the sweep; a better one may lie beyond."
        for result in found
        if result.at_edge
    ]
    notes += [
        f"{result.arm.label}: the loss was not finite at {', '.join(f'{lr:g}' for lr in lost)}."
        for result in found
        if (lost := [lr for lr, bits in result.sweep.items() if bits is None])
    ]
    return ["\n".join(f"- {note}" for note in notes)] if notes else []


def _incomplete(study: Study, lines: list[Line]) -> list[str]:
    left = len(missing(study, lines)) + len(missing_in_regimes(study, lines))
    return [f"**Unfinished: {left} cells have no record yet.**"] if left else []


def _conditions(study: Study, lines: list[Line]) -> list[str]:
    cells = [line for line in lines if line["kind"] == "cell"]
    speeds = [line for line in lines if line["kind"] == "speed"]
    regimes = [line for line in lines if line["kind"] == "regime"]
    rates = ", ".join(f"{lr:g}" for lr in study.lrs)
    swept = "" if study.sweep_steps is None else f" for {study.sweep_steps} steps"
    said = [
        f"Command: `sparse-transformers study {study.name}`; records: {len(cells)} cells"
        f"{f', {len(regimes)} runs in other regimes' if regimes else ''}{f', {len(speeds)} speeds' if speeds else ''}.",
        f"Every arm tried the learning rates {rates} with seed {study.seeds[0]}{swept}; its best, by "
        f"{'validation' if study.validation else 'held-out'} bits per byte, was run with the seeds "
        f"{', '.join(map(str, study.seeds))}. {_chosen(study, lines)}{_taken(study)}{_beyond(study, lines)}",
        f"Cells: {_values(cells, 'steps')} steps, {_values(cells, 'tokens')} tokens; {_values(cells, 'dtype')}, "
        f"{_values(cells, 'threads')} threads, {_values(cells, 'device')}, torch {_values(cells, 'torch')}, "
        f"commit {_values(cells + regimes, 'commit')}; "
        f"{sum(line.get('wall_seconds', 0) for line in cells + regimes) / 60:.0f} minutes of "
        f"processes, declared budget {study.budget_minutes:g} minutes.",
        *([] if "cost" in study.sections else [
            f"Active FLOPs a token are counted for the forward pass; arms that must match the reference do so within "
            f"{study.match_flops:.1%}. Training FLOPs are three times the forward pass's, of one run at full length."
        ]),
    ]  # fmt: skip
    if speeds:
        said.append(
            f"Speed: medians of {_values(speeds, 'rounds')} training steps, the arms taking turns in one process with "
            f"{_values(speeds, 'threads')} threads on {_values(speeds, 'device')}; step time is the median of the "
            f"ratios within a round; load of the machine when it began {_values(speeds, 'load_before')}."
        )
    return said


def _chosen(study: Study, lines: list[Line]) -> str:
    """Which text chose the rates, and what the reported one would have chosen."""
    if not study.validation:
        return "The rate is chosen on the text that the table reports: equally for all arms."
    rates, held_out = best_rates(study, lines), rates_by_held_out(study, lines)
    others = [f"{study.named(name).label} {lr:g}" for name, lr in held_out.items() if lr != rates[name]]
    return (
        f"Validation text is another {study.validation:.1%} of the documents, which the sweep's cells do not train on; "
        "the runs that the table reports train on all but the held-out text. The held-out text, which the table "
        f"reports, would have chosen the same rates{' but for ' if others else ''}{', '.join(others)}."
    )


def _taken(study: Study) -> str:
    """Which arms had no sweep."""
    if not any(arm.rate_of for arm in study.arm):
        return ""
    at = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in study.sweep_at.items())
    return f" The sweep was made at {at}; the arms of other values take the rate that was best there."


def _beyond(study: Study, lines: list[Line]) -> str:
    """Which rates beyond the sweep's ends were tried, and by how many arms."""
    if not study.beyond:
        return ""
    further = sweep_cells(study, lines)[len(sweep_cells(study)) :]
    rates = ", ".join(f"{lr:g}" for lr in sorted({cell.lr for cell in further})) or "none"
    return (
        f" An arm whose best rate was the lowest or the highest tried the next one beyond, at most {study.beyond}: "
        f"{len({cell.arm.name for cell in further})} arms did ({rates})."
    )


def _values(lines: Sequence[Line], name: str) -> str:
    found = sorted({line[name] for line in lines if name in line})
    return ", ".join(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
                     for value in found) or "unknown"  # fmt: skip


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _reference(study: Study, found: Sequence[ArmResult]) -> ArmResult:
    return next(result for result in found if result.arm.name == study.reference)
