"""The plan's predictions beside what benchmarks/plan_check measured, as tables."""

import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.plan_check import VOCABULARY, run_config
from benchmarks.plan_pieces import PIECES
from benchmarks.process_records import newest
from benchmarks.readme_tables import Line, read, table
from training.planning import Assumptions, Cluster, Hardware, Mesh, ModelCounts, Prediction, count_model, predict

GLOO = Assumptions(gloo=True)
KINDS = ("gradients", "weights", "expert gradients", "all-to-all")
# what the plan tells apart and the records do not
PARTS = {"all-to-all": ("dispatch", "combine")}
MOVING = ("dispatch", "combine", "expert gradients", "exposed", "agreements")


def rows_of(lines: list[Line]) -> list[Line]:
    """The newest record of each layout."""
    return newest(lines, "ranks", "expert_parallel", "shard", "k")


def counts_of(line: Line) -> ModelCounts:
    """The counts of the model that was measured."""
    return count_model(run_config(Path(), k=line["k"]), vocab_size=VOCABULARY)


def cluster_of(line: Line) -> Cluster:
    """This machine as one node: what each of the processes measured of it while all of them did."""
    found = line["machine"]
    link = found.get("link", 1e9)
    here = Hardware("here", 1e12, found["flops"], found["flops"], found["read"], link)
    latency = found.get("latency", 0.0)
    return Cluster(here, line["ranks"], per_node=line["ranks"], network=link, latency=latency, near=latency)


def calibrated(lines: list[Line]) -> Assumptions:
    """Efficiency such that the step of one process takes as long as it took, beside what it takes without tokens;
    nothing hidden, as the cores that send are those that compute; memory at the rate that a copy reached."""
    one = next(line for line in rows_of(lines) if line["ranks"] == 1)
    full = replace(GLOO, efficiency=1.0, overlap=0.0, read_efficiency=1.0)
    seconds = predicted(one, full).seconds
    # a step without tokens has an optimiser too; records of before that was measured have none
    host = max(0.0, (one.get("host_s") or 0.0) - seconds["optimiser"])
    reached = (seconds["forward"] + seconds["backward"]) / (one["median_s"] - seconds["optimiser"] - host)
    return replace(full, efficiency=reached, host=host)


def slowed(line: Line, lines: list[Line], given: Assumptions) -> Assumptions:
    """What takes no tokens, for a process that does ``machine.flops`` of its own: cores that are shared slow it too."""
    one = next(line for line in rows_of(lines) if line["ranks"] == 1)
    slower = one["machine"]["flops"] / line["machine"]["flops"]
    sharded, spread = (slower * host_of(*way) for way in ((1, "fsdp"), (2, "none")))
    return replace(given, host=given.host * slower, host_sharded=sharded, host_spread=spread)


def host_of(experts: int, shard: str) -> float:
    """Seconds that a layer takes longer than a replicated one when it computes next to nothing, its messages apart:
    of FSDP2 two gathers, and a reduction by gloo, of one step each between 2 ranks; of spread experts eight."""
    found = {(p["expert_parallel"], p["shard"]): p for p in read(PIECES) if p["name"] == "host"}
    if (experts, shard) not in found or (1, "none") not in found:
        return 0.0
    line, messages = found[experts, shard], 4 if shard == "fsdp" else 8
    return max(0.0, line["layer_s"] - found[1, "none"]["layer_s"] - messages * line["latency"])


def predicted(line: Line, given: Assumptions) -> Prediction:
    """The plan for a measured layout."""
    mesh = Mesh(line["expert_parallel"], line["shard"])
    return predict(counts_of(line), cluster_of(line), mesh, tokens=line["tokens"], half=False, assumptions=given)


def layout(line: Line) -> str:
    """How a run was spread, in words."""
    experts = f", experts over {line['expert_parallel']}" if line["expert_parallel"] > 1 else ""
    shard = ", FSDP2" if line["shard"] == "fsdp" else ""
    return f"{line['ranks']} process{'es' if line['ranks'] > 1 else ''}{experts}{shard}, k = {line['k']}"


def plan_bytes(lines: list[Line]) -> str:
    """Bytes that a rank sends in a step by collective: predicted, counted, and the error."""
    cells = []
    for line in rows_of(lines):
        plan = predicted(line, GLOO)
        for kind in KINDS:
            want, have = sum(plan.sent[part] for part in PARTS.get(kind, (kind,))), line["sent"][kind]
            if want or have:
                error = "exact" if want == have else f"{want / have - 1:+.2%}" if have else "not sent"
                cells.append([layout(line), kind, f"{want:,.0f}", f"{have:,.0f}", error])
    return table(["", "collective", "predicted bytes", "counted bytes", "error"], cells)


def memories_of(line: Line) -> list[float]:
    """Bytes of a layout that plan_pieces measured, every reading."""
    keys = ("ranks", "expert_parallel", "shard", "k")
    return [p["memory"] for p in read(PIECES) if p["name"] == "memory" and all(p[key] == line[key] for key in keys)]


def plan_memory(lines: list[Line]) -> str:
    """Memory of a rank: predicted by what holds it, and measured, the median over the readings of a layout; with
    glibc's heap its newest one, as plan_check measured otherwise before."""
    cells = []
    for line in rows_of(lines):
        plan, readings = predicted(line, GLOO), memories_of(line)
        parts = ", ".join(f"{name} {held / 1e6:.1f}" for name, held in plan.memory.items() if held)
        cells.append(
            [
                layout(line),
                f"{plan.memory_total / 1e6:.1f}",
                *([_spread(readings), _error(plan, statistics.median(readings))] if readings else ["not yet", ""]),
                f"{line['memory'] / 1e6:.1f}",
                _error(plan, line["memory"]),
                plan.moment,
                parts,
            ]
        )
    head = ["MB a rank", "predicted", "measured, median (range, readings)", "error"]
    return table([*head, "with glibc's heap and the text", "error", "most at", "predicted parts"], cells)


def _spread(readings: list[float]) -> str:
    middle, low, high = (f"{f(readings) / 1e6:.1f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high}, {len(readings)})" if len(readings) > 1 else f"{middle} (1)"


def _error(plan: Prediction, have: float) -> str:
    return f"{plan.memory_total / have - 1:+.0%}"


def plan_time(lines: list[Line]) -> str:
    """Time of a step: predicted and measured."""
    given = calibrated(lines)
    cells = []
    for line in rows_of(lines):
        plan = predicted(line, slowed(line, lines, given))
        moving = sum(plan.seconds[part] for part in MOVING)
        cells.append(
            [
                layout(line),
                f"{1e3 * plan.step_seconds:,.0f}",
                f"{1e3 * line['median_s']:,.0f}",
                f"{plan.step_seconds / line['median_s'] - 1:+.0%}",
                f"{1e3 * moving:,.0f}",
                f"{line['machine']['flops'] / 1e9:.0f}",
            ]
        )
    head = ["ms a step", "predicted", "measured", "error", "of which exchanges", "measured GFLOP/s a process"]
    return f"{table(head, cells)}\n\nEfficiency {given.efficiency:.2f}, from the first row."
