"""The page of measurements with many processes: figures reach their cells, and the committed page is its records'."""

import math
from xml.etree import ElementTree

import pytest

from benchmarks import many_processes_page as page
from benchmarks import plan_tables
from benchmarks.equal_losses import EXACT, LAYOUTS, TOLERANCE
from benchmarks.plan_check import between
from benchmarks.plan_tables import calibrated, predicted, slowed
from benchmarks.process_figures import line_figure
from benchmarks.process_records import EQUAL, GRADIENTS, NETWORKS, PLANS, SPEED, newest
from benchmarks.sparse_gradients import (
    ADAMW,
    FIRST,
    RATES,
    SGD,
    Cell,
    Study,
    chosen,
    grid,
    next_pairs,
    searching,
    wanted,
)

TOP_K = "top-k 1%, warm-up"
MADE = {"torch": "2.13.0", "cores": 2, "commit": "abc", "load": 1.0, "threads": 1}
ONE = {**MADE, "steps": 2, "held_out": 3.25, "loads_differ_from": None, "dtype": "float32"}
EQUALS = [
    {**ONE, "layout": "1 process", "losses": [4.0, 3.0]},
    {**ONE, "layout": "2 processes", "losses": [4.0, 3.0003], "loads_differ_from": 2},
    {**ONE, "layout": "1 process, float64", "losses": [4.0, 3.1], "dtype": "float64"},
    {**ONE, "layout": "2 processes, float64", "losses": [4.0, 3.1 + 3.1e-12], "dtype": "float64"},
]


def cell(arm, lr, seed, loss, optimizer="sgd", momentum=0.9):
    return {**MADE, "arm": arm, "optimizer": optimizer, "momentum": momentum, "lr": lr, "seed": seed, "loss": loss,
            "steps": 10, "ranks": 2, "sent_bytes": 20_000, "dense_bytes": 1_000_000, "parameters": 25_000}  # fmt: skip


def others(arm, loss, optimizer="sgd"):
    """The ended search of an arm at the momenta below 0.9."""
    return [
        cell(arm.name, rate, 0, loss + abs(rate - FIRST[optimizer][momentum]), optimizer, momentum)
        for momentum in arm.momenta[1:]
        for rate in RATES[optimizer]
    ]


CELLS = [
    *(cell("dense", lr, 0, loss) for lr, loss in ((0.08, 4.2), (0.2, 4.0), (0.5, None), (1.25, 4.4))),
    *(cell("dense", 0.2, seed, 4.0) for seed in (1, 2)),
    *others(SGD[0], 4.1),
    *(cell(TOP_K, lr, 0, loss) for lr, loss in ((0.08, 4.3), (0.2, 4.2), (0.5, 9.0), (0.03, 4.4))),
    *(cell(TOP_K, lr, 0, loss, momentum=0.0) for lr, loss in ((0.5, 4.5), (1.25, 4.03), (3.0, 4.5))),
    *(cell(TOP_K, 1.25, seed, 4.02, momentum=0.0) for seed in (1, 2)),
    *(cell(TOP_K, lr, 0, loss, momentum=0.3) for lr, loss in ((0.2, 4.7), (0.5, 4.6), (1.25, 4.8))),
    *(cell(f"{TOP_K}, no error feedback", lr, 0, loss) for lr, loss in ((0.005, 4.5), (0.0125, 4.6))),
    *others(SGD[3], 5.0),
    cell(TOP_K, 7.0, 0, 1.0),  # no rate of the ladder
    cell("DGC 1%", 0.2, 0, 3.0),  # its search has not ended
    *(cell("dense", lr, 0, loss, "adamw") for lr, loss in ((2.5e-3, 3.6), (6e-3, 3.5), (1.5e-2, 3.9))),
    *others(ADAMW[0], 3.6, "adamw"),
    *(cell("DGC 1%", lr, 0, loss, "adamw") for lr, loss in ((1e-3, 3.7), (2.5e-3, 3.6), (6e-3, 3.6))),
    *others(ADAMW[2], 3.7, "adamw"),
]


def speed(contender, mbit, seconds, payload=0):
    return {**MADE, "contender": contender, "mbit": mbit, "median_s": seconds, "payload": payload, "parameters": 10,
            "tokens": 8, "wire_bytes": 1.02 * payload}  # fmt: skip


# dense: 0.1 s and 8 Mbit a step; sparse: 0.2 s and nothing worth mentioning
WIRES = [
    *(speed("dense", mbit, 0.1 + (8 / mbit if mbit else 0), 1000) for mbit in (None, 160, 20)),
    *(speed("top-k 1%", mbit, 0.2, 20) for mbit in (None, 160, 20)),
]


def test_a_machine_is_what_it_was_before_and_after():
    both = between({"flops": 1.0, "latency": 2.0}, {"flops": 3.0, "latency": 4.0})
    assert both == {"flops": 1.5, "latency": 3.0}


def test_what_takes_no_tokens_is_not_counted_as_compute():
    one = {**MADE, "ranks": 1, "expert_parallel": 1, "shard": "none", "k": 2, "tokens": 2048, "median_s": 0.4,
           "machine": {"flops": 1e11, "read": 1e10}}  # fmt: skip
    two = {**one, "ranks": 2, "median_s": 0.3, "machine": {"flops": 5e10, "read": 1e10, "link": 1e9, "latency": 0.0}}
    bare, given = calibrated([one, two]), calibrated([{**one, "host_s": 0.1}, two])
    assert bare.host == 0.0 and 0.08 < given.host < 0.1 and given.efficiency > 1.2 * bare.efficiency
    for lines in ([one, two], [{**one, "host_s": 0.1}, two]):
        found = calibrated(lines)
        assert predicted(lines[0], slowed(lines[0], lines, found)).step_seconds == pytest.approx(0.4)
        assert slowed(two, lines, found).host == pytest.approx(2 * found.host)


def test_equal_losses_reach_the_page():
    text = page.equal(EQUALS)
    assert "| 1 process | 3.000000 | +0.0e+00 | 0.0e+00 | 3.250000 | never |" in text
    assert "| 2 processes | 3.000300 | +1.0e-04 | 3.0e-04 | 3.250000 | step 2 |" in text
    assert "| 2 processes, float64 | 3.100000 | +1.0e-12 | 3.1e-12 | 3.250000 | never |" in text
    assert page.draw_losses(EQUALS).count("<polyline") == 2


def test_arms_are_taken_at_their_best_momentum_and_rate_once_all_are_tried():
    text = page.gradients(CELLS)
    same = "25,000, 0.02 | 10"
    assert f"| momentum SGD, dense | {same} | 0.9 | 0.2 | 4.0000 ± 0.0000 (3) | +0.00% | 2.0 | 2.00% |" in text
    assert f"| momentum SGD, {TOP_K} | {same} | 0 | 1.25 | 4.0233 ± 0.0058 (3) | +0.58% |" in text
    assert "momentum SGD, DGC" not in text
    assert f"| momentum SGD, {TOP_K}, no error feedback | {same} | 0.9 | 0.005* | 4.5000 (1) | +12.50% |" in text
    assert f"| AdamW, DGC 1% | {same} | 0.9 | 0.0025 | 3.6000 (1) | +2.86% |" in text


def test_each_momentum_has_its_lowest_loss_and_how_many_rates_were_tried():
    text = page.momenta([*CELLS, cell("new", 0.2, 0, 5.0), cell("new", 0.5, 1, 4.0), cell("new", 0.08, 0, None)])
    assert "| nats a token of seed 0 | parameters | steps | momentum 0.9 | momentum 0.3 | momentum 0 |" in text
    best = "4.0000 at 0.2 (3 rates) | 4.1000 at 0.5 (8 rates) | 4.1000 at 1.25 (8 rates)"
    assert f"| momentum SGD, dense | 25,000 | 10 | {best} |" in text
    assert "| momentum SGD, new | 25,000 | 10 | 5.0000 at 0.2 (1 rate) | not run | not run |" in text


def test_memory_is_the_median_of_all_readings_of_a_layout(monkeypatch):
    line = {**MADE, "ranks": 1, "expert_parallel": 1, "shard": "none", "k": 2, "tokens": 2048, "memory": 2e8,
            "machine": {"flops": 1e11, "read": 1e10}}  # fmt: skip
    readings = [{**line, "name": "memory", "memory": held} for held in (1.3e8, 1.5e8, 1.25e8)]
    monkeypatch.setattr(plan_tables, "read", lambda _: [*readings, {**readings[0], "k": 5}, {**line, "name": "host"}])
    row = page.plan_memory([line]).splitlines()[2]
    held = predicted(line, plan_tables.GLOO).memory_total
    told = f"130.0 (125.0 to 150.0, 3) | {held / 1.3e8 - 1:+.0%} | 200.0 | {held / 2e8 - 1:+.0%} | loss |"
    assert row.startswith(f"| 1 process, k = 2 | {held / 1e6:.1f} | {told}")
    monkeypatch.setattr(plan_tables, "read", lambda _: readings[:1])
    assert "| 130.0 (1) |" in page.plan_memory([line])


def test_a_record_without_a_momentum_had_the_usual_one():
    old = [{name: value for name, value in line.items() if name != "momentum"} for line in CELLS[:6]]
    assert page.gradients(old + CELLS[6:]) == page.gradients(CELLS)
    study, arm = Study(10), SGD[0]
    line = {name: value for name, value in Cell(arm, 0.9, 0.2, 0, study).key().items() if name != "momentum"}
    assert [cell.lr for cell in wanted([line | {"loss": 4.0}], study, [arm])] == [0.08, 0.5]


def test_the_verdict_says_what_held():
    text, of = page.verdict(CELLS), "10 steps, 25,000 parameters from deviation 0.02"
    assert f"{TOP_K} within 1% of the dense run under momentum SGD, {of}: **held** (+0.58%)" in text
    assert f"DGC 1% within 1% of the dense run under AdamW, {of}: **did not hold** (+2.86%)" in text
    assert f"{TOP_K} without error feedback is worse in every seed under momentum SGD, {of}: **held**" in text


def test_other_models_and_other_initial_weights_are_apart():
    deep = [{**line, "deviation": 0.0645, "loss": line["loss"] and 0.5 * line["loss"]} for line in CELLS]
    wide = [{**line, "parameters": 9_000} for line in CELLS]
    assert list(page.by_study(CELLS + deep + wide)) == [(10, 9_000, 0.02), (10, 25_000, 0.02), (10, 25_000, 0.0645)]
    text = page.gradients(CELLS + deep)
    assert "| momentum SGD, dense | 25,000, 0.02 | 10 | 0.9 | 0.2 | 4.0000" in text
    assert "| momentum SGD, dense | 25,000, 0.0645 | 10 | 0.9 | 0.2 | 2.0000" in text


def test_a_record_of_other_initial_weights_is_no_record_of_a_cell():
    study = Study(10, 96, 1024)
    line = Cell(SGD[0], 0.9, 0.2, 0, study).key() | {"loss": 4.0}
    old = {name: value for name, value in line.items() if name not in ("width", "deviation")}
    assert [cell.lr for cell in wanted([line], study, [SGD[0]])] == [0.08, 0.5]
    assert [cell.lr for cell in wanted([old], study, [SGD[0]])] == [0.2]
    assert [cell.lr for cell in wanted([line], Study(10, 32, 1024), [SGD[0]])] == [0.2]


def test_a_rate_is_searched_to_both_sides_at_each_momentum_and_the_best_pair_repeated():
    losses = {(0.9, 0.2): 4.0, (0.9, 0.08): 3.9, (0.9, 0.03): 3.8, (0.9, 0.0125): 4.1,
              (0.3, 0.5): 3.7, (0.3, 0.2): 3.75, (0.3, 1.25): None}  # fmt: skip
    study, lines, asked, arm = Study(10), [], [], SGD[2]
    while (cell := next(wanted(lines, study, [arm, ADAMW[0]]), None)) is not None and cell.arm == arm:
        asked.append((cell.momentum, cell.lr, cell.seed))
        lines.append(cell.key() | {"loss": losses[cell.momentum, cell.lr]})
    assert asked == [*((*pair, 0) for pair in losses), (0.3, 0.5, 1), (0.3, 0.5, 2)]
    assert cell == Cell(ADAMW[0], 0.9, 6e-3, 0, study) and cell in grid(study)


def test_a_search_that_finds_no_finite_loss_ends():
    study, arm = Study(10), SGD[2]
    bottom = {(momentum, lr): None for momentum in arm.momenta for lr in (min(RATES["sgd"]), 0.0125)}
    assert next_pairs(bottom, arm) == []
    assert not list(wanted([Cell(arm, *pair, 0, study).key() | {"loss": None} for pair in bottom], study, [arm]))


def test_a_search_of_some_momenta_asks_for_no_others():
    arm = searching(SGD[2], [0.3, 0.0])
    assert arm.momenta == (0.3,) and searching(SGD[2], [0.0]) == SGD[2]
    assert next_pairs({}, arm) == [(0.3, 0.5)]
    assert Cell(arm, 0.3, 0.5, 0, Study(10)) in grid(Study(10), [arm])


def test_arms_are_chosen_by_name_an_optimiser_at_a_time():
    assert chosen(["adamw", "sgd"], ["DGC 1%", "dense"]) == [ADAMW[2], ADAMW[0], SGD[2], SGD[0]]
    assert {arm.optimizer for arm in chosen(["sgd"], None)} == {"sgd"}


def test_the_bandwidth_at_which_both_take_as_long():
    found = page.bandwidths(WIRES)
    assert page.break_even(found["dense"], found["top-k 1%"]) == pytest.approx(80)
    assert page.break_even(found["top-k 1%"], found["dense"]) is None
    assert "| top-k 1% | 200 | 200 | 200 | 80 |" in page.networks(WIRES)
    assert "| dense | 1,000 | 1,020 | +2.00% |" in page.wire(WIRES)


def test_figures_are_xml_with_a_line_for_each_name():
    tags = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(page.draw_networks(WIRES)).iter()]
    assert tags.count("polyline") == 2 and tags.count("circle") == 2 * 2 + 2
    with pytest.raises(ValueError, match="lines must hold at least one point"):
        line_figure({}, title="", across="")
    with pytest.raises(ValueError, match="points must be positive"):
        line_figure({"a": [(1.0, 0.0)]}, title="", across="")


def test_markers_without_a_table_are_refused():
    assert "*No record yet.*" in page.fill("<!-- table: equal -->\nstale\n<!-- end -->", {})
    with pytest.raises(ValueError, match="table must be one of"):
        page.fill("<!-- table: nonsense -->\n<!-- end -->", {})


def test_the_page_is_what_its_records_say():
    text, found = page.PAGE.read_text(), page.records()
    assert all(f"<!-- table: {name} -->" in text for name in page.TABLES)
    assert page.fill(text, found) == text, "run python -m benchmarks.many_processes_page"
    assert page.FIGURES["losses"].read_text() == page.draw_losses(found[EQUAL])
    assert page.FIGURES["networks"].read_text() == page.draw_networks(found[NETWORKS])
    assert all(found[path] for path in (EQUAL, GRADIENTS, NETWORKS, PLANS, SPEED))


def test_one_process_equals_many_over_300_steps():
    """In float64 in every step; in float32 as long as tokens go to the same experts, and then nearly in the last."""
    found = {line["layout"]: line for line in newest(page.records()[EQUAL], "layout")}
    assert {layout.name for layout in LAYOUTS} == set(found)
    for line in found.values():
        base, gaps = page.reference(line, found)["losses"], page.gaps(line, found)
        assert len(base) == len(gaps) == 300 and all(map(math.isfinite, line["losses"]))
        if line["dtype"] == "float64":
            assert line["loads_differ_from"] is None and max(gaps) < EXACT * min(base)
        else:
            assert max(gaps[: (line["loads_differ_from"] or 301) - 1]) < 1e-5
            assert gaps[-1] < TOLERANCE * base[-1]


def test_the_plan_counts_the_bytes_that_are_sent():
    """Exactly, but for rows to experts, whose number the router decides."""
    from benchmarks.plan_tables import GLOO, KINDS, rows_of

    for line in rows_of(page.records()[PLANS]):
        wanted = predicted(line, GLOO).sent
        for kind in KINDS[:3]:
            assert line["sent"][kind] == wanted[kind], (line["ranks"], line["expert_parallel"], line["shard"], kind)
