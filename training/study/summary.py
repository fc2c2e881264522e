"""From a study's records to its numbers: best rates, means and spreads, and what follows from them."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from training.records import Line
from training.study.records import DONE, cells_by_key, regimes_by_key, speeds_by_key
from training.study.spec import Arm, Cell, Study, cell_key, regime_seeds, regime_sweep, seed_cells, sweep_cells
from training.study.speed import speed_key

Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class ArmResult:
    """What the records say of an arm.

    lr: the best of ``sweep`` (rate → bits a byte of the text that chooses it, None where the loss was not finite), None
    if none worked. bits: seed → held-out bits a byte at that rate. diverged: seeds whose loss was not finite. facts:
    one of its cells' records, speed: its speed's. runs: seed → the record of the cell that ended with a finite loss,
    with what it gave in each regime at that regime's best rate under ``regimes → name`` (its values, and ``lr``).
    """

    arm: Arm
    lr: float | None
    sweep: dict[float, float | None]
    bits: dict[int, float]
    diverged: tuple[int, ...]
    facts: Line | None
    speed: Line | None
    runs: dict[int, Line]

    @property
    def mean(self) -> float:
        """Mean bits a byte over the seeds that ended."""
        return statistics.fmean(self.bits.values())

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds, None for fewer than two."""
        return statistics.stdev(self.bits.values()) if len(self.bits) > 1 else None

    @property
    def at_edge(self) -> str | None:
        """'lowest' or 'highest' where the best rate is the sweep's first or last, so that a better one may lie beyond.

        None too where a rate beyond was tried and its loss was not finite.
        """
        if self.lr is None or len(self.sweep) < 2:
            return None
        return {min(self.sweep): "lowest", max(self.sweep): "highest"}.get(self.lr)


@dataclass(frozen=True)
class Comparison:
    """An arm against the reference. difference: of mean bits a byte, negative where the arm is better. margin: the
    seeds' spread, √(s_arm² + s_reference²). outcome: 'undecided' unless |difference| exceeds the margin and every
    seed, compared with the reference's run of the same seed, points the same way."""

    difference: float
    margin: float
    outcome: Outcome


def best_rates(study: Study, lines: list[Line]) -> dict[str, float]:
    """Arm's name → the sweep's rate with the fewest bits a byte of the text that chooses, or that of the arm whose rate
    it takes; arms with no finite result are left out."""
    return _best(study, lines, study.chosen_by)


def rates_by_held_out(study: Study, lines: list[Line]) -> dict[str, float]:
    """As :func:`best_rates`, had the held-out text, which the table reports, chosen them."""
    return _best(study, lines, "bits_per_byte")


def _best(study: Study, lines: list[Line], score: str) -> dict[str, float]:
    cells = cells_by_key(lines)
    found: dict[str, tuple[float, float]] = {}
    for cell in sweep_cells(study, lines):
        line = cells.get(cell_key(study, cell))
        if line is not None and line["status"] == DONE:
            name, candidate = cell.arm.name, (line[score], cell.lr)
            found[name] = min(found.get(name, candidate), candidate)
    rates = {name: lr for name, (_, lr) in found.items()}
    taken = {arm.name: rates[arm.rate_of] for arm in study.arm if arm.rate_of in rates}
    return rates | taken


def regime_rates(study: Study, regime: str, lines: list[Line]) -> dict[str, float]:
    """Arm's name → the rate of the regime's sweep with the lowest score; arms with no finite one are left out."""
    known = regimes_by_key(lines)
    found: dict[str, tuple[float, float]] = {}
    for cell in regime_sweep(study, regime, lines):
        line = known.get(cell_key(study, cell))
        if line is not None and line["status"] == DONE:
            name, candidate = cell.arm.name, (line["score"], cell.lr)
            found[name] = min(found.get(name, candidate), candidate)
    return {name: lr for name, (_, lr) in found.items()}


def results(study: Study, lines: list[Line]) -> list[ArmResult]:
    """One result an arm, in the study's order."""
    rates = best_rates(study, lines)
    return [_result(study, arm, rates.get(arm.name), lines) for arm in study.arm]


def compare(result: ArmResult, reference: ArmResult) -> Comparison | None:
    """None unless both have at least two seeds that ended."""
    return compare_values(result.bits, reference.bits)


def compare_values(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """Values by seed, of which the lower is the better; None unless both have at least two."""
    if len(ours) < 2 or len(theirs) < 2:
        return None
    difference = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    margin = (statistics.variance(ours.values()) + statistics.variance(theirs.values())) ** 0.5
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if difference < -margin and all(pair < 0 for pair in pairs):
        return Comparison(difference, margin, "better")
    if difference > margin and all(pair > 0 for pair in pairs):
        return Comparison(difference, margin, "worse")
    return Comparison(difference, margin, "undecided")


def missing(study: Study, lines: list[Line]) -> list[Cell]:
    """Cells of the sweep, and of the seeds at the best rates so far, that have no record."""
    cells = cells_by_key(lines)
    wanted = sweep_cells(study, lines) + seed_cells(study, best_rates(study, lines))
    return [cell for cell in wanted if cell_key(study, cell) not in cells]


def missing_in_regimes(study: Study, lines: list[Line]) -> list[Cell]:
    """Runs in regimes that have no record, those of the seeds at the best rates so far among them."""
    known = regimes_by_key(lines)
    wanted = [
        cell
        for regime in study.regimes
        for cell in regime_sweep(study, regime, lines) + regime_seeds(study, regime, regime_rates(study, regime, lines))
    ]
    return [cell for cell in wanted if cell_key(study, cell) not in known]


def _result(study: Study, arm: Arm, lr: float | None, lines: list[Line]) -> ArmResult:
    cells = cells_by_key(lines)
    sweep = {
        cell.lr: None if cells[key]["status"] != DONE else cells[key][study.chosen_by]
        for cell in sweep_cells(study, lines)
        if cell.arm is arm and (key := cell_key(study, cell)) in cells
    }
    runs = (
        {}
        if lr is None
        else {cell.seed: cells.get(cell_key(study, cell)) for cell in seed_cells(study, {arm.name: lr})}
    )
    ended = {seed: line for seed, line in runs.items() if line is not None}
    return ArmResult(
        arm=arm,
        lr=lr,
        sweep=sweep,
        bits={seed: line["bits_per_byte"] for seed, line in ended.items() if line["status"] == DONE},
        diverged=tuple(seed for seed, line in ended.items() if line["status"] != DONE),
        facts=next(iter(ended.values()), None),
        speed=speeds_by_key(lines).get(speed_key(study, arm)),
        runs={
            seed: line | _in_regimes(study, arm, seed, lines) for seed, line in ended.items() if line["status"] == DONE
        },
    )


def _in_regimes(study: Study, arm: Arm, seed: int, lines: list[Line]) -> Line:
    known, found = regimes_by_key(lines), dict[str, Line]()
    for regime in study.regimes:
        rates = {name: lr for name, lr in regime_rates(study, regime, lines).items() if name == arm.name}
        for cell in regime_seeds(study, regime, rates):
            line = known.get(cell_key(study, cell))
            if cell.seed == seed and line is not None and line["status"] == DONE:
                tried = [c.lr for c in regime_sweep(study, regime, lines) if c.arm is arm]
                found[regime] = line["values"] | {"lr": cell.lr, "lowest": min(tried), "highest": max(tried)}
    return {"regimes": found} if found else {}
