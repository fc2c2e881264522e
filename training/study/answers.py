"""The answers to a study's questions, each computed from the records."""

import itertools
import statistics
from collections.abc import Mapping, Sequence

from training.records import Line
from training.study.question import Question
from training.study.spec import Study
from training.study.summary import ArmResult, Comparison, Outcome, compare_values

WORDS: dict[Outcome, str] = {"better": "lower", "undecided": "no difference", "worse": "higher"}
Values = Mapping[int, float]


def answers(study: Study, found: Sequence[ArmResult]) -> list[str]:
    """A part of the page for each question."""
    return [f"**{question.text}**\n\n{_answer(question, study, found)}" for question in study.ask]


def values_of(result: ArmResult, metric: str) -> dict[int, float]:
    """Seed → the number at this dotted path of its record, of those that have one."""
    found = {seed: _at(line, metric) for seed, line in result.runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def mean_and_spread(values: Values) -> str:
    """2.0547 ± 0.0041, or nothing without values."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values.values()):.4f}{spread}"


def _answer(question: Question, study: Study, found: Sequence[ArmResult]) -> str:
    by_name = {result.arm.name: result for result in found}
    if question.order:
        return "\n".join(f"- {line}" for line in _ordered(question, by_name))
    reference = by_name[question.reference or study.reference]
    chosen = [by_name[n] for n in question.arms] if question.arms else [r for r in found if r is not reference]
    return "\n".join(f"- {line}" for line in _against(question, chosen, reference))


def _against(question: Question, chosen: Sequence[ArmResult], reference: ArmResult) -> list[str]:
    theirs = values_of(reference, question.metric)
    compared = {r.arm.label: compare_values(values_of(r, question.metric), theirs) for r in chosen}
    name = f"{reference.arm.label} ({mean_and_spread(theirs) or 'not measured'})"
    heads = {"better": f"Lower than {name}", "undecided": "No difference beyond the seeds' spread",
             "worse": "Higher"}  # fmt: skip
    lines = []
    for outcome, head in heads.items():
        listed = [f"{label} {_numbers(c)}" for label, c in compared.items() if c is not None and c.outcome == outcome]
        lines.append(f"{head}: {', '.join(listed) or 'none'}.")
    without = [label for label, c in compared.items() if c is None]
    return lines + ([f"Fewer than two seeds: {', '.join(without)}."] if without else [])


def _ordered(question: Question, by_name: Mapping[str, ArmResult]) -> list[str]:
    """For each combination of the grid: whether each of the order is below the next, and whether all are."""
    first = question.order[0]
    suffixes = [name[len(first) :] for name in by_name if name == first or name.startswith(f"{first} ")]
    lines = []
    for suffix in suffixes:
        ranked = [by_name[f"{name}{suffix}"] for name in question.order if f"{name}{suffix}" in by_name]
        pairs = [
            (one, two, compare_values(values_of(one, question.metric), values_of(two, question.metric)))
            for one, two in itertools.pairwise(ranked)
        ]
        outcomes = {c.outcome for _, _, c in pairs if c is not None}
        said = "holds" if outcomes == {"better"} else "is contradicted" if "worse" in outcomes else "is not decided"
        told = "; ".join(f"{family(one)} against {family(two)}: {_told(c)}" for one, two, c in pairs)
        lines.append(f"{suffix.strip() or 'all'}: the order {said}. {told}.")
    return lines


def family(result: ArmResult) -> str:
    """The arm's label without the values of the grid."""
    head, _, last = result.arm.label.rpartition(", ")
    return head if head and result.arm.name.endswith(last) else result.arm.label


def _told(comparison: Comparison | None) -> str:
    return "fewer than two seeds" if comparison is None else f"{WORDS[comparison.outcome]} {_numbers(comparison)}"


def _numbers(comparison: Comparison) -> str:
    return f"({comparison.difference:+.4f}, spread {comparison.margin:.4f})"


def _at(line: Line, path: str) -> float | None:
    value: object = line
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return float(value) if isinstance(value, int | float) else None
