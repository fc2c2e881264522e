"""The cost of a run, step by step by hand and against the formulas of the RigL paper."""

import pytest
import torch

from pruning import cubic
from pruning.diagnostics import (
    Densities,
    Passes,
    dense_run,
    feedback_run,
    gradual_run,
    momentum_run,
    rigl_run,
    run_cost,
    search_cost,
    static_run,
    top_kast_run,
)

SIZES = {"tokens": 7, "prunable_flops": 100.0, "other_flops": 30.0, "prunable_weights": 50, "other_weights": 15}


def test_one_step_by_hand():
    rule = Densities(lambda step: 0.2, lambda step: 0.5, lambda step: 0.3)
    cost = run_cost(rule, steps=1, **SIZES, weight_bytes=2, index_bytes=4)
    assert cost.forward.tolist() == [pytest.approx(7 * (20 + 30))]
    assert cost.backward.tolist() == [pytest.approx(7 * (20 + 30 + 50 + 30))]
    weights = (0.4 + 1.0 + 1.8) * 50 + 10 * 15
    assert cost.moved.tolist() == [pytest.approx(2 * weights + 4 * 0.4 * 50)]
    assert cost.energy == pytest.approx((2.3 * cost.flops + 160 * cost.bytes) * 1e-12)


def test_a_dense_run_is_the_yardstick():
    cost = run_cost(dense_run(), steps=4, **SIZES)
    assert cost.ratio == pytest.approx(1.0) and cost.flops == pytest.approx(3 * 7 * 130 * 4)
    assert cost.bytes == pytest.approx(cost.dense_moved) == pytest.approx(4 * 10 * 65 * 4)


@pytest.mark.parametrize("density", [0.05, 0.2])
@pytest.mark.parametrize("every", [1, 3, 9])
def test_the_formulas_of_the_paper(density, every):
    sizes = SIZES | {"other_flops": 0.0, "tokens": 1}
    dense, sparse = 100.0, density * 100.0
    period = every + 1
    rigl = run_cost(rigl_run(density, every=period), steps=100 * period + 1, **sizes)
    later = (rigl.forward + rigl.backward)[1:].mean()
    assert later == pytest.approx((3 * sparse * every + 2 * sparse + dense) / (every + 1))
    static = run_cost(static_run(density), steps=10, **sizes)
    assert static.flops == pytest.approx(10 * 3 * sparse) and static.ratio == pytest.approx(density)
    snfs = run_cost(momentum_run(density), steps=10, **sizes)
    assert snfs.flops == pytest.approx(10 * (2 * sparse + dense))
    top = run_cost(top_kast_run(density, backward_density=2 * density), steps=10, **sizes)
    assert top.flops == pytest.approx(10 * 4 * sparse)


def test_attacks_are_passes_to_the_inputs_and_back():
    rule = Densities(lambda step: 0.2, lambda step: 0.5, lambda step: 0.3)
    plain, attacked = (run_cost(rule, steps=1, **SIZES, attack_steps=n) for n in (0, 3))
    assert attacked.forward.tolist() == [pytest.approx(4 * 7 * (20 + 30))]
    assert attacked.backward.tolist() == [pytest.approx(7 * (20 + 30 + 50 + 30) + 3 * 7 * (20 + 30))]
    assert float(attacked.moved - plain.moved) == pytest.approx(4 * 3 * 2 * (0.2 * 50 + 15))
    assert attacked.dense_flops == plain.dense_flops


def test_feedback_reaches_every_weight():
    cost = run_cost(feedback_run(lambda step: 0.8), steps=5, **SIZES | {"other_flops": 0.0})
    assert cost.flops == pytest.approx(5 * 7 * 100 * (0.2 + 0.2 + 1.0))


def test_gradual_pruning_pays_for_its_dense_start():
    schedule = cubic(0.9, begin=2, end=8)
    cost = run_cost(gradual_run(schedule), steps=12, **SIZES | {"other_flops": 0.0})
    wanted = [3 * 7 * 100 * (1 - schedule(step)) for step in range(12)]
    assert (cost.forward + cost.backward).tolist() == pytest.approx(wanted)
    assert 0.1 < cost.ratio < 1


def test_rigl_rests_after_its_stop():
    rule = rigl_run(0.1, every=5, stop=12)
    assert [step for step in range(30) if rule.gradient(step) == 1.0] == [5, 10]


def test_the_search_for_a_mask_counts():
    search, final = run_cost(dense_run(), steps=30, **SIZES), run_cost(static_run(0.1), steps=10, **SIZES)
    total = search + final
    assert total.flops == pytest.approx(search.flops + final.flops) and len(total.forward) == 40
    assert total.ratio == pytest.approx((search.flops + final.flops) / (3 * 7 * 130 * 40))
    assert total.bytes == pytest.approx(search.bytes + final.bytes)


def test_passes_beside_the_steps_by_hand():
    sizes = {name: value for name, value in SIZES.items() if name != "tokens"}
    found = search_cost([(0.2, Passes(1, 2, 7)), (1.0, Passes(3, 0, 5))], **sizes, weight_bytes=2)
    assert found.forward.tolist() == [pytest.approx(7 * (20 + 30)), pytest.approx(3 * 5 * 130)]
    assert found.backward.tolist() == [pytest.approx(2 * 7 * (20 + 30)), 0]
    assert found.moved.tolist() == [pytest.approx(2 * 3 * (10 + 15)), pytest.approx(2 * 3 * 65)]
    assert found.dense_flops == found.dense_moved == 0 and search_cost([], **sizes).flops == 0
    rule = static_run(0.2)
    plain = run_cost(rule, steps=3, **SIZES)
    besides = run_cost(rule, steps=3, **SIZES, passes=lambda step: [Passes(2, 8, 4)] * (step != 1))
    assert besides.flops - plain.flops == pytest.approx(2 * 10 * 4 * (20 + 30))
    assert besides.bytes - plain.bytes == pytest.approx(2 * 10 * 4 * (10 + 15))
    assert (found + plain).ratio == pytest.approx((found.flops + plain.flops) / plain.dense_flops)
    with pytest.raises(ValueError, match=r"density of search must be in \[0, 1\], got 1.5"):
        search_cost([(1.5, Passes(1, 2, 7))], **sizes)
    with pytest.raises(ValueError, match="weight_bytes must be >= 1, got 0"):
        search_cost([], **sizes, weight_bytes=0)


def test_compact_moments_move_fewer_bytes():
    wide, compact = (run_cost(static_run(0.1, sparse_moments=s), steps=3, **SIZES) for s in (False, True))
    assert wide.bytes - compact.bytes == pytest.approx(4 * 6 * 0.9 * 50 * 3) and wide.flops == compact.flops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"tokens": 0}, "tokens must be >= 1, got 0"),
        ({"prunable_flops": -1.0}, "prunable_flops must be >= 0, got -1.0"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        run_cost(dense_run(), **{"steps": 1, **SIZES, **change})


def test_a_density_beyond_one_is_refused():
    with pytest.raises(ValueError, match=r"density of forward must be in \[0, 1\], got 1.5"):
        run_cost(static_run(1.5), steps=1, **SIZES)
    with pytest.raises(ValueError, match="got nan"):
        run_cost(static_run(float("nan")), steps=1, **SIZES)
    assert torch.isfinite(run_cost(static_run(0.0), steps=1, **SIZES).forward).all()
