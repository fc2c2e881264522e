"""The page of the real-time study, its table, figure and verdict made from its records.

    python -m benchmarks.bench_structures && python -m benchmarks.real_time_page --collect

``--collect`` first copies ``runs/real-time.jsonl`` beside the page; without it the page is made again from the records
that are there.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.probes.chart import mean_points
from training.probes.summary import mean_spread, table
from training.records import read_lines
from training.study.panels import Panel, Point, panels_svg

ROOT = Path(__file__).resolve().parents[1]
NEW = ROOT / "runs" / "real-time.jsonl"
RECORDS = ROOT / "docs" / "studies" / "real-time.jsonl"
PAGE, FIGURE = RECORDS.with_suffix(".md"), RECORDS.with_suffix(".svg")
STRUCTURES = {
    "CSR": "zeros anywhere (CSR)",
    "2:4": "2:4, through CSR",
    "blocks": "blocks of 32 × 32",
    "neurons": "neurons",
    "heads": "heads",
    "experts": "experts",
    "layers": "layers",
    "width": "width",
}
Line = dict[str, Any]


def page_text(lines: Sequence[Line]) -> str:
    """Question, verdict, figure, table, conditions."""
    sizes = sorted({tokens(line) for line in lines})
    parts = [
        "# What share of the FLOPs saved becomes time, for each structure?",
        "Expected beforehand: all of it for layers, most of it for neurons, heads and width, less for experts, which "
        "are chosen token by token; of zeros that stay where they are, something only at high sparsity or few tokens, "
        "and nothing for 2:4, for which this processor has no instruction.",
        "## Verdict\n\n" + "\n".join(f"- {sentence}" for size in sizes for sentence in verdict(lines, size)),
        "The share is (1 − time / dense time) ÷ (1 − FLOPs / dense FLOPs): 100% where time falls as the FLOPs do, "
        "below 0 where time is lost. ± is one sample standard deviation over seeds, each with weights and removals of "
        "its own.",
        "![Time saved against FLOPs saved, by structure](real-time.svg)",
        "## Numbers\n\n" + "\n\n".join(f"### {heading(size)}\n\n{numbers(lines, size)}" for size in sizes),
        "## Conditions\n\n" + "\n".join(f"- {line}" for line in conditions(lines)),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def verdict(lines: Sequence[Line], size: int) -> list[str]:
    """Each structure at the level where it saves most FLOPs: in order of its share, and what lost time."""
    groups = {name: levels(lines, size, name) for name in STRUCTURES}
    most = {name: max(found.values(), key=saved) for name, found in groups.items() if found}
    ranked = sorted(most, key=lambda name: -statistics.fmean(shares(most[name])))
    listed = ", ".join(
        f"{STRUCTURES[name]} {percent(shares(most[name]))} of {saved(most[name]):.0%} saved" for name in ranked
    )
    lost = [
        f"{STRUCTURES[name]} at {level}"
        for name, found in groups.items()
        for level, rows in found.items()
        if max(shares(rows)) < 0
    ]
    return [
        f"**{heading(size)}.** Share of the saved FLOPs that becomes time, at the highest level of each: {listed}.",
        f"{heading(size)}: slower than dense with every seed: {', '.join(lost) or 'none'}.",
    ]  # fmt: skip


def numbers(lines: Sequence[Line], size: int) -> str:
    """A row for each structure and level."""
    rows = []
    for name, label in STRUCTURES.items():
        for level, found in levels(lines, size, name).items():
            times = [line["ratios"]["dense"] for line in found]
            median = statistics.fmean(line["median_s"] for line in found)
            rows.append([label, level, f"{saved(found):.1%}", mean_spread(times, ".3f"), percent(shares(found)),
                         f"{median * 1e3:.2f}"])  # fmt: skip
    dense = [line["median_s"] * 1e3 for line in lines if line["name"] == "dense" and tokens(line) == size]
    rows.append(["dense", "", "0.0%", "1", "", f"{statistics.fmean(dense):.2f}"])
    head = ["Structure", "Level", "FLOPs saved", "Time ÷ dense", "Share that becomes time", "Median (ms)"]
    return table(head, rows)


def draw(lines: Sequence[Line]) -> str:
    """Time saved against FLOPs saved, a panel for each number of tokens."""
    panels = []
    for size in sorted({tokens(line) for line in lines}):
        curves = {"all of it": [Point(0.0, 0.0), Point(100.0, 100.0)]}
        for name, label in STRUCTURES.items():
            found = [line for rows in levels(lines, size, name).values() for line in rows]
            # nothing is drawn lower: a loss of time beyond the dense time itself is for the table
            runs = [[(100 * line["conditions"]["flops_saved"], max(100 * (1 - line["ratios"]["dense"]), -100.0))]
                    for line in found]  # fmt: skip
            if found:
                curves[label] = [Point(0.0, 0.0), *mean_points(runs)]
        panels.append(Panel(f"{heading(size)}: time saved (%)", "FLOPs saved (%)", curves))
    return panels_svg(panels, title="Time saved against FLOPs saved, by structure")


def conditions(lines: Sequence[Line]) -> list[str]:
    """Where the records were made."""
    one = lines[0]["conditions"]
    loads = [line["load"] for line in lines]
    places = {name: ", ".join(sorted({str(line[name]) for line in lines})) for name in
              ("device", "threads", "torch", "commit", "command")}  # fmt: skip
    return [
        f"Command: `python {places['command']}`; {len(lines)} records; a round runs every contender once, dense "
        "included, and starts with another one each time; time ÷ dense is the median over rounds of the ratio within a "
        "round.",
        f"Width {one['D']}, {one['layers']} layers, {one['hidden']} neurons, {one['dtype']}; the whole forward pass, "
        "attention, norms and head included, in which no weight of the head is removed.",
        f"{places['device']}, {places['threads']} threads, torch {places['torch']}, commit {places['commit']}"
        + (" (+: a tree with changes that were not committed)." if "+" in places["commit"] else "."),
        f"Load of the machine: {min(loads):.1f} to {max(loads):.1f}, the processes that ran or waited to, a mean over "
        f"the last minute with this command's own {places['threads']} threads in it. What else ran is not in the "
        "records: nothing says that the machine was quiet.",
        "Before it is timed each contender's logits are compared with an oracle's: the worst relative error is "
        f"{max(float(line['parity'].split()[1]) for line in lines if line['parity'].startswith('pass')):.0e}.",
    ]  # fmt: skip


def levels(lines: Sequence[Line], size: int, structure: str) -> dict[str, list[Line]]:
    """Level → its records, one a seed, the newest of each."""
    newest: dict[tuple[str, int], Line] = {}
    for line in lines:
        about = line["conditions"]
        if about.get("structure") == structure and tokens(line) == size:
            newest[about["level"], about["seed"]] = line
    found: dict[str, list[Line]] = {}
    for (level, _), line in newest.items():
        found.setdefault(level, []).append(line)
    return found


def tokens(line: Line) -> int:
    """Tokens of the forward pass."""
    return int(line["conditions"]["B"] * line["conditions"]["L"])


def saved(rows: Sequence[Line]) -> float:
    """Share of the dense FLOPs that is saved."""
    return statistics.fmean(line["conditions"]["flops_saved"] for line in rows)


def shares(rows: Sequence[Line]) -> list[float]:
    """Share of the saved FLOPs that became time, a seed each."""
    return [line["conditions"]["share_in_time"] for line in rows]


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation in percent."""
    return mean_spread([100 * value for value in values], ".0f") + "%"


def heading(size: int) -> str:
    """The name of a number of tokens."""
    return "One token" if size == 1 else f"{size:,} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", action="store_true")
    if parser.parse_args().collect:
        shutil.copyfile(NEW, RECORDS)
    lines = read_lines(RECORDS)
    PAGE.write_text(page_text(lines), encoding="utf-8")
    FIGURE.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
