import json

import pytest

from benchmarks import readme_tables
from benchmarks.readme_tables import ROOT, collect, fill, newest

DEMO = [
    {"kind": "conditions", "command": "sparse-transformers demo", "threads": 2},
    {"kind": "model", "name": "moe", "label": "MoE", "parameters": 3_000_000, "active_parameters": 1_000_000,
     "flops_per_token": 2_000_000, "tokens": 1, "learning_rate": 1e-3},
    {"kind": "result", "name": "moe", "bits_per_byte": 1.2345, "loss": 2.0},
    {"kind": "baseline", "name": "xz -9", "bits_per_byte": 1.75, "detail": ""},
    {"kind": "heads", "fraction": 0.3, "heads": 22, "parameters": 2_900_000, "file_bytes": 5_800_000,
     "flops_per_token": 1, "tokens_per_s": 1234.0, "tokens_per_s_iqr": 20.0, "bits_per_byte": 1.3,
     "recovered_bits_per_byte": 1.24},
    {"kind": "weights", "sparsity": 0.5, "zeros": 500, "weights": 1000, "bits_per_byte": 1.3},
    {"kind": "total", "seconds": 300.0, "peak_memory_bytes": 2**31},
]  # fmt: skip
ROW = {"name": "moe", "conditions": {"T": 4096}, "median_s": 0.1, "iqr_s": 0.002, "ratios": {"dense": 1.05},
       "parity": "pass 1e-6", "device": "cpu", "torch": "2.13.0", "threads": 2, "commit": "abc",
       "command": "benchmarks/bench_moe.py"}  # fmt: skip


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _marked(*names):
    return "# x\n" + "\n".join(f"<!-- table: {name} -->\nold\n<!-- end -->\ntext" for name in names)


def test_every_figure_of_the_records_reaches_its_table(tmp_path):
    _write(tmp_path / "demo.jsonl", DEMO)
    _write(tmp_path / "benchmarks.jsonl", [ROW])
    _write(tmp_path / "benchmarks-gpu.jsonl", [{**ROW, "device": "cuda:0", "median_s": 0.003}])
    text = fill(_marked(*readme_tables.TABLES), tmp_path)
    assert "| MoE | 1.234 | 3.00 M | 1.00 M | 2.0 M |" in text
    assert "| xz -9 | 1.750 |  |  |  |" in text and "5.0 minutes and at most 2.0 GiB" in text
    assert "| 30% (22 left) | 1.300 | 1.240 | 2.90 M | 5.80 MB | 1,234 ± 10 |" in text
    assert "| 50% | 500 of 1,000 | 1.300 |" in text
    assert "| **moe** T=4096 | 100.0 ± 1.0 | 1.05 × dense | pass 1e-6 |" in text
    assert "| **moe** T=4096 | 3.0 ± 1.0 |" in text and "cuda:0" in text
    assert "`python benchmarks/bench_moe.py`" in text
    assert "old" not in text and text.startswith("# x\n") and text.endswith("text")


def test_filling_twice_changes_nothing(tmp_path):
    _write(tmp_path / "demo.jsonl", DEMO)
    once = fill(_marked("compression", "speed"), tmp_path)
    assert "No record in benchmarks/records/benchmarks*.jsonl" in once
    assert fill(once, tmp_path) == once


def test_a_marker_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table must be one of"):
        fill(_marked("nonsense"), tmp_path)


def test_the_newest_row_of_each_conditions_is_kept():
    later, other = {**ROW, "median_s": 0.2}, {**ROW, "conditions": {"T": 1}}
    assert newest([ROW, other, later]) == [later, other]


def test_collect_copies_runs_and_refuses_a_path_of_this_machine(tmp_path):
    _write(tmp_path / "runs" / "demo" / "results.jsonl", DEMO)
    collect(tmp_path / "runs", tmp_path / "records")
    assert [json.loads(line) for line in (tmp_path / "records" / "demo.jsonl").read_text().splitlines()] == DEMO
    _write(tmp_path / "runs" / "benchmarks.jsonl", [{**ROW, "command": f"{ROOT}/benchmarks/bench_moe.py"}])
    with pytest.raises(ValueError, match="no folder of this machine"):
        collect(tmp_path / "runs", tmp_path / "records")
    with pytest.raises(FileNotFoundError, match="make demo"):
        collect(tmp_path / "empty", tmp_path / "records")


def test_the_readme_is_what_its_records_say():
    text = (ROOT / "README.md").read_text()
    assert all(f"<!-- table: {name} -->" in text for name in readme_tables.TABLES)
    assert fill(text) == text, "run make tables"
