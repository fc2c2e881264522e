"""The real-time study at toy size: every gate passes and shuts, and the committed page is what its records give."""

from xml.etree import ElementTree

import pytest
import torch

from benchmarks import bench_structures, real_time_page
from benchmarks.real_time_page import FIGURE, PAGE, RECORDS, draw, page_text, shares
from training.records import read_lines


@pytest.fixture
def _small(monkeypatch):
    for name, value in {"DIM": 64, "HEADS": 4, "HIDDEN": 128, "VOCABULARY": 32, "LENGTH": 8}.items():
        monkeypatch.setattr(bench_structures, name, value)


@pytest.mark.usefixtures("_small")
def test_every_structure_passes_its_gate_and_its_row_says_what_was_saved(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr("benchmarks.harness.commit", lambda: "abc")  # git takes longer than the rest
    bench_structures.main(["--tokens", "1", "16", "--seeds", "0", "--rounds", "2", "--threads", "1",
                           "--records", str(path)])  # fmt: skip
    lines = read_lines(path)
    assert len(lines) == 2 * (1 + 4 + 1 + 3 + 4 * 3 + 3)
    for line in lines:
        if line["name"] == "structure":
            about = line["conditions"]
            assert line["parity"].startswith("pass") and 0 < about["flops_saved"] < 1
            expected = (1 - line["ratios"]["dense"]) / about["flops_saved"]
            assert about["share_in_time"] == pytest.approx(expected, abs=1e-3 * (1 + abs(expected)))
    halved = {line["conditions"]["structure"]: line["conditions"]["flops_saved"] for line in lines
              if line["conditions"].get("level") == "50%"}  # fmt: skip
    assert halved["CSR"] == halved["2:4"] == pytest.approx(halved["blocks"], abs=0.01)
    assert halved["neurons"] < halved["CSR"] and halved["heads"] < halved["CSR"]
    text = page_text(lines)
    assert "## Verdict" in text and "**One token.**" in text and "16 tokens" in text
    ElementTree.fromstring(draw(lines))


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("kind", ["CSR", "neurons", "width", "layers"])
def test_a_gate_shuts_where_the_answers_differ(kind, monkeypatch):
    torch.manual_seed(0)
    ids, draw_ = torch.randint(32, (2, 8)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        dense = bench_structures.dense_model(8)
        if kind == "CSR":
            wrong = lambda self, rows: rows @ self.dense_weight().mT * 1.01  # noqa: E731
            monkeypatch.setattr(bench_structures.SparseLinear, "_csr_product", wrong)
        # oracles that forget what was removed
        monkeypatch.setattr(bench_structures, "switch_off", lambda *_: None)
        monkeypatch.setattr(bench_structures, "masked", lambda *_: torch.no_grad())
        with pytest.raises(ValueError, match="parity: relative error of logits must be <= 0.0001"):
            if kind == "CSR":
                bench_structures.zeros(dense, ids, kind, 0.5, draw_)
            else:
                bench_structures.removed(dense, ids, kind, 0.5, draw_)


def test_the_newest_record_of_a_seed_counts():
    about = {"structure": "CSR", "level": "50%", "B": 1, "L": 1, "seed": 0, "flops_saved": 0.5}
    lines = [{"conditions": {**about, "share_in_time": share}} for share in (0.1, 0.2)]
    found = real_time_page.levels(lines, 1, "CSR")
    assert shares(found["50%"]) == [0.2]


@pytest.mark.skipif(not RECORDS.is_file(), reason="the real-time study has no committed records")
def test_the_page_is_what_its_records_say():
    lines = read_lines(RECORDS)
    assert page_text(lines) == PAGE.read_text(), "run python -m benchmarks.real_time_page"
    assert draw(lines) == FIGURE.read_text()
