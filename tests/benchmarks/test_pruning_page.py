"""The page of pruned SmolLM2: figures reach their cells, and the committed page is its records'."""

import json

import pytest

from benchmarks import pruning_page
from benchmarks.collapse_tables import collapse_figure
from benchmarks.pruning_figures import ZEROS, head_curves, heads_figure, parameter_curves, parameters_figure
from benchmarks.pruning_page import FIGURES, PAGE, SOURCE, collect, fill, named, newest
from benchmarks.readme_tables import read

COMMON = {"text": "prose", "dense_perplexity": 20.0, "calibration": [64, 512], "evaluation": [40, 512], "threads": 2,
          "dtype": "bfloat16", "torch": "2.13.0", "commit": "abc", "model": "SmolLM2"}  # fmt: skip
CELL = {**COMMON, "name": "pruned", "method": "sparsegpt", "allocation": "uniform", "level": "0.5", "refit": False,
        "seconds": 60.0, "floor_s": 40.0, "perplexity": 43.0,
        "by_matrix": {"a.0.q_proj.weight": 0.5, "a.1.q_proj.weight": 0.7}}  # fmt: skip
HEAD = {**COMMON, "name": "heads", "importance": "gradient", "fraction": 0.1, "achieved": 0.1, "parameters": 130e6,
        "perplexity": 25.0, "whole_s": 0.2, "pruned_s": 0.1, "zeros_perplexity": 21.0,
        "zeros_sparsity": 0.1}  # fmt: skip
MORE = {**HEAD, "fraction": 0.2, "parameters": 120e6, "zeros_sparsity": 0.2, "perplexity": 28.0}
COLLAPSE = {**COMMON, "name": "collapse", "model": "chain", "method": "snip", "compression": 10.0, "seed": 0,
            "steps": 9, "weights": 9000, "matrices": 8, "empty": 0, "cut": False, "nats": 3.0,
            "constant_nats": 3.5}  # fmt: skip
TOGETHER = {**COMMON, "name": "together", "way": "pruned", "kind": "float32", "zeros": 0.5, "perplexity": 48.5,
            "bytes": 250e6, "steps": 30, "batch": 4}  # fmt: skip
ENCODER = {**COMMON, "name": "encoder", "importance": "chance 0", "fraction": 0.5, "agreement": 0.7, "found": 0.25,
           "sentences": 512, "docstrings": 500}  # fmt: skip
LINES = [
    CELL,
    {**CELL, "allocation": "loss", "perplexity": 36.0},
    {**CELL, "level": "2:4", "perplexity": 100.0},
    {**CELL, "order": "diag", "perplexity": 42.0, "seconds": None},
    HEAD,
    {**HEAD, "importance": "chance 0", "perplexity": 30.0},
    {**HEAD, "importance": "chance 1", "perplexity": 40.0},
    {**HEAD, "recovered_steps": 40, "perplexity": 22.0},
    {**HEAD, "importance": "none", "fraction": 0.0, "recovered_steps": 40, "perplexity": 19.0},
    MORE,
    {**COMMON, "name": "heads-sizes", "importance": "gradient", "fraction": 0.1, "achieved": 0.1, "parameters": 130e6,
     "file_bytes": 500e6},
    TOGETHER,
    {**TOGETHER, "kind": "int8", "perplexity": 49.0},
    {**COMMON, "name": "together-times", "way": "pruned", "kind": "int8", "forward_s": 0.3, "dense_forward_s": 0.2},
    {**COLLAPSE, "method": "dense", "compression": 1.0, "nats": 2.0},
    COLLAPSE,
    {**COLLAPSE, "seed": 1, "nats": 3.5, "empty": 2},
    {**COLLAPSE, "compression": 100.0, "nats": 3.5, "cut": True},
    {**COMMON, "name": "experts", "way": "whole", "fraction": 0.0, "bits_per_byte": 1.25, "parameters": 6.8e6},
    {**COMMON, "name": "experts", "way": "merged", "fraction": 0.5, "bits_per_byte": 2.0, "parameters": 3.7e6},
    {**COMMON, "name": "experts", "way": "from all layers, least added (REAP)", "fraction": 0.5, "bits_per_byte": 1.5,
     "parameters": 3.7e6, "left": [[16, 8], [2, 8]]},
    {**COMMON, "name": "experts", "way": "neurons from all layers, magnitude", "fraction": 0.5, "bits_per_byte": 1.75,
     "parameters": 3.6e6, "left": [[16, 4], [16, 2]]},
    {**COMMON, "name": "minilm", "importance": "gradient", "fraction": 0.5, "parameters": 20e6, "speedup": 1.25,
     "agreement": 0.7, "pairs": 512},
    {**ENCODER, "importance": "none", "fraction": 0.0, "agreement": 1.0, "found": 0.5},
    ENCODER,
    {**ENCODER, "importance": "chance 1", "agreement": 0.6},
    {**ENCODER, "recovered_steps": 40, "agreement": 0.9, "found": 0.375},
    *({**COMMON, "name": name, "conditions": {"shape": "8x8", "sparsity": 0.5, "batch": 1}, "ratios": {"dense": ratio},
       "command": "bench"} for name, ratio in (("sparse_csr", 1.5), ("sparse_block", 0.5))),
]  # fmt: skip


def test_cells_hold_the_records_figures():
    text = fill("".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in pruning_page.TABLES), LINES)
    assert "| SparseGPT | 43.0 (2.15 ×) | 100.0 (5.00 ×) |" in text and "stale" not in text
    assert "| SparseGPT, allocation by loss | 36.0 (1.80 ×) |  |" in text
    assert "| SparseGPT, columns by the diagonal | 42.0 (2.10 ×) |  |" in text
    assert "| q_proj | 60% (50% to 70%) |" in text and "| SparseGPT | 50% | 60 s | 40 s | 1.50 |" in text
    assert "| chance | 35.0 |" in text and "| 10% | 10.0% | 130.0 M | 500.0 MB | 200 ms | 100 ms | 2.00 |" in text
    assert "| gradient | 25.0 | 22.0 |" in text and "40 steps of 4 x 512 tokens" in text
    assert "The whole model trained so: 20.0, then 19.0." in text
    assert "| 50% of the weights gone, SparseGPT by loss | int8 | 50% | 49.0 | 250 MB | 1.50 |" in text
    assert "| chain, snip | 3.25 ± 0.25 †1 | 3.50 ± 0.00 †1 |" in text and "chain 2.00, 9,000 weights in 8" in text
    assert "| merged | 2.000 |" in text and "whole: 1.250 with 6.8 M parameters, then 3.7 M." in text
    assert "| chance | 0.650 | 0.900 |" in text and "2 seeds of chance" in text
    assert "| chance | 0.250 | 0.375 |" in text and "the whole encoder finds 0.500" in text
    assert "| 50% | 20.0 M |  | 1.25 |" in text
    assert "| csr, 50% | 1.50 |" in text and "| block, 50% | 0.50 |" in text
    assert fill(text, LINES) == text


def test_curves_leave_recovery_out_and_the_newest_record_wins():
    curves = head_curves(LINES)
    assert curves["gradient"] == {0.1: 25.0, 0.2: 28.0} and curves[ZEROS][0.1] == 21.0 and curves["chance"][0.1] == 35.0
    assert newest([CELL, {**CELL, "perplexity": 1.0}]) == [{**CELL, "perplexity": 1.0}]
    assert heads_figure(LINES).count("<polyline") == len(curves)


def test_heads_and_single_weights_meet_at_equal_parameters():
    # 130 and 120 million are left at 10 and 20% of the weights: 140 million were there
    curves = parameter_curves(LINES)
    assert curves["heads, by gradient"] == {0.0714: 25.0, 0.1429: 28.0}
    assert curves["single weights, SparseGPT"].keys() == curves["heads, by gradient"].keys()
    assert parameters_figure(LINES).count("<polyline") == 3
    with pytest.raises(ValueError, match="records must hold zeros at 2 fractions or more, got 1"):
        parameter_curves([HEAD])


def test_recovered_by_another_setting_is_no_row_of_the_same_table():
    other = {**HEAD, "importance": "magnitude", "recovered_steps": 40, "recovered_batch": 1}
    text = fill("<!-- table: recovery -->\n<!-- end -->", [*LINES, other])
    assert "| gradient |" in text and "magnitude" not in text


def test_a_cross_stands_where_most_seeds_have_an_empty_matrix():
    # one of two seeds at 10: none; the only one at 100
    drawn = collapse_figure(LINES)
    assert drawn.count("<polyline") == 1 and drawn.count("<path") == 1 and drawn.count('r="3"') == 1


def test_collecting_replaces_only_the_cells_of_the_files(tmp_path, monkeypatch):
    source, run = tmp_path / "records.jsonl", tmp_path / "run.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in (CELL, HEAD)))
    run.write_text(json.dumps({**CELL, "perplexity": 40.0}) + "\n" + json.dumps({**CELL, "allocation": "owl"}) + "\n")
    monkeypatch.setattr(pruning_page, "SOURCE", source)
    collect([run, tmp_path / "absent.jsonl"])
    assert read(source) == [{**CELL, "perplexity": 40.0}, HEAD, {**CELL, "allocation": "owl"}]
    with pytest.raises(FileNotFoundError, match="runs/ must hold records"):
        collect([tmp_path / "absent.jsonl"])


def test_a_marker_without_a_table_is_refused():
    with pytest.raises(ValueError, match="table must be one of .*, got 'nothing'"):
        fill("<!-- table: nothing -->\n<!-- end -->", LINES)


def test_the_committed_page_is_that_of_the_records():
    lines = read(SOURCE)
    assert fill(PAGE.read_text(), lines) == PAGE.read_text(), "run python -m benchmarks.pruning_page"
    for path, (figure, name) in FIGURES.items():
        if named(lines, name):
            assert path.read_text() == figure(lines), "run python -m benchmarks.pruning_page"
