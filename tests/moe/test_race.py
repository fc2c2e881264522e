"""Dense and sparse products take turns on a layer's own calls, until the faster is known; what dropping keeps."""

import copy
import math
import pickle

import pytest
import torch

from moe.column_products import WHOLE
from moe.race import CALLS, Race, Timing
from moe.thresholded import ThresholdedFeedForward, Thresholds, drop
from moe.thresholded_linear import ThresholdedLinear
from tests.tolerances import close


def taking(clock, calls):
    """way(name, seconds) → what a race runs: notes its name and moves the clock."""

    def way(name, seconds):
        def inner():
            calls.append(name)
            clock[0] += seconds
            return torch.zeros(1)

        return inner

    return way


@pytest.mark.parametrize(("sparse", "winner"), [(1.8, "s"), (1.95, "d"), (3.0, "d")])
def test_the_ways_take_turns_until_each_was_timed_and_then_the_faster_runs(monkeypatch, sparse, winner):
    clock, calls = [0.0], []
    monkeypatch.setattr("moe.race.time.perf_counter", lambda: clock[0])
    way, race = taking(clock, calls), Race()
    race.run(way("d", 90.0), way("s", 90.0))
    race.run(way("d", 90.0), way("s", 90.0))  # the first of either is not counted
    for _ in range(2 * CALLS):
        assert race.chosen is None and race.timing is None
        race.run(way("d", 2.0), way("s", sparse))
    assert calls == ["d", "s"] * (CALLS + 1)
    close(torch.tensor([race.timing.dense, race.timing.sparse]), torch.tensor([2.0, sparse]))
    race.run(way("d", 9.0), way("s", 9.0))
    assert calls[-1] == winner and race.chosen == {"s": "sparse", "d": "dense"}[winner]
    given = Race("dense")
    given.run(way("d", 1.0), way("s", 1.0))
    assert calls[-1] == "d" and given.timing is None
    assert Timing(1.0, 0.95).fastest == "sparse", "a twentieth, for the second copy"


@pytest.mark.parametrize("method", ["hard", "cats", "teal", "cett"])
@pytest.mark.parametrize("slow", ["sparse", "dense"])
def test_auto_equals_the_masked_arithmetic_before_and_after_its_choice(monkeypatch, method, slow):
    options = {"method": method, "threshold": 0.1, "activation": "reglu"}
    layer = ThresholdedFeedForward(8, 16, **options).eval()
    plain = ThresholdedFeedForward.from_linear(layer.gate, layer.up, layer.down, **options, execution="dense").eval()
    raced = {"teal": 3, "cats": 2, "hard": 2, "cett": 2}[method]
    with torch.inference_mode():
        for _ in range(4 * CALLS + 6):
            monkeypatch.setattr("moe.race.Timing.fastest", "sparse" if slow == "dense" else "dense")
            x = 2 * torch.randn(1, 8) * (torch.arange(8) % 2)
            close(layer(x), plain(x))
        ((case, races),) = layer.races.items()
        assert len(races) == raced + 1 and all(race.timing for name, race in races.items() if name != WHOLE)
        # where no product is faster sparse, nothing is left to race
        assert (races[WHOLE].timing is None) == (slow == "sparse")
        assert {at: verdict.dense for at, verdict in layer._verdicts.items()} == {case: slow == "sparse"}
        assert bool(layer._tables) == (slow == "dense")
        other = torch.randn(2, 8)
        close(layer(other), plain(other))
        assert len(layer.races) == 2, "two rows are a race of their own"
        layer.thresholds = plain.thresholds = Thresholds(0.3, 0.3, 0.3)
        close(layer(x), plain(x))
        assert len(layer.races) == 3, "and so are other thresholds"
    layer.train()
    assert not layer._tables and not layer.races


def test_a_layer_whose_faster_products_do_not_pay_is_dense(monkeypatch):
    layer = ThresholdedFeedForward(8, 16, method="teal", threshold=0.5).eval()
    x = torch.randn(1, 8) * (torch.arange(8) % 2)
    with torch.no_grad():
        while WHOLE not in (races := next(iter(layer.races.values()), {})):
            monkeypatch.setattr("moe.race.Timing.fastest", "sparse")
            layer(x)
        assert {race.chosen for name, race in races.items() if name != WHOLE} == {"sparse"} and layer._tables
        monkeypatch.setattr("moe.race.Timing.fastest", "dense")
        for _ in range(2 * CALLS + 2):
            y = layer(x)
        assert races[WHOLE].chosen == "dense" and not layer._tables
        monkeypatch.setattr(layer, "_decode", None)
        close(layer(x), y)


def test_dense_from_the_first_call_on_where_nothing_is_dropped():
    layer = ThresholdedFeedForward(8, 16, method="cett").eval()
    with torch.no_grad():
        layer(torch.randn(1, 8))
    assert not layer._tables and all(verdict.dense for verdict in layer._verdicts.values())


def test_a_choice_is_made_again_when_inputs_have_changed(monkeypatch):
    for name, calls in (("UNTIMED_CALLS", 3), ("TIMED_CALLS", 5)):
        monkeypatch.setattr(f"moe.column_products.{name}", calls)
    layer, dense, sparse = ThresholdedLinear(8, 4).eval(), torch.randn(1, 8), torch.eye(8)[:1]
    expected = layer(sparse).detach()
    with torch.no_grad():
        layer(dense)
        (verdict,) = layer._verdicts.values()
        assert verdict.dense and verdict.left == 3, "a first token without a zero settles little"
        monkeypatch.setattr("moe.race.Timing.fastest", "sparse")
        for _ in range(3 + 4 * (CALLS + 1)):
            close(layer(sparse), expected)
        (verdict,) = layer._verdicts.values()
        assert not verdict.dense and verdict.calls == verdict.left == 6, "twice as many as before, once it was timed"
        with monkeypatch.context() as only:
            only.setattr("moe.column_products.sparse_matvec", None)
            close(layer(dense), torch.nn.functional.linear(dense, layer.weight, layer.bias))
        monkeypatch.setattr("moe.race.Timing.fastest", "dense")
        for _ in range(5 + 2 * (CALLS + 1) + 1):
            close(layer(sparse), expected)
        (verdict,) = layer._verdicts.values()
        assert verdict.dense and verdict.calls == 12 and not layer._tables


def test_copies_and_pickles_find_out_for_themselves_and_old_cases_are_forgotten(monkeypatch):
    monkeypatch.setattr("moe.column_products.MOST_CASES", 3)
    layer = ThresholdedFeedForward(8, 16, method="cett", threshold=0.3).eval()
    with torch.no_grad():
        for threshold in range(9):
            layer.thresholds = Thresholds(down=float(threshold))
            y = layer(torch.ones(1, 8))
        assert len(layer.races) == 3 >= len(layer._verdicts)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
            assert not (other.races or other._tables or other._verdicts or other._norms)
            close(other(torch.ones(1, 8)), y)
    assert layer.races and layer._norms


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dropping_keeps_what_is_larger_and_its_gradient(dtype, threshold):
    """All 2^16 values of the narrow types; NaN and what equals the threshold among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    narrow = bits.view(dtype) if dtype in (torch.bfloat16, torch.float16) else bits.view(torch.float16).to(dtype)
    x = torch.cat([narrow, torch.tensor([threshold, -threshold], dtype=dtype)]).requires_grad_()
    limit = torch.tensor(threshold, dtype=dtype)
    kept = [not abs(value) <= float(limit) for value in x.detach().double().tolist()]
    y = drop(x, threshold)
    assert torch.equal(y.nan_to_num(7.0), torch.where(torch.tensor(kept), x, 0.0).nan_to_num(7.0))
    y.backward(torch.ones_like(y))
    number = ~x.detach().isnan()
    assert torch.equal((x.grad != 0)[number], torch.tensor(kept)[number])
