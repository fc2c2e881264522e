"""The tables and figures of "Many processes, measured", made from records and never typed.

``python -m benchmarks.many_processes_page`` fills the page from the committed records of benchmarks/equal_losses,
sparse_gradients, slow_networks, bench_expert_parallel and plan_check.
"""

import itertools
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.plan_tables import plan_bytes, plan_memory, plan_time
from benchmarks.process_figures import line_figure
from benchmarks.process_records import EQUAL, GRADIENTS, NETWORKS, PLANS, SPEED, newest
from benchmarks.readme_tables import ROOT, Line, read, table
from benchmarks.sparse_gradients import ARMS, RATES, best_of, next_pairs, searching

PAGE = ROOT / "docs" / "guides" / "many-processes-measured.md"
FIGURES = {"losses": PAGE.with_name("equal-losses.svg"), "networks": PAGE.with_name("slow-networks.svg")}
REFERENCE = "1 process"
OPTIMIZERS = {"sgd": "momentum SGD", "adamw": "AdamW"}
WITHIN = 0.01
TIMED = ("expert_parallel", "wire", "moe", "floor")


def made(lines: list[Line]) -> str:
    """The sentence under a table: where its records were made."""
    torches = ", ".join(sorted({line["torch"] for line in lines}))
    cores = ", ".join(sorted({str(line["cores"]) for line in lines}))
    commits = list(dict.fromkeys(f"`{line['commit']}`" for line in lines))
    named = " to ".join((commits[0], commits[-1])) if len(commits) > 1 else commits[0]
    loads = [line["load"] for line in lines]
    return f"Torch {torches}, {cores} cores, commit {named}; load of the machine {min(loads):.1f} to {max(loads):.1f}."


def equal(lines: list[Line]) -> str:
    """Final losses of the layouts, and their largest difference from one process of the same type of numbers."""
    found = {line["layout"]: line for line in newest(lines, "layout")}
    cells = []
    for name, line in found.items():
        base = reference(line, found)
        step = line["loads_differ_from"]
        cells.append(
            [
                name,
                f"{line['losses'][-1]:.6f}",
                f"{line['losses'][-1] / base['losses'][-1] - 1:+.1e}",
                f"{max(gaps(line, found)):.1e}",
                f"{line['held_out']:.6f}",
                "never" if step is None else f"step {step}",
            ]
        )
    head = ["", "loss of the last step", "against 1 process", "largest gap of any step", "held-out loss",
            "other experts chosen from"]  # fmt: skip
    return f"{table(head, cells)}\n\n{found[REFERENCE]['steps']} steps. {made(list(found.values()))}"


def reference(line: Line, found: dict[str, Line]) -> Line:
    """The run of one process in the same type of numbers."""
    return found[REFERENCE if line["dtype"] == "float32" else f"{REFERENCE}, {line['dtype']}"]


def gaps(line: Line, found: dict[str, Line]) -> list[float]:
    """How far the loss of each step lies from that of one process."""
    return [abs(a - b) for a, b in zip(line["losses"], reference(line, found)["losses"], strict=True)]


def arms(lines: list[Line], optimizer: str) -> dict[str, list[Line]]:
    """The records of each arm at its best momentum and rate, by seed, in the study's order; only arms whose search has
    ended at every momentum that was tried."""
    # records without a momentum had 0.9
    mine = newest(
        [{"momentum": 0.9} | line for line in lines if line["optimizer"] == optimizer], "arm", "momentum", "lr", "seed"
    )
    found = {}
    for arm in (arm for arm in ARMS if arm.optimizer == optimizer):
        several = [line for line in mine if line["arm"] == arm.name and line["lr"] in RATES[optimizer]]
        losses = {_pair(line): line["loss"] for line in several if line["seed"] == 0}
        arm = searching(arm, [momentum for momentum, _ in losses])
        losses = {pair: loss for pair, loss in losses.items() if pair[0] in arm.momenta}
        if losses and not next_pairs(losses, arm) and losses[best_of(losses)] is not None:
            best = best_of(losses)
            found[arm.name] = [line for line in several if _pair(line) == best and line["loss"] is not None]
    return found


def _pair(line: Line) -> tuple[float, float]:
    return line["momentum"], line["lr"]


def by_study(lines: list[Line]) -> dict[tuple[int, int, float], list[Line]]:
    """The records of each (steps, parameters, deviation of the initial weights, 0.02 where none is told), shortest
    first: other models and other initial weights are not compared with each other."""
    found: dict[tuple[int, int, float], list[Line]] = {}
    for line in lines:
        found.setdefault((line["steps"], line["parameters"], line.get("deviation", 0.02)), []).append(line)
    return dict(sorted(found.items()))


def edge(optimizer: str, rate: float) -> str:
    """A mark where the best rate is the sweep's lowest or highest."""
    return "*" if rate in (min(RATES[optimizer]), max(RATES[optimizer])) else ""


def gradients(lines: list[Line]) -> str:
    """Held-out loss of each arm at its best momentum and rate, against the dense one of its optimiser, and bytes."""
    cells = [
        [f"{label}, {arm}", *_arm(several, dense)]
        for same in by_study(lines).values()
        for optimizer, label in OPTIMIZERS.items()
        if "dense" in (found := arms(same, optimizer))
        for dense in [statistics.fmean(line["loss"] for line in found["dense"])]
        for arm, several in found.items()
    ]
    head = ["", "parameters, initial deviation", "steps", "momentum", "learning rate", "held-out nats a token (seeds)",
            "against dense", "kB a step and rank", "of dense"]  # fmt: skip
    facts = f"{lines[0]['ranks']} processes."
    return f"{table(head, cells)}\n\n\\* the lowest or highest rate tried. {facts} {made(lines)}"


def _arm(several: list[Line], dense: float) -> list[str]:
    losses, one = [line["loss"] for line in several], several[0]
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return [
        f"{one['parameters']:,}, {one.get('deviation', 0.02):.3g}",
        f"{one['steps']:,}",
        f"{one['momentum']:g}",
        f"{one['lr']:g}{edge(one['optimizer'], one['lr'])}",
        f"{statistics.fmean(losses):.4f}{spread} ({len(losses)})",
        f"{statistics.fmean(losses) / dense - 1:+.2%}",
        f"{one['sent_bytes'] / one['steps'] / 1e3:,.1f}",
        f"{one['sent_bytes'] / one['dense_bytes']:.2%}",
    ]


def momenta(lines: list[Line]) -> str:
    """The lowest held-out loss of seed 0 at each momentum, its rate, and how many rates were tried there."""
    tried = sorted({line.get("momentum", 0.9) for line in lines}, reverse=True)
    cells = []
    for same in by_study(lines).values():
        for optimizer, label in OPTIMIZERS.items():
            if "dense" not in arms(same, optimizer):
                continue
            for arm in dict.fromkeys(line["arm"] for line in same if line["optimizer"] == optimizer):
                mine = [line for line in same if line["optimizer"] == optimizer and line["arm"] == arm]
                at = (_lowest([line for line in mine if line.get("momentum", 0.9) == m]) for m in tried)
                cells.append([f"{label}, {arm}", f"{mine[0]['parameters']:,}", f"{mine[0]['steps']:,}", *at])
    head = ["nats a token of seed 0", "parameters", "steps", *(f"momentum {m:g}" for m in tried)]
    return table(head, cells)


def _lowest(several: list[Line]) -> str:
    rates = {line["lr"]: line["loss"] for line in several if line["seed"] == 0 and line["loss"] is not None}
    if not rates:
        return "not run"
    best = min(rates, key=lambda rate: rates[rate])
    return f"{rates[best]:.4f} at {best:g} ({len(rates)} rate{'s' if len(rates) > 1 else ''})"


def verdict(lines: list[Line]) -> str:
    """Whether what was asked for held: top-k and DGC at 1% within 1% of dense, and error feedback of use."""
    told = []
    for (steps, parameters, deviation), same in by_study(lines).items():
        for optimizer, label in OPTIMIZERS.items():
            found = {arm: [line["loss"] for line in several] for arm, several in arms(same, optimizer).items()}
            if "dense" in found:
                where = f"under {label}, {steps:,} steps, {parameters:,} parameters from deviation {deviation:.3g}"
                told += _verdicts(found, where)
    return "\n".join(told)


def _verdicts(found: dict[str, list[float]], where: str) -> list[str]:
    told = []
    for arm in ("top-k 1%, warm-up", "DGC 1%"):
        if arm in found:
            gap = statistics.fmean(found[arm]) / statistics.fmean(found["dense"]) - 1
            held = "held" if gap <= WITHIN else "did not hold"
            told.append(f"- {arm} within {WITHIN:.0%} of the dense run {where}: **{held}** ({gap:+.2%}).")
    arm = "top-k 1%, warm-up"
    bare, remembered = found.get(f"{arm}, no error feedback"), found.get(arm)
    if bare and remembered:
        worse = statistics.fmean(bare) / statistics.fmean(remembered) - 1
        held = "held" if min(bare) > max(remembered) else "did not hold"
        told.append(
            f"- {arm} without error feedback is worse in every seed {where}: **{held}** ({worse:+.2%} in the mean)."
        )
    return told


def bandwidths(lines: list[Line]) -> dict[str, dict[float | None, Line]]:
    """The newest record of each contender at each limit."""
    found: dict[str, dict[float | None, Line]] = {}
    for line in newest(lines, "contender", "mbit"):
        found.setdefault(line["contender"], {})[line["mbit"]] = line
    return found


def break_even(dense: dict[float | None, Line], sparse: dict[float | None, Line]) -> float | None:
    """The Mbit/s at which both take as long, between measured limits linearly in 1/bandwidth, as sending takes; None
    where there is no such bandwidth among those measured."""
    places = sorted((0.0 if mbit is None else 1 / mbit, mbit) for mbit in dense if mbit in sparse)
    gaps = [(at, dense[mbit]["median_s"] - sparse[mbit]["median_s"]) for at, mbit in places]
    for (low, before), (high, after) in itertools.pairwise(gaps):
        if before < 0 <= after:
            return 1 / (low + (high - low) * -before / (after - before))
    return None


def networks(lines: list[Line]) -> str:
    """Milliseconds of a step at each bandwidth."""
    found = bandwidths(lines)
    limits = sorted({mbit for one in found.values() for mbit in one if mbit is not None})
    cells = []
    for name, one in found.items():
        times = [f"{1e3 * one[mbit]['median_s']:,.0f}" if mbit in one else "" for mbit in [*limits, None]]
        even = None if name in ("alone", "dense") else break_even(found["dense"], one)
        faster = "" if name in ("alone", "dense") else ("none measured" if even is None else f"{even:,.0f}")
        label = "no exchange" if name == "alone" else name
        cells.append([label, *times, faster])
    head = ["ms a step at Mbit/s", *(f"{mbit:,}" for mbit in limits), "no limit", "faster than dense below, Mbit/s"]
    first = found["dense"][None]
    facts = f"{first['parameters']:,} parameters, {first['tokens']} tokens a process and step, 1 thread each."
    return f"{table(head, cells)}\n\n{facts} {made(lines)}"


def wire(lines: list[Line]) -> str:
    """What the interface counted against what the hook says."""
    cells = []
    for name, one in bandwidths(lines).items():
        if name != "alone":
            line = one[max((mbit for mbit in one if mbit is not None), default=None)]
            over = line["wire_bytes"] / line["payload"] - 1
            cells.append([name, f"{line['payload']:,}", f"{line['wire_bytes']:,.0f}", f"{over:+.2%}"])
    return table(["bytes a step and rank", "counted", "on the wire", "headers and acknowledgements"], cells)


def draw_networks(lines: list[Line]) -> str:
    """Seconds of a step over bandwidth."""
    found = bandwidths(lines)
    points = {
        "no exchange" if name == "alone" else name: [
            (float(mbit), one[mbit]["median_s"]) for mbit in sorted(mbit for mbit in one if mbit is not None)
        ]
        for name, one in found.items()
    }
    return line_figure(points, title="seconds of a training step", across="Mbit/s between two processes", log_x=True)


def draw_losses(lines: list[Line]) -> str:
    """The gap between the losses of each layout and of one process, step by step; in float64 the largest of all."""
    found = {line["layout"]: line for line in newest(lines, "layout")}
    apart = {name: gaps(line, found) for name, line in found.items() if reference(line, found) is not line}
    shown = {name: gap for name, gap in apart.items() if found[name]["dtype"] == "float32"}
    wide = [gap for name, gap in apart.items() if found[name]["dtype"] == "float64"]
    if wide:
        shown["any of these in float64"] = [max(step) for step in zip(*wide, strict=True)]
    points = {name: [(step, max(gap, 1e-17)) for step, gap in enumerate(one, 1)] for name, one in shown.items()}
    return line_figure(points, title="gap to the loss of one process, nats", across="step", dots=False)


def layer(lines: list[Line]) -> str:
    """The share of a layer that is neither router nor experts."""
    rows = newest([line for line in lines if line["name"] == "layer"], "tokens", "dim", "hidden", "experts", "k")
    cells = [
        [
            f"{line['tokens']} × {line['dim']}, {line['experts']} experts of {line['hidden']}, {line['k']} a token",
            *(milliseconds(line["seconds"].get(name)) for name in TIMED),
            f"{line['share']:.1%} ± {line['share_iqr'] / 2:.1%}",
            "yes" if line["share"] <= line["goal"] else "no",
        ]
        for line in rows
    ]
    head = ["ms, forward and backward", "expert parallel", "copies for the wire, taken off", "one process",
            "router and experts alone", "dispatch and combine", "at most 10%"]  # fmt: skip
    return f"{table(head, cells)}\n\n{made(rows)}"


def milliseconds(seconds: list[float] | None) -> str:
    """Their median; older records have no copies apart."""
    return "not apart" if seconds is None else f"{1e3 * statistics.median(seconds):.1f}"


def step(lines: list[Line]) -> str:
    """Two processes against two threads."""
    rows = newest([line for line in lines if line["name"] == "step"], "T", "D", "layers")
    cells = [
        [
            f"{line['layers']} layers of width {line['D']}, {line['E']} experts of {line['F']}, {line['T']} tokens",
            *(f"{1e3 * statistics.median(line['seconds'][name]):.0f}" for name in ("two_threads", "two_processes")),
            f"{line['ratio']:.2f}",
            "yes" if line["ratio"] <= line["goal"] else "no",
        ]
        for line in rows
    ]
    head = ["ms a step", "1 process, 2 threads", "2 processes, 1 thread each", "ratio", "at most 1.25"]
    return f"{table(head, cells)}\n\n{made(rows)}"


TABLES: dict[str, tuple[Path, Callable[[list[Line]], str]]] = {
    "equal": (EQUAL, equal),
    "gradients": (GRADIENTS, gradients),
    "momenta": (GRADIENTS, momenta),
    "verdict": (GRADIENTS, verdict),
    "networks": (NETWORKS, networks),
    "wire": (NETWORKS, wire),
    "layer": (SPEED, layer),
    "step": (SPEED, step),
    "plan_bytes": (PLANS, plan_bytes),
    "plan_memory": (PLANS, plan_memory),
    "plan_time": (PLANS, plan_time),
}


def fill(text: str, found: dict[Path, list[Line]]) -> str:
    """The page with every table made anew. Raises: ValueError for a marker without a table."""

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table must be one of {sorted(TABLES)}, got {name!r}")
        source, body = TABLES[name]
        lines = found.get(source, [])
        return f"<!-- table: {name} -->\n{body(lines) if lines else '*No record yet.*'}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def records() -> dict[Path, list[Line]]:
    """The committed records by file."""
    return {path: read(path) for path in (EQUAL, GRADIENTS, NETWORKS, PLANS, SPEED)}


def main() -> None:
    """Write the page and its figures."""
    found = records()
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for name, drawn in {"losses": (EQUAL, draw_losses), "networks": (NETWORKS, draw_networks)}.items():
        source, draw = drawn
        if found[source]:
            FIGURES[name].write_text(draw(found[source]), encoding="utf-8")


if __name__ == "__main__":
    main()
