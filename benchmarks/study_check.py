"""Does the code of today give the committed records of a study? One cell of every arm is trained again and compared.

    python -m benchmarks.study_check sparse-from-scratch
    python -m benchmarks.study_check sparse-from-scratch --arm dsr --arm snfs

Of each arm it takes the recorded cell of fewest steps, of those the one of the arm's best rate and lowest seed; a run
in a regime is a cell of its own. A seed gives the same bits on the same processor and number of threads, so that a
difference there is the code's; elsewhere the last digits may differ. Exit status 1 if any cell differs, 2 if none is
there to compare. Studies with a ``probe`` are not taken.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.records import Line, read_lines
from training.study import Study, find_study, load_study
from training.study.cell import RECORD, run_cell, write_job
from training.study.runner import Facts, check_arms
from training.study.spec import Cell, cell_key, regime_sweep, run_config, seed_cells, sweep_cells
from training.study.summary import best_rates, regime_rates

DOCS = Path("docs/studies")
OUT = Path("runs/study-check")


def chosen(study: Study, lines: Sequence[Line], *, among: Sequence[str] = ()) -> Iterator[tuple[Cell, Line]]:
    """(cell, its record) of each arm, and of each arm in each regime. among: only arms whose name has one of these."""
    known = {line["key"]: line for line in lines}
    rates = best_rates(study, list(lines))
    best = {regime: regime_rates(study, regime, list(lines)) for regime in study.regimes}
    runs = [cell for regime in study.regimes for cell in regime_sweep(study, regime)]
    for arm in study.arm:
        if among and not any(part in arm.name for part in among):
            continue
        cells = [cell for cell in sweep_cells(study) + seed_cells(study, rates) if cell.arm is arm]
        groups = [(cells, rates.get(arm.name))]
        groups += [
            ([cell for cell in runs if cell.regime == regime and cell.arm is arm], best[regime].get(arm.name))
            for regime in study.regimes
        ]
        for group, rate in groups:
            recorded = [cell for cell in group if cell_key(study, cell) in known]
            if recorded:
                cell = min(recorded, key=lambda one: (one.steps or study.steps, one.lr != rate, one.seed))
                yield cell, known[cell_key(study, cell)]


def again(study: Study, cell: Cell, facts: Facts, *, threads: int) -> Line:
    """The record that the cell leaves today, without what a study measures when it has ended."""
    folder = OUT / study.name / cell_key(study, cell)
    shutil.rmtree(folder, ignore_errors=True)
    config = run_config(study, cell, out=folder, threads=threads)
    given = {"kind": "cell" if cell.regime is None else "regime", "regime": cell.regime, "key": folder.name}
    if run_cell(write_job(config, given | facts[cell.arm.name])):
        raise RuntimeError(f"{cell.arm.name} stopped before its end")
    return read_lines(folder / RECORD)[0]


def difference(old: Line, new: Line) -> float | None:
    """New less old bits a byte (of a regime: its score); 0 for the same bits, None where one alone is finite."""
    name = "score" if old["kind"] == "regime" else "bits_per_byte"
    if old[name] is None or new[name] is None:
        return 0.0 if old[name] is new[name] else None
    return float(new[name]) - float(old[name])


def check(study: Study, lines: Sequence[Line], *, among: Sequence[str] = ()) -> int:
    """Train, compare, print a line for each cell; returns the exit status."""
    facts, compared, off = check_arms(study, out=OUT), 0, []
    for cell, old in chosen(study, lines, among=among):
        found = difference(old, again(study, cell, facts, threads=old["threads"]))
        compared += 1
        where = f"{cell.arm.name}{f', {cell.regime}' if cell.regime else ''}, rate {cell.lr:g}, seed {cell.seed}"
        told = "the same bits" if found == 0 else "finite in one alone" if found is None else f"differs by {found:+.3g}"
        print(f"{where}: {told} (record of commit {old['commit']})", flush=True)
        off += [where] if found != 0 else []
    print(f"{compared - len(off)} of {compared} cells as recorded" + (f"; not: {'; '.join(off)}" if off else ""))
    return 2 if not compared else 1 if off else 0


def main() -> int:
    """Read the arguments and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a name in examples/studies")
    parser.add_argument("--arm", action="append", default=[], help="only arms whose name has this (may be repeated)")
    given = parser.parse_args()
    study = load_study(find_study(given.study))
    return check(study, read_lines(DOCS / f"{study.name}.jsonl"), among=given.arm)


if __name__ == "__main__":
    sys.exit(main())
