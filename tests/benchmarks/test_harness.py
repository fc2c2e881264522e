"""The harness: every contender in every round, ratios the right way up, one JSON line a row, a gate that shuts."""

import json

import pytest
import torch

from benchmarks.harness import interleaved, paired_ratio, require_parity, row, spread


def test_every_round_runs_every_contender_from_a_rotating_start():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(runs, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(min(times) for times in seconds.values()) >= 0.0


@pytest.mark.parametrize(("rounds", "warmup", "bound"), [(0, 0, "rounds must be >= 1"), (1, -1, "warmup must be >= 0")])
def test_counts_out_of_range_are_refused(rounds: int, warmup: int, bound: str):
    with pytest.raises(ValueError, match=bound):
        interleaved({}, rounds=rounds, warmup=warmup)


def test_spread_and_ratio_by_hand():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0)
    assert spread([7.0]) == (7.0, 0.0)
    assert paired_ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == 2.0


def test_row_prints_and_appends_the_same_figures(tmp_path, capsys):
    path = tmp_path / "deep" / "rows.jsonl"
    for _ in range(2):
        row("moe", {"T": 8, "dtype": "float32"}, [0.002] * 3, versus={"hf": [0.004] * 3}, parity="pass", path=path)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("moe T=8 dtype=float32 cpu") and "median=2.00ms iqr=0.00ms vs_hf=0.50 parity=pass" in line
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(records) == 2
    assert records[0]["ratios"] == {"hf": 0.5} and records[0]["conditions"] == {"T": 8, "dtype": "float32"}
    wanted = {"name", "conditions", "median_s", "iqr_s", "ratios", "parity", "device", "torch", "threads", "commit"}
    assert wanted | {"command"} <= records[0].keys()


def test_parity_gate_returns_the_worst_error_and_shuts_on_nan_and_on_difference():
    ones = {"y": torch.ones(4)}
    assert require_parity({"y": torch.ones(4)}, ones, tolerance=0.0) == 0.0
    assert require_parity({"y": 1.1 * torch.ones(4)}, ones, tolerance=0.2) == pytest.approx(0.1)
    for wrong in (torch.zeros(4), torch.full((4,), torch.nan)):
        with pytest.raises(ValueError, match="relative error of y"):
            require_parity({"y": wrong}, ones, tolerance=1e-3)
    with pytest.raises(ValueError, match="names must be"):
        require_parity({}, ones, tolerance=1.0)
