"""Routing measured on held-out text, and the report's sections that show it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moe import RoutingMeter
from moe.memory_stats import MemoryMeter, memory_stats
from moe.product_key import Lookup
from tests.training.models import small_batch, small_data, small_model, small_trainer
from tests.training.test_report import Balanced, write_metrics
from training.config import DataConfig, RunConfig, TrainConfig, to_dict
from training.records import read_records
from training.report import report_html
from training.routing_figures import dead_counts, dead_window, lift_pixels, routing_curves
from training.routing_record import drawn_tokens, measure_routing, record_routing, token_text
from training.run import CONFIG
from transformer import PEERConfig, ProductKeyConfig, Transformer, TransformerConfig

TOKENIZER = small_data().tokenizer


def experts_line(layer: int = 0, *, experts: int = 4, drops: bool = False) -> dict:
    token = {"text": "<b>", "count": 3, "share": 0.25, "routed": 0.5, "lift": 7.25}
    return {
        "kind": "experts", "layer": layer, "tokens": 12345, "loads": [40, 30, 20, 10] + [0] * (experts - 4),
        "drops": [10 * drops] + [0] * (experts - 1), "entropy": 0.987, "confidence": 0.654, "imbalance": 1.6,
        "variation": 0.447, "specialisation": [0.5] * experts, "lift": np.eye(experts).tolist(), "pairs": 50,
        "taken": [[token] for _ in range(experts)],
    }  # fmt: skip


def memory_line(layer: int = 1) -> dict:
    return {"kind": "memory", "layer": layer, "slots": 65536, "reads": 777, "used": 0.1234, "kl": 2.345,
            "weighted_kl": 3.456, "gini": 0.789}  # fmt: skip


def page_of(folder: Path, *lines: dict) -> str:
    write_metrics(folder)
    (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = report_html(read_records(folder))
    parser = Balanced()
    parser.feed(html)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids))
    assert parser.references and set(parser.references) <= set(parser.ids)
    return html


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    html = page_of(tmp_path, experts_line(), memory_line())
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
    for shown in ("12,345 tokens", "1.60×", "0.45", "0.987", "65%", "0.50", "&lt;b&gt;", "25.0%, 7.2×", "65,536", "777",
                  "12.3%", "2.345", "3.456", "0.789", "40.0%"):  # fmt: skip
        assert shown in text, shown
    assert "<b> " not in html and "<code><b>" not in html
    # expert 0 of layer 1 of write_metrics never has a token
    assert "At the end 1 of 8 experts had gone a logged step without a token" in text
    assert "Which experts work together" in text and html.count("Pairs of experts that work") == 2
    assert "<details><summary>Layer 0</summary>" in html


def test_drops_are_shown_where_there_are_some(tmp_path: Path) -> None:
    assert '<th scope="col">dropped</th>' in page_of(tmp_path, experts_line()).split("<details>")[0]
    folded = page_of(tmp_path, experts_line(drops=True)).split("<details>")[1]
    assert "20.0%" in folded and "dropped" in folded
    assert "dropped" not in page_of(tmp_path, experts_line()).split("<details>")[1].split("</details>")[0]


def test_many_experts_and_one_choice_a_token(tmp_path: Path) -> None:
    line = experts_line(experts=40) | {"pairs": 0}
    html = page_of(tmp_path, line)
    assert "The 16 busiest experts of 40" in html and "Which experts work together" not in html


def test_a_wide_table_stays_inside_the_page(tmp_path: Path) -> None:
    html = page_of(tmp_path, experts_line(), memory_line())
    for match in re.finditer("<table", html):
        assert html[: match.start()].endswith('<div class="scroll" tabindex="0">')
    assert html.count('viewBox="0 0 350 ') == html.count('class="narrow"')


@pytest.mark.parametrize("layers", [1, 3, 8, 30])
def test_curves_over_time_with_any_number_of_layers(tmp_path: Path, layers: int) -> None:
    lines = [
        {"step": s, "tokens": s, "time": 1.0, "tokens_per_s": 1.0, "loss": 1.0, "lr": 0.1,
         "loads": [[5, s % 2] for _ in range(layers)],
         "entropy": [0.5] * layers, "dropped": [0.1] * layers}
        for s in range(1, 40)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = report_html(read_records(tmp_path))
    assert "Routing over time" in html and "capacity cost up to 10.0%" in html and "uniform: ln 2" in html


def test_panels_without_drops_or_unused_experts_are_left_out() -> None:
    lines = [{"loads": [[2, 1]], "entropy": [0.5], "dropped": [0.0]}, {"loads": [[1, 1]], "entropy": [0.4]}]
    assert list(routing_curves(lines)) == ["router entropy (nats)"]
    lines.append({"loads": [[1, 0]], "entropy": [0.4], "dropped": [0.25]})
    panels = routing_curves(lines)
    np.testing.assert_array_equal(panels["dropped assignments (%)"], [[0, 0, 25]])
    np.testing.assert_array_equal(panels["unused experts"], [[0, 0, 1]])


def test_unused_experts_by_hand() -> None:
    lines = [{"loads": [[1, 0, 0], [1, 1, 1]]}, {"loads": [[0, 1, 0], [1, 1, 1]]}, {"loads": [[0, 1, 0], [0, 0, 3]]}]
    np.testing.assert_array_equal(dead_counts(lines, window=2), [[2, 1, 2], [0, 0, 0]])
    assert [dead_window(n) for n in (1, 900, 10**6)] == [1, 18, 100]


def test_colours_of_a_lift() -> None:
    pixels = lift_pixels(np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 9.0], [1.0, 0.5, 1.0]]))
    np.testing.assert_allclose(pixels[..., 3], [[0, 1, 0.5], [1, 0, 1], [0, 0.5, 0]])


def test_measured_routing_is_the_models(tmp_path: Path) -> None:
    model = small_model(experts=4).train()
    batches = [small_batch(seed=1), small_batch(seed=2)]
    lines = measure_routing(model, iter(batches), TOKENIZER)
    assert model.training and [(line["kind"], line["layer"]) for line in lines] == [("experts", 0), ("experts", 1)]
    model.eval()
    assert measure_routing(model, iter(batches), TOKENIZER) == lines and not model.training
    meter = RoutingMeter(4)
    for batch in batches:
        meter.update(model.hidden_states(batch.inputs)[1][1])
    expected = meter.result()
    assert lines[1]["loads"] == expected.loads.tolist() and lines[1]["tokens"] == expected.tokens == 128
    assert lines[1]["entropy"] == pytest.approx(expected.entropy)
    assert all(len(row) <= 8 for row in lines[0]["taken"])
    json.dumps(lines, allow_nan=False)


def memory_model() -> Transformer:
    config = TransformerConfig.uniform(
        vocab_size=257, dim=16, num_layers=2, num_heads=2, feedforward=ProductKeyConfig(8, 2, 3, 8), max_length=64
    )
    layers = (config.layers[0], dataclasses.replace(config.layers[1], feedforward=PEERConfig(8, 2, 3, 8)))
    return Transformer(dataclasses.replace(config, layers=layers))


def test_memories_are_measured_and_no_hook_stays() -> None:
    model = memory_model()
    lines = measure_routing(model, iter([small_batch(), small_batch(seed=3)]), TOKENIZER)
    assert [(line["kind"], line["layer"]) for line in lines] == [("memory", 0), ("memory", 1)]
    assert lines[0]["slots"] == 64 and lines[0]["reads"] == 2 * 64 * 2 * 3
    assert 0 < lines[0]["used"] <= 1 and 0 <= lines[0]["gini"] < 1
    assert not any(module._forward_hooks for module in model.modules())


def test_a_memory_meter_adds_up_to_all_lookups_at_once() -> None:
    draws = [Lookup(torch.randint(0, 9, (5, 2, 3)), torch.rand(5, 2, 3).softmax(-1), 9) for _ in range(3)]
    meter = MemoryMeter(9)
    for lookup in draws:
        meter.update(lookup)
    whole = memory_stats([Lookup(*(torch.cat([getattr(d, f) for d in draws]) for f in ("slots", "weights")), 9)])
    result = meter.result()
    assert meter.reads == 90
    for name in ("used", "kl", "weighted_kl", "gini"):
        assert getattr(result, name) == pytest.approx(getattr(whole, name))
    with pytest.raises(ValueError, match=r"num_slots must be >= 1, got 0"):
        MemoryMeter(0)
    with pytest.raises(ValueError, match=r"num_slots must be 4 in every lookup, got 9"):
        MemoryMeter(4).update(draws[0])


def test_tokens_as_one_reads_them() -> None:
    assert token_text(TOKENIZER.encode(" ")[0], TOKENIZER) == "␣"
    assert token_text(TOKENIZER.encode("\n")[0], TOKENIZER) == "⏎"
    assert token_text(TOKENIZER.eos_id, TOKENIZER) == "end of document"
    half = TOKENIZER.encode("é")[0]
    assert token_text(half, TOKENIZER) == f"id {half}"
    assert token_text(9999, TOKENIZER) == "id 9999"


def test_only_the_documents_needed_are_encoded() -> None:
    documents = ["a" * 1000, "b" * 1000, "c" * 10]
    tokens = drawn_tokens(documents, TOKENIZER, count=50)
    assert len(tokens) == 50
    assert len(drawn_tokens(documents, TOKENIZER, count=10**6)) == 2010 + 4
    # of 8 · 64 characters each of 16 documents has its 32, of which 64 bytes hold two
    documents = [letter * 1000 for letter in "abcdefghijklmnop"]
    text = TOKENIZER.decode(drawn_tokens(documents, TOKENIZER, count=64).tolist())
    runs = [len(run.group()) for run in re.finditer(r"([a-p])\1*", text)]
    assert len(runs) == 2 and max(runs) == 32


def test_a_run_is_measured_from_its_latest_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text("for while if else return\n" * 20)
    out = tmp_path / "run"
    small_trainer(out, train={"steps": 5}).run()
    data = DataConfig(corpus=str(text), length=16, tokenizer="bytes", held_out=0.2)
    (out / CONFIG).write_text(json.dumps(to_dict(RunConfig(out=out, data=data, train=TrainConfig(batch=4)))))
    (written,) = record_routing(tmp_path, batches=3)
    assert written == out / "routing.jsonl" and record_routing(out, batches=3) == [written]
    (run,) = read_records(out).runs
    assert len(run.routing) == 2 and all(0 < line["tokens"] <= 3 * 4 * 16 for line in run.routing)
    assert run.routing[0]["entropy"] <= math.log(4) + 1e-6
    assert "What each expert takes" in report_html(read_records(tmp_path))
    with pytest.raises(ValueError, match=r"batches must be >= 1, got 0"):
        record_routing(out, batches=0)


def test_what_cannot_be_measured_is_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run")
    assert record_routing(tmp_path) == []
    assert not (tmp_path / "run" / "routing.jsonl").exists()
