"""Routing statistics: worked by hand, against loops, and invariants over random routings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import stats
from moe.dispatch import limit_capacity
from moe.routers import ExpertChoiceRouter, TopKRouter
from moe.routers.top_k import choose_top_k
from moe.routing import Routing
from moe.stats import (
    RoutingMeter,
    coactivation,
    coactivation_lift,
    count_together,
    dead_experts,
    drop_fractions,
    gate_mass,
    load_imbalance,
    load_variation,
    routing_stats,
    specialisation,
    top_tokens,
)
from tests.tolerances import close
from tests.typecheck import unchecked


def routing_of(pairs, scores, *, dropped=(), real=None) -> Routing:
    """A routing of the given (token, expert) pairs."""
    scores = torch.tensor(scores, dtype=torch.float64)
    pairs, dropped = (torch.tensor(p, dtype=torch.int64).view(-1, 2) for p in (pairs, dropped))
    return Routing(
        pairs[:, 0], pairs[:, 1], torch.ones(len(pairs)), scores.log(), scores, scores.shape[1], scores.shape[0],
        dropped=dropped, real=real,
    )  # fmt: skip


@st.composite
def routings(draw):
    """Top-k routings with padding and drops, and token ids of a vocabulary of 5."""
    tokens, experts = draw(st.integers(0, 20)), draw(st.integers(1, 6))
    k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(tokens, experts, generator=generator)
    real = torch.rand(tokens, generator=generator) < 0.8 if draw(st.booleans()) else None
    routing = choose_top_k(logits, k, renormalize=False, real=real)
    if draw(st.booleans()):
        routing = limit_capacity(routing, draw(st.floats(0.3, 1.5)))
    return routing, torch.randint(0, 5, (tokens,), generator=generator)


def test_numbers_worked_by_hand() -> None:
    scores = [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]
    routing = routing_of([(0, 0), (0, 1), (1, 0), (2, 0)], scores, dropped=[(1, 3), (2, 3)])
    figures = routing_stats(routing)
    assert figures.loads == (3, 1, 0, 0) and figures.drops == (0, 0, 0, 2)
    assert figures.imbalance == 3.0 and figures.idle == 0.5
    assert figures.drop_fraction == pytest.approx(2 / 6)
    assert figures.variation == pytest.approx(math.sqrt((4 + 0 + 1 + 1) / 4))
    assert figures.entropy == pytest.approx((math.log(2) + math.log(4)) / 3)
    assert figures.confidence == pytest.approx((1.0 + 0.5 + 1.0) / 3)
    assert drop_fractions(routing.loads(), routing.drops()).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_even_and_single_loads() -> None:
    even, single, none = torch.full((5,), 7), torch.tensor([0, 9, 0, 0, 0]), torch.zeros(5, dtype=torch.int64)
    assert [load_imbalance(x) for x in (even, single, none)] == [1.0, 5.0, 0.0]
    assert [load_variation(x) for x in (even, single, none)] == [0.0, pytest.approx(2.0), 0.0]


def test_gate_mass_leaves_padding_out_and_counts_a_token_that_nobody_took() -> None:
    scores = [[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]]
    real = torch.tensor([True, True, False])
    assert gate_mass(routing_of([(0, 0)], scores, real=real)).item() == pytest.approx(0.35)
    assert gate_mass(routing_of([], [[0.5, 0.5]], real=torch.tensor([False]))).item() == 0.0


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_dead_experts_are_those_of_a_loop(data) -> None:
    steps, experts, window = (data.draw(st.integers(low, 7)) for low in (0, 1, 1))
    loads = torch.randint(
        0, 2, (steps, experts), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    dead = dead_experts(loads, window=window)
    for step in range(steps):
        for expert in range(experts):
            seen = sum(int(loads[s, expert]) for s in range(max(0, step - window + 1), step + 1))
            assert bool(dead[step, expert]) == (seen == 0)


def test_pairs_by_hand() -> None:
    # experts 0 and 1 always together, 2 with 3 once and alone once
    routing = routing_of([(0, 0), (0, 1), (1, 0), (1, 1), (2, 2), (2, 3), (3, 2)], [[0.25] * 4] * 4)
    together = count_together(routing)
    assert together.tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [0, 0, 2, 1], [0, 0, 1, 1]]
    assert coactivation(together).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 1, 1]]
    # ordered pairs that met: 2·2 + 1·2 = 6; chances: Σ N_e N_f over all ordered pairs
    chances = sum(a * b for i, a in enumerate((2, 2, 2, 1)) for j, b in enumerate((2, 2, 2, 1)) if i != j)
    lift = coactivation_lift(together)
    assert lift[0, 1].item() == pytest.approx(2 * chances / (6 * 4))
    assert lift[2, 3].item() == pytest.approx(1 * chances / (6 * 2))
    assert lift[0, 2].item() == 0.0 and lift.diagonal().tolist() == [1.0] * 4


@settings(max_examples=60, deadline=None)
@given(routings())
def test_pairs_are_those_of_a_loop(drawn) -> None:
    routing, _ = drawn
    sets = [set() for _ in range(routing.num_tokens)]
    for token, expert in [
        *zip(routing.token.tolist(), routing.expert.tolist(), strict=True),
        *routing.dropped.tolist(),
    ]:
        sets[token].add(expert)
    expected = [
        [sum({e, f} <= s for s in sets) for f in range(routing.num_experts)] for e in range(routing.num_experts)
    ]
    together = count_together(routing)
    assert together.tolist() == expected
    lift = coactivation_lift(together)
    assert lift.isfinite().all() and (lift >= 0).all()
    close(lift, lift.mT)
    weights = (together.diagonal()[:, None] * together.diagonal()).double().fill_diagonal_(0)
    if weights.sum() and (together - together.diag().diag()).sum():
        assert ((lift * weights).sum() / weights.sum()).item() == pytest.approx(1.0)
    conditional = coactivation(together)
    assert (conditional <= 1).all()
    assert conditional.diagonal().tolist() == [float(n > 0) for n in together.diagonal().tolist()]


def test_pairs_over_more_tokens_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = TopKRouter(6, 5, k=3)(torch.randn(50, 6))
    whole = count_together(routing)
    monkeypatch.setattr(stats, "CHUNK", 7)
    assert count_together(routing).equal(whole)
    assert whole.sum() == 50 * 9


def test_dropped_pairs_count_in_the_chunk_of_their_token():
    # drops come after all assignments, whatever their token
    every = torch.arange(2 * stats.CHUNK + 5)
    routing = routing_of(
        [(t, 0) for t in every.tolist()], [[0.5, 0.5]] * len(every), dropped=[(t, 1) for t in every.tolist()]
    )
    assert count_together(routing).tolist() == [[len(every)] * 2] * 2


@settings(max_examples=60, deadline=None)
@given(routings(), routings())
def test_a_meter_adds_batches_up(first, second) -> None:
    """Two updates equal the sums over both, whatever the sizes of the batches."""
    experts = first[0].num_experts
    if second[0].num_experts != experts:
        second = (choose_top_k(torch.randn(9, experts), 1, renormalize=False), torch.arange(9) % 5)
    meter = RoutingMeter(experts, vocab_size=5)
    for routing, ids in (first, second):
        meter.update(routing, token_ids=ids)
    result = meter.result()
    both = [routing for routing, _ in (first, second)]
    tokens = [r.num_tokens - r.padding for r in both]
    assert result.tokens == sum(tokens)
    assert result.loads.equal(both[0].loads() + both[1].loads())
    assert result.drops.equal(both[0].drops() + both[1].drops())
    assert result.together.equal(count_together(both[0]) + count_together(both[1]))
    expected = torch.zeros(experts, 5, dtype=torch.int64)
    for routing, ids in (first, second):
        for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
            expected[expert, ids[token]] += 1
    assert result.taken is not None and result.taken.equal(expected)
    entropy = sum(r.entropy().item() * n for r, n in zip(both, tokens, strict=True)) / max(sum(tokens), 1)
    assert result.entropy == pytest.approx(entropy) and 0 <= result.confidence <= 1 + 1e-6
    close(result.taken.sum(1), result.loads)


def test_a_result_stays_when_the_meter_goes_on() -> None:
    meter = RoutingMeter(4, vocab_size=3)
    routing, ids = TopKRouter(6, 4, k=2)(torch.randn(5, 6)), torch.tensor([0, 1, 2, 0, 1])
    meter.update(routing, token_ids=ids)
    before = meter.result()
    kept = (before.loads.clone(), before.together.clone(), before.taken.clone())
    meter.update(routing, token_ids=ids)
    assert all(a.equal(b) for a, b in zip(kept, (before.loads, before.together, before.taken), strict=True))
    empty = RoutingMeter(4).result()
    assert empty.tokens == 0 and empty.entropy == 0.0 and empty.taken is None


def test_tokens_that_an_expert_takes() -> None:
    taken = torch.tensor([[8, 2, 0], [0, 2, 8], [0, 0, 0]])
    # p(v) = (.4, .2, .4); expert 0 has (.8, .2, 0): KL = .8 ln 2
    close(specialisation(taken), torch.tensor([0.8 * math.log(2), 0.8 * math.log(2), 0.0], dtype=torch.float64))
    first, second, none = top_tokens(taken, count=2)
    assert none == () and [t.token_id for t in second] == [2]
    (token,) = first
    assert (token.token_id, token.count, token.share, token.routed, token.lift) == (0, 8, 0.8, 1.0, 2.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5))
def test_specialisation_is_mutual_information(rows) -> None:
    taken = torch.tensor(rows)
    total = taken.sum().item()
    each = specialisation(taken)
    assert (each >= -1e-12).all()
    information = sum(
        n / total * math.log(n * total / (taken[e].sum().item() * taken[:, v].sum().item()))
        for e, row in enumerate(rows)
        for v, n in enumerate(row)
        if n
    )
    assert (taken.sum(1).double() / max(total, 1) @ each).item() == pytest.approx(information, abs=1e-9)
    assert information <= math.log(len(rows)) + 1e-9
    for tokens in top_tokens(taken, count=3):
        assert len(tokens) <= 3 and all(t.lift > 1 and 0 < t.share <= 1 and 0 < t.routed <= 1 for t in tokens)
        gains = [t.share * math.log(t.lift) for t in tokens]
        assert gains == pytest.approx(sorted(gains, reverse=True))


def test_one_expert_has_nothing_special_and_ids_that_decide_give_ln_e() -> None:
    assert specialisation(torch.tensor([[3, 4, 5]])).item() == pytest.approx(0.0)
    assert specialisation(torch.eye(4, dtype=torch.int64) * 5).tolist() == pytest.approx([math.log(4)] * 4)


def test_a_token_may_have_any_number_of_experts() -> None:
    routing = ExpertChoiceRouter(6, 4, capacity_factor=2.0)(torch.randn(12, 6))
    together = count_together(routing)
    assert together.diagonal().tolist() == routing.loads().tolist()


def test_bad_input() -> None:
    routing = TopKRouter(6, 4, k=2)(torch.randn(5, 6))
    for options, message in (
        ({"num_experts": 0}, r"num_experts must be >= 1, got 0"),
        ({"num_experts": 4, "vocab_size": 0}, r"vocab_size must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingMeter(**options)
    with pytest.raises(ValueError, match=r"num_experts=3, got 4"):
        RoutingMeter(3).update(routing)
    with pytest.raises(ValueError, match=r"one entry for each of 5 tokens, got None"):
        RoutingMeter(4, vocab_size=9).update(routing)
    with pytest.raises(ValueError, match=r"one entry for each of 5 tokens, got 4"), unchecked():
        RoutingMeter(4, vocab_size=9).update(routing, token_ids=torch.arange(4))
    with pytest.raises(ValueError, match=r"must be None for a meter without vocab_size"):
        RoutingMeter(4).update(routing, token_ids=torch.arange(5))
    for bad in (-1, 9):
        meter = RoutingMeter(4, vocab_size=9)
        with pytest.raises(ValueError, match=rf"in \[0, vocab_size=9\), got {bad}"):
            meter.update(routing, token_ids=torch.tensor([0, 1, bad, 3, 4]))
        assert meter.result().tokens == 0 and meter.result().loads.sum() == 0
    with pytest.raises(ValueError, match=r"window must be >= 1, got 0"):
        dead_experts(torch.zeros(2, 2, dtype=torch.int64), window=0)
    with pytest.raises(ValueError, match=r"count must be >= 1, got 0"):
        top_tokens(torch.ones(2, 2, dtype=torch.int64), count=0)
