"""The page of pruned SmolLM2: figures reach their cells, and the committed page is its records'."""

import pytest

from benchmarks import pruning_page
from benchmarks.pruning_page import FIGURE, PAGE, SOURCE, draw, fill, head_curves, named, newest
from benchmarks.readme_tables import read

COMMON = {"text": "prose", "dense_perplexity": 20.0, "calibration": [64, 512], "evaluation": [40, 512], "threads": 2,
          "dtype": "bfloat16", "torch": "2.13.0", "commit": "abc", "model": "SmolLM2"}  # fmt: skip
CELL = {**COMMON, "name": "pruned", "method": "sparsegpt", "allocation": "uniform", "level": "0.5", "refit": False,
        "seconds": 60.0, "floor_s": 40.0, "perplexity": 43.0,
        "by_matrix": {"a.0.q_proj.weight": 0.5, "a.1.q_proj.weight": 0.7}}  # fmt: skip
HEAD = {**COMMON, "name": "heads", "importance": "gradient", "fraction": 0.1, "achieved": 0.1, "parameters": 130e6,
        "perplexity": 25.0, "whole_s": 0.2, "pruned_s": 0.1, "zeros_perplexity": 21.0}  # fmt: skip
LINES = [
    CELL,
    {**CELL, "allocation": "loss", "perplexity": 36.0},
    {**CELL, "level": "2:4", "perplexity": 100.0},
    HEAD,
    {**HEAD, "importance": "chance 0", "perplexity": 30.0},
    {**HEAD, "importance": "chance 1", "perplexity": 40.0},
    {**HEAD, "recovered_steps": 40, "perplexity": 22.0},
    {**COMMON, "name": "experts", "way": "whole", "fraction": 0.0, "bits_per_byte": 1.25, "parameters": 6.8e6},
    {**COMMON, "name": "experts", "way": "merged", "fraction": 0.5, "bits_per_byte": 2.0, "parameters": 3.7e6},
    {**COMMON, "name": "minilm", "importance": "chance 0", "fraction": 0.5, "agreement": 0.7, "parameters": 20e6,
     "speedup": 1.25, "pairs": 512},
    *({**COMMON, "name": name, "conditions": {"shape": "8x8", "sparsity": 0.5, "batch": 1}, "ratios": {"dense": ratio},
       "command": "bench"} for name, ratio in (("sparse_csr", 1.5), ("sparse_block", 0.5))),
]  # fmt: skip


def test_cells_hold_the_records_figures():
    text = fill("".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in pruning_page.TABLES), LINES)
    assert "| SparseGPT | 43.0 (2.15 ×) | 100.0 (5.00 ×) |" in text and "stale" not in text
    assert "| SparseGPT, allocation by loss | 36.0 (1.80 ×) |  |" in text
    assert "| q_proj | 60% (50% to 70%) |" in text and "| SparseGPT | 60 s | 40 s | 1.50 |" in text
    assert "| chance | 35.0 |" in text and "| 10% | 10.0% | 130.0 M | 200 ms | 100 ms | 2.00 |" in text
    assert "| gradient | 10% | 40 | 22.0 |" in text
    assert "| merged | 2.000 |" in text and "whole: 1.250 with 6.8 M parameters, then 3.7 M." in text
    assert "| chance | 0.700 |" in text and "20.0 M and 1.25 times as fast" in text
    assert "| csr, 50% | 1.50 |" in text and "| block, 50% | 0.50 |" in text
    assert fill(text, LINES) == text


def test_curves_leave_recovery_out_and_the_newest_record_wins():
    curves = head_curves(LINES)
    assert curves["gradient"] == {0.1: 25.0} and curves["as many single weights, SparseGPT"][0.1] == 21.0
    assert newest([CELL, {**CELL, "perplexity": 1.0}]) == [{**CELL, "perplexity": 1.0}]
    assert draw(LINES).count("<polyline") == len(curves)


def test_a_marker_without_a_table_is_refused():
    with pytest.raises(ValueError, match="table must be one of .*, got 'nothing'"):
        fill("<!-- table: nothing -->\n<!-- end -->", LINES)


def test_the_committed_page_is_that_of_the_records():
    lines = read(SOURCE)
    assert fill(PAGE.read_text(), lines) == PAGE.read_text(), "run python -m benchmarks.pruning_page"
    if named(lines, "heads"):
        assert FIGURE.read_text() == draw(lines), "run python -m benchmarks.pruning_page"
