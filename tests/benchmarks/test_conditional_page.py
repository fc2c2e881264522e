"""The page of conditional layers: rows reach their tables, and the committed page is its records'."""

import pytest

from benchmarks.conditional_page import PAGE, SOURCE, TABLES, collect, fill
from benchmarks.readme_tables import newest, read

ROW = {"name": "moe", "conditions": {"E": 64, "T": 4096}, "median_s": 0.3, "iqr_s": 0.02, "ratios": {"dense": 1.25},
       "parity": "pass 5e-07", "device": "cpu", "processor": "Some CPU", "threads": 2, "torch": "2.13.0",
       "commit": "abc", "command": "-m benchmarks.bench_moe --experts 64"}  # fmt: skip
MARKERS = "".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in TABLES)


def test_rows_reach_the_table_of_their_benchmark():
    few = {**ROW, "name": "read", "median_s": 0.001, "command": "-m benchmarks.bench_decode"}
    text = fill(MARKERS, [ROW, few, {**ROW, "name": "big", "conditions": {"E": 16}}])
    fine, decode, *rest = text.split("<!-- end -->")
    assert "1.25 × dense" in fine and "Some CPU with 2 threads" in fine and "**read**" not in fine and "big" not in text
    assert "**read** E=64 T=4096" in decode and all("*No record yet.*" in part for part in rest[:3])
    with pytest.raises(ValueError, match="table must be one of"):
        fill("<!-- table: nonsense -->\n<!-- end -->", [])


def test_each_machine_has_a_table_of_its_own():
    elsewhere = {**ROW, "processor": "Another", "median_s": 0.1}
    fine = fill(MARKERS, newest([ROW, elsewhere, {**elsewhere, "median_s": 0.2}])).split("<!-- end -->")[0]
    assert fine.count("| contender |") == 2 and fine.index("300.0") < fine.index("Some CPU") < fine.index("200.0")
    assert fine.index("200.0") < fine.index("Another with") and "100.0" not in fine


def test_other_benchmarks_are_not_collected(tmp_path):
    empty = tmp_path / "benchmarks.jsonl"
    with pytest.raises(FileNotFoundError, match="must hold records"):
        collect(empty)


def test_the_committed_page_is_its_records():
    assert fill(PAGE.read_text(), read(SOURCE)) == PAGE.read_text()
