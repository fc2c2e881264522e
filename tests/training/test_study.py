"""Studies at toy size: cells in processes of their own, kill and resume, equal FLOPs, and the page from the records."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.training.toy_study import MIXTURE_AND_TWIN
from training.study import load_study, page_text, pool, run_study, write_page
from training.study import runner as runner_module
from training.study import speed as speed_module
from training.study.cell import STOPPED, run_cell, write_job
from training.study.records import append_record, open_records
from training.study.runner import check_arms, require_equal_flops
from training.study.spec import Cell, cell_key, declared, find_study, run_config, seed_cells, sweep_cells
from training.study.summary import best_rates, compare, missing, results
from training.study.widening import rate_beyond

ROOT = Path(__file__).resolve().parents[2]
# what is no probe (training.probes): a grid of arms
STUDIES = [path for path in sorted((ROOT / "examples" / "studies").glob("*.toml")) if "[[arm]]" in path.read_text()]
RECORDS = [ROOT / "docs" / "studies" / f"{path.stem}.jsonl" for path in STUDIES]
STEPS = 4
PATIENCE = 400  # seconds: against a hang, and enough where the machine has a tenth of a core to give


@pytest.fixture
def toy(tmp_path):
    """toy(extra="", arm="", steps=STEPS) → a study on thirty short texts; one: one rate, one seed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"line {number} of text\n" * 8)

    def make(*, extra="", arm="", steps=STEPS, one=False):
        path = tmp_path / "toy.toml"
        text = MIXTURE_AND_TWIN.format(corpus=texts, extra=extra, arm=arm, steps=steps)
        path.write_text(text.replace("1e-3, 1e-2", "1e-3").replace("0, 1]", "0]") if one else text)
        return load_study(path)

    return make


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells one after another here: a process of its own takes seconds to start."""

    def completed(jobs, *, at_once, threads):
        for job in jobs:
            assert run_cell(job) == 0
            yield job.parent

    monkeypatch.setattr(runner_module, "completed", completed)


FACTS = {"parameters": 2, "active_parameters": 1, "prunable_weights": 1, "prunable_flops": 0.5, "shares": {},
         "flops_per_token": 1.0}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(speed_module, "WARM_UP", 0)
    monkeypatch.setattr(speed_module, "ROUNDS", 2)


def test_a_study_runs_every_cell_once_and_nothing_the_second_time(toy, tmp_path, in_this_process):
    study, records = toy(), tmp_path / "records.jsonl"
    lines = run_study(study, out=tmp_path / "out", records=records)
    cells = [line for line in lines if line["kind"] == "cell"]
    # two arms, two rates with the first seed, and the second seed at each arm's best rate
    assert len(cells) == 6 and len({line["key"] for line in cells}) == 6
    assert [line["arm"] for line in lines if line["kind"] == "speed"] == ["dense", "moe"]
    for line in cells:
        assert line["status"] == "done" and line["steps"] == STEPS and line["tokens"] == STEPS * 2 * 16
        assert line["training_flops"] == 3 * line["flops_per_token"] * line["tokens"]
        assert 0 < line["bits_per_byte"] < 20 and line["threads"] >= 1 and line["commit"] and line["torch"]
    for arm, lr in best_rates(study, lines).items():
        swept = {line["lr"]: line["bits_per_byte"] for line in cells if line["arm"] == arm and line["seed"] == 0}
        assert lr == min(swept, key=swept.get)
        assert {line["lr"] for line in cells if line["arm"] == arm and line["seed"] == 1} == {lr}
    before = records.read_bytes()
    assert run_study(study, out=tmp_path / "out", records=records) == lines and records.read_bytes() == before
    assert not missing(study, lines) and "Unfinished" not in page_text(study, lines)


@pytest.mark.timeout(PATIENCE)
def test_a_killed_cell_goes_on_from_its_checkpoint_and_its_record_is_as_if_it_had_not_been_killed(toy, tmp_path):
    study = toy(steps=120)
    records = []
    for name in ("whole", "killed"):
        config = run_config(study, Cell(study.arm[1], 1e-3, 0), out=tmp_path / name, threads=1)
        job = write_job(config, {"kind": "cell"} | FACTS)
        worker = _start(job, "tests.training.held_cell" if name == "killed" else "training.study")
        if name == "killed":
            _wait_for((config.out / "checkpoints" / "latest").exists)
            worker.stdin.close()  # what a worker sees when the study is killed
            assert worker.wait(timeout=PATIENCE) == STOPPED
            assert not (config.out / "record.json").exists()
            worker = _start(job, "training.study")
        assert worker.wait(timeout=PATIENCE) == 0
        records.append(json.loads((config.out / "record.json").read_text()))
        assert not list((config.out / "checkpoints").glob("step-*"))
    assert records[0]["tokens"] == records[1]["tokens"] == 120 * 2 * 16
    assert records[0]["bits_per_byte"] == records[1]["bits_per_byte"]


def _start(job, module):
    return subprocess.Popen([sys.executable, "-m", module, str(job)], stdin=subprocess.PIPE, cwd=ROOT)


def _wait_for(happened, seconds=PATIENCE):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{happened} stayed false for {seconds} s"
        time.sleep(0.01)


def test_a_cell_killed_between_its_record_and_the_studys_line_is_not_trained_again(toy, tmp_path, monkeypatch):
    study, records = toy(one=True), tmp_path / "records.jsonl"
    for arm in study.arm:
        cell = Cell(arm, 1e-3, 0)
        key = cell_key(study, cell)
        config = run_config(study, cell, out=tmp_path / "out" / "cells" / f"{arm.name}-0.001-0-{key}", threads=1)
        facts = {"kind": "cell", "key": key, "arm": arm.name, "lr": 1e-3, "seed": 0, "status": "done"}
        config.out.mkdir(parents=True)
        (config.out / "record.json").write_text(json.dumps(facts | {"bits_per_byte": 3.0, "wall_seconds": 1.0}))

    def start(jobs, *, threads):
        raise AssertionError(f"{[str(job) for job in jobs]} have their records already")

    monkeypatch.setattr(pool, "_start", start)
    monkeypatch.setattr(runner_module, "_speeds", lambda *given, **options: None)
    lines = run_study(study, out=tmp_path / "out", records=records)
    assert [(line["arm"], line["bits_per_byte"]) for line in lines] == [("dense", 3.0), ("moe", 3.0)]
    assert open_records(records) == lines


@pytest.mark.timeout(PATIENCE)
def test_a_killed_study_goes_on_where_it_stopped(toy, tmp_path):
    toy(steps=400, one=True)
    # Ctrl-C from within, behind the first line: from here it might come once the second is written, too
    code = (
        "import os, signal; from pathlib import Path; from training.study import load_study, run_study, runner\n"
        "append = runner.append_record\n"
        "def append_and_stop(*record): append(*record); os.kill(os.getpid(), signal.SIGINT)\n"
        "runner.append_record = append_and_stop\n"
        f"run_study(load_study(Path({str(tmp_path / 'toy.toml')!r})), out=Path({str(tmp_path / 'out')!r}),"
        f" records=Path({str(tmp_path / 'records.jsonl')!r}), jobs=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=PATIENCE) != 0
    records = tmp_path / "records.jsonl"
    early = open_records(records)
    assert len(early) == 1
    study = load_study(tmp_path / "toy.toml")
    with records.open("a") as file:
        file.write('{"kind": "cell", "cut sh')
    lines = run_study(study, out=tmp_path / "out", records=records)
    assert lines[: len(early)] == early
    assert sum(line["kind"] == "cell" for line in lines) == 2


def test_a_loss_that_is_not_finite_is_a_result(toy, tmp_path, in_this_process):
    study = toy(arm='changes = { "optim.eps" = 1e-38, "optim.weight_decay" = 1e38 }')
    lines = run_study(study, out=tmp_path / "out", records=tmp_path / "records.jsonl")
    lost = [line for line in lines if line["kind"] == "cell" and line["arm"] == "moe"]
    assert len(lost) == 2 and all(line["status"] == "diverged" and "step" in line["error"] for line in lost)
    assert "moe" not in best_rates(study, lines) and not missing(study, lines)
    assert "no finite result" in page_text(study, lines)


def test_a_study_over_its_budget_is_refused_after_its_first_cell(toy, tmp_path, in_this_process):
    study = toy()
    tight = replace(study, budget_minutes=1e-3)
    with pytest.raises(ValueError, match=r"budget is 0\.001 minutes.*give --budget"):
        run_study(tight, out=tmp_path / "out", records=tmp_path / "records.jsonl", jobs=1)
    assert len(open_records(tmp_path / "records.jsonl")) == 1


def test_every_arm_tries_every_rate_and_a_cell_of_both_phases_is_one(toy):
    study = toy()
    sweep = sweep_cells(study)
    assert {(c.arm.name, c.lr) for c in sweep} == {(a, lr) for a in ("dense", "moe") for lr in (1e-3, 1e-2)}
    seeds = seed_cells(study, {"dense": 1e-2, "moe": 1e-3})
    shared = {cell_key(study, c) for c in sweep} & {cell_key(study, c) for c in seeds}
    assert len(seeds) == 4 and len(shared) == 2
    short = toy(extra="sweep_steps = 2")
    assert not {cell_key(short, c) for c in sweep_cells(short)} & {
        cell_key(short, c) for c in seed_cells(short, {"dense": 1e-2, "moe": 1e-3})
    }


def test_rates_are_chosen_on_text_that_is_neither_trained_on_nor_reported(toy, tmp_path, in_this_process):
    """The sweep keeps a fifth of the documents from training; the runs that are compared are those without it."""
    plain, study, records = toy(), toy(extra="validation = 0.2"), tmp_path / "records.jsonl"
    lines = run_study(study, out=tmp_path / "out", records=records)
    swept, final = [], []
    for line in lines:
        if line["kind"] == "cell":
            (swept if "validation_bits_per_byte" in line else final).append(line)
    assert len(swept) == 4 and len(final) == 4 and not missing(study, lines)
    rates = best_rates(study, lines)
    for arm in rates:
        by = {line["lr"]: line["validation_bits_per_byte"] for line in swept if line["arm"] == arm}
        assert rates[arm] == min(by, key=by.get) and results(study, lines)[arm == "moe"].sweep == by
    assert {line["key"] for line in final} == {cell_key(plain, cell) for cell in seed_cells(plain, rates)}
    assert not {cell_key(study, cell) for cell in sweep_cells(study)} & {cell_key(plain, c) for c in sweep_cells(plain)}
    # the worst rate by validation made the best by held-out text: the choice stays, and the page says so
    for line in swept:
        line["bits_per_byte"] = -line["validation_bits_per_byte"]
    assert best_rates(study, lines) == rates
    text = page_text(study, lines)
    assert "by validation bits per byte" in text and "another 20.0% of the documents" in text
    assert f"but for Dense {({1e-3, 1e-2} - {rates['dense']}).pop():g}, Mixture" in text
    one = {line["key"]: line for line in lines if line["kind"] == "speed"}
    assert len(one) == 2 and "on the text that the table reports" in page_text(plain, lines)


def test_a_sweep_goes_on_beyond_the_end_at_which_its_best_rate_is(toy, tmp_path, monkeypatch):
    """Bits a byte are lowest at 1.0 for one arm and at 5e-4 for the other, whose rates between are all worse."""
    study, asked = toy(extra="beyond = 2"), []

    def completed(jobs, *, at_once, threads):
        for job in jobs:
            facts = json.loads(job.read_text())["facts"]
            best = {"dense": 0.0, "moe": -3.3}[facts["arm"]]
            asked.append((facts["arm"], facts["lr"], facts["seed"]))
            bits = 2 + (math.log10(facts["lr"]) - best) ** 2 + facts["seed"]
            (job.parent / "record.json").write_text(
                json.dumps(facts | {"status": "done", "bits_per_byte": bits, "wall_seconds": 1.0, "commit": "c"})
            )
            yield job.parent

    monkeypatch.setattr(runner_module, "completed", completed)
    monkeypatch.setattr(runner_module, "_speeds", lambda *given, **options: None)
    lines = run_study(study, out=tmp_path / "out", records=tmp_path / "records.jsonl")
    # 1e-3 and 1e-2 for both; 0.1, then 1.0 for the one; 1e-4 for the other, which is worse than 1e-3
    assert sorted(lr for arm, lr, seed in asked if arm == "dense" and seed == 0) == [1e-3, 1e-2, 0.1, 1.0]
    assert sorted(lr for arm, lr, seed in asked if arm == "moe" and seed == 0) == [1e-4, 1e-3, 1e-2]
    assert [lr for arm, lr, seed in asked if seed == 1] == [1.0, 1e-3]
    assert best_rates(study, lines) == {"dense": 1.0, "moe": 1e-3} and not missing(study, lines)
    dense, moe = results(study, lines)
    assert dense.at_edge == "highest" and moe.at_edge is None and len(dense.sweep) == 4
    text = page_text(study, lines)
    assert "tried the next one beyond, at most 2: 2 arms did (0.0001, 0.1, 1)." in text
    assert "Dense: its best learning rate is the highest" in text and "Mixture: its best" not in text
    # without it the same records say what they said
    plain = replace(study, beyond=0)
    assert best_rates(plain, lines) == {"dense": 1e-2, "moe": 1e-3}


def test_a_rate_that_gave_no_finite_loss_ends_the_sweep_there():
    found = {1e-3: 3.0, 1e-2: 2.0}
    assert rate_beyond(found) == 0.1 and rate_beyond(found | {0.1: None}) is None
    assert rate_beyond({1e-3: 2.0, 1e-2: 3.0}) == 1e-4 and rate_beyond({1e-3: 2.0}) is None
    assert rate_beyond({1e-3: None, 1e-2: None}) is None and rate_beyond({5e-3: 3.0, 1.5e-2: 2.0, 4.5e-2: 1.0}) == 0.135


def test_the_key_follows_what_decides_the_numbers_and_nothing_else(toy):
    study = toy()
    keys = {cell_key(study, cell) for cell in sweep_cells(study)}
    assert len(keys) == 4
    noted = toy(arm="note = 'a note'")
    assert {cell_key(noted, cell) for cell in sweep_cells(noted)} == keys
    moved = dict(study.base)
    moved["train"] = moved["train"] | {"threads": 7, "save_every": 3}
    other = replace(study, base=moved)
    assert {cell_key(other, cell) for cell in sweep_cells(other)} == keys
    moved["train"] = moved["train"] | {"batch": 4}
    assert not {cell_key(other, cell) for cell in sweep_cells(other)} & keys


def test_a_grid_makes_an_arm_for_each_value(toy):
    study = toy(extra='grid = { "sparsify.sparsity" = [0.5, 0.9] }')
    assert [arm.name for arm in study.arm] == ["dense", "moe sparsity 0.5", "moe sparsity 0.9"]
    assert [declared(study, Cell(arm, 1e-3, 0)).get("sparsify.sparsity") for arm in study.arm] == [None, 0.5, 0.9]


def _record(study, cell, bits):
    return {
        "kind": "cell", "key": cell_key(study, cell), "arm": cell.arm.name, "lr": cell.lr, "seed": cell.seed,
        "status": "done" if bits is not None else "diverged", "bits_per_byte": bits, "steps": 4, "tokens": 128,
        "parameters": 1000, "active_parameters": 500, "flops_per_token": 100.0, "training_flops": 38400.0,
    }  # fmt: skip


def _lines(study, dense, moe):
    """Records of a study whose best rates are 1e-3: bits a byte of the seeds 0 and 1."""
    lines = [_record(study, Cell(arm, 1e-2, 0), 9.0) for arm in study.arm]
    for arm, seeds in zip(study.arm, (dense, moe), strict=True):
        lines += [_record(study, Cell(arm, 1e-3, seed), bits) for seed, bits in enumerate(seeds)]
    return lines


@pytest.mark.parametrize(
    "moe, outcome, words",
    [
        ((1.90, 1.92), "better", "Better than Dense in bits per byte: Mixture (-0.1000, spread 0.0200)."),
        ((2.10, 2.12), "worse", "Worse than Dense: Mixture (+0.1000, spread 0.0200)."),
        ((1.99, 2.01), "undecided", "beyond the seeds' spread: Mixture (-0.0100, spread 0.0200)."),
        ((1.90, 2.05), "undecided", "No difference from Dense beyond the seeds' spread: Mixture"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_stated_rule(toy, moe, outcome, words):
    study = toy()
    lines = _lines(study, (2.00, 2.02), moe)
    dense, mixture = results(study, lines)
    comparison = compare(mixture, dense)
    assert comparison.outcome == outcome
    # s of two values is their distance / √2
    assert comparison.margin == pytest.approx((0.02**2 / 2 + (moe[1] - moe[0]) ** 2 / 2) ** 0.5)
    assert comparison.difference == pytest.approx(sum(moe) / 2 - 2.01)
    assert words in page_text(study, lines)


def test_the_page_shows_the_records_numbers_and_says_what_is_missing(toy, tmp_path):
    study = toy()
    lines = _lines(study, (2.00, 2.02), (1.90, 1.92))
    text = page_text(study, lines)
    assert "| **Dense** | 0.001 | 2.0100 ± 0.0141 (n = 2) |  | 0.00 M |" in text
    assert "| Mixture | 0.001 | 1.9100 ± 0.0141 (n = 2) | -4.98% |" in text
    assert "Mixture: its best learning rate is the lowest of the sweep" in text
    assert "For 2 of 2 arms the best learning rate is an end of the sweep" in text
    assert "Unfinished: 1 cells" in page_text(study, lines[:-1])
    assert "None: Dense, the reference, has 1 finished seeds" in page_text(study, lines[:3])
    page = write_page(study, lines, folder=tmp_path)
    svg = ElementTree.parse(page.with_suffix(".svg")).getroot()
    kinds = [element.get("class") for element in svg.iter()]
    assert kinds.count("seed") == 4 and kinds.count("mean") == 2 and kinds.count("best") == 2


@pytest.mark.parametrize(
    "extra, arm, message",
    [
        ("", 'changes = { "optim.lr" = 1.0 }', "arm 'moe' must not set optim.lr: the study does"),
        ("validation = 0.8", "", r"validation must be in \[0, 1 - data.held_out=0.8\), got 0.8"),
        ("validation = -0.1", "", r"validation must be in .* got -0.1"),
        ('validation = 0.1\nregimes = ["few_batches"]', "", "validation must be 0 with regimes"),
        ("sweep_steps = 9", "", r"sweep_steps must be in \[1, train.steps=4\], got 9"),
        ("beyond = -1", "", "beyond must be at least 0, got -1"),
        ("lr = 1", "", "unknown key 'lr' in .*did you mean 'lrs'"),
        ("", 'flops = "any"', "flops in .* must be one of match, free, got 'any'"),
        ("", "[[arm]]\nname = 'moe'\nlabel = 'x'", "arms must have different names, got dense, moe, moe"),
    ],
)
def test_a_wrong_study_is_refused(toy, extra, arm, message):
    with pytest.raises(ValueError, match=message):
        toy(extra=extra, arm=arm)


def test_wrong_settings_of_an_arm_and_unequal_flops_are_refused_before_any_work(toy, tmp_path):
    study = toy(arm='changes = { "model.routr" = "switch" }')
    with pytest.raises(ValueError, match="unknown key 'routr' in .*arm 'moe' of study 'toy': did you mean 'router'"):
        run_study(study, out=tmp_path / "out", records=tmp_path / "records.jsonl")
    with pytest.raises(ValueError, match=r"within match_flops=0\.1 of 'dense', got ratios moe 1\."):
        check_arms(toy(arm='changes = { "model.hidden" = 64 }'), out=tmp_path)
    require_equal_flops(toy(arm='flops = "free"'), {"dense": 1.0, "moe": 2.0})


def test_a_study_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(FileNotFoundError, match="no study at .*nothing.toml; studies here: .*moe-families"):
        find_study("nothing")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_examples_loads_and_its_arms_are_runs(path):
    study = load_study(path)
    assert study.name == path.stem
    for cell in sweep_cells(study):
        assert declared(study, cell)["optim.lr"] == run_config(study, cell, out=Path("x"), threads=1).optim.lr


@pytest.mark.parametrize("path", [path for path in RECORDS if path.is_file()], ids=lambda path: path.stem)
def test_the_committed_pages_are_what_their_records_give(path, tmp_path):
    study = load_study(ROOT / "examples" / "studies" / f"{path.stem}.toml")
    write_page(study, open_records(path), folder=tmp_path)
    written = sorted(file.name for file in tmp_path.iterdir())
    assert {f"{path.stem}.md", f"{path.stem}.svg"} <= set(written)
    for name in written:
        assert (tmp_path / name).read_text() == (path.parent / name).read_text()
    assert "Unfinished" not in path.with_suffix(".md").read_text()


def test_records_are_appended_whole(tmp_path):
    path = tmp_path / "records.jsonl"
    assert open_records(path) == []
    append_record(path, {"kind": "cell", "key": "a"})
    assert open_records(path) == [{"kind": "cell", "key": "a"}]
