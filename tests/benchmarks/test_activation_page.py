"""The activation-sparsity page: figures reach their cells, and the committed page and figure are their records'."""

from xml.etree import ElementTree

import pytest
import torch

from benchmarks import activation_page
from benchmarks.activation_blocks import calibrated, measured, weights_of_blocks
from benchmarks.activation_page import FIGURE, PAGE, SOURCE, draw, fill, newest
from benchmarks.readme_tables import read
from moe.teal import TealThresholds

PLACE = {"device": "cpu", "threads": 2, "torch": "2.13.0", "commit": "abc", "parity": "pass 1e-6"}
QUALITY = {"name": "quality", "dense_perplexity": 10.0, "evaluation_tokens": 2560, "calibration_tokens": 4096,
           "commit": "abc"}  # fmt: skip


def timing(name, conditions, median, ratios):
    return {"name": name, "conditions": conditions, "median_s": median, "ratios": ratios, **PLACE}


LINES = [
    {**QUALITY, "method": "dense", "sparsity": 0.0, "reads_saved": 0.0, "perplexity": 10.0},
    {**QUALITY, "method": "TEAL uniform", "sparsity": 0.5, "reads_saved": 0.49, "perplexity": 12.345},
    {**QUALITY, "method": "CATS", "sparsity": 0.5, "reads_saved": 0.33, "perplexity": 14.0},
    timing("decode", {"method": "dense", "beside": "CATS", "new_tokens": 16}, 0.8, {}),
    timing("decode", {"method": "dense", "beside": "CATS", "again": True, "new_tokens": 16}, 0.8, {"dense": 1.05}),
    timing("decode", {"method": "CATS", "new_tokens": 16, "sparsity": 0.25}, 1.0, {"dense": 1.25}),
    timing("decode", {"method": "CATS", "new_tokens": 16, "sparsity": 0.7, "clock": "processor"}, 0.8, {"dense": 0.97}),
    timing("decode", {"method": "CATS", "new_tokens": 16, "sparsity": 0.5}, 0.4, {"dense": 0.5}),
    timing("decode", {"method": "predictor", "new_tokens": 16, "recall": 0.9}, 0.4, {"dense": 0.8}),
    {"name": "choice", "conditions": {"method": "CATS", "sparsity": 0.5, "projection": "up"}, "dense": 1, "sparse": 29,
     "dense_s": 3.0, "sparse_s": 2.0},
    {"name": "choice", "conditions": {"method": "CATS", "sparsity": 0.25, "projection": "up"}, "dense": 30, "sparse": 0,
     "dense_s": None, "sparse_s": None},
    {"name": "blocks", "method": "blocks greedy", "sparsity": 0.4, "perplexity": 11.5, "reads_saved": 0.41,
     "dense_perplexity": 10.0, "evaluation_tokens": 2560, "calibration_tokens": 512, "dtype": "float32",
     "commit": "abc"},
    {"name": "predictor", "recall_target": 0.9, "recall": 0.884, "active_share": 0.3, "computed_share": 0.61,
     "perplexity": 13.0, "perplexity_without": 11.0, "rank": 64, "sparsity": 0.7, "commit": "abc",
     "training_tokens": 3072, "evaluation_tokens": 1024},
]  # fmt: skip


def test_every_figure_of_the_records_reaches_the_page():
    text = fill("".join(f"<!-- table: {name} -->\nstale\n<!-- end -->\n" for name in activation_page.TABLES), LINES)
    assert "| sparsity | CATS | TEAL uniform |" in text and "| 50% | 14.00 (33%) | 12.35 (49%) |" in text
    assert "Perplexity of 2,560 held-out tokens; dense: 10.00." in text
    assert "| sparsity | all seven maps, greedy |" in text and "| 40% | 11.50 (41%) |" in text
    assert "Thresholds from 128 rows of each map's inputs, drawn at random from 512 tokens (all seven maps," in text
    assert "| 25% | 16.0 (0.80×) |" in text and "| 50% | 40.0 (2.00×) |" in text and "20.0 beside CATS" in text
    assert "4.8% (CATS). As fast as dense: CATS at 70%. Slower: CATS at 25%." in text
    assert "Tokens a second of the processor, greedy" in text
    assert "| CATS, up | 0 of 30 | 1.50× (29 of 30) |" in text
    assert "| 90% | 88.4% | 61.0% | 13.00 | 1.25× |" in text
    assert "stale" not in text and fill(text, LINES) == text


def test_a_table_without_records_says_so():
    assert "*No record yet.*" in fill("<!-- table: predictor -->\n<!-- end -->", LINES[:3])


def test_a_marker_without_a_table_is_refused():
    with pytest.raises(ValueError, match="table must be one of"):
        fill("<!-- table: nonsense -->\n<!-- end -->", LINES)


def test_the_newest_record_of_each_setting_is_kept():
    later = {**LINES[1], "perplexity": 11.0}
    assert newest([*LINES, later]) == [LINES[0], later, *LINES[2:]]
    assert newest(LINES) == LINES


def test_the_figure_is_xml_and_has_a_point_for_each_record():
    root = ElementTree.fromstring(draw(LINES))
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    # two methods at one sparsity, one at three, and two names in the legend
    assert tags.count("circle") == 2 + 3 + 2 and tags.count("polyline") == 3


def test_the_page_is_what_its_records_say():
    text, lines = PAGE.read_text(), read(SOURCE)
    assert all(f"<!-- table: {name} -->" in text for name in activation_page.TABLES)
    assert fill(text, lines) == text and draw(lines) == FIGURE.read_text(), "run python -m benchmarks.activation_page"


def test_reads_saved_of_whole_blocks_counts_every_map():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=30, num_key_value_heads=2, eos_token_id=None, **sizes)
    ).eval()
    # query and output 32 · 32, key and value 32 · 16, the network 3 · 32 · 48
    assert weights_of_blocks(model) == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    rows = list(torch.randint(30, (4, 1, 64), generator=torch.Generator().manual_seed(0)))
    for allocation in ("uniform", "greedy"):
        found = measured(model, calibrated(model, rows, 0.4, allocation), rows)
        assert found["reads_saved"] == pytest.approx(0.4, abs=0.04)
    alone = calibrated(model, rows, 0.4, "uniform")
    part = measured(model, TealThresholds(alone.feedforward, {}), rows)["reads_saved"]
    assert part == pytest.approx(0.4 * 3 * 32 * 48 / (3 * 32 * 48 + 3 * 32 * 32), abs=0.04)
