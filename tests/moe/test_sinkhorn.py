"""Balanced assignment: the plan against a loop, the auction against brute force, balance, top-k in evaluation."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import MoE, TopKRouter
from moe.routers.sinkhorn import BalancedAssignmentRouter, SinkhornRouter, balanced_assignment, transport_plan
from tests.tolerances import close
from tests.typecheck import unchecked


def slow_plan(logits, iterations, temperature):
    """Scale columns, then rows, of exp(logits / temperature), with plain sums."""
    plan = [[math.exp(v / temperature) for v in row] for row in logits.tolist()]
    tokens, experts = len(plan), len(plan[0])
    for _ in range(iterations):
        sums = [sum(row[e] for row in plan) for e in range(experts)]
        plan = [[v / s * tokens / experts for v, s in zip(row, sums, strict=True)] for row in plan]
        plan = [[v / sum(row) for v in row] for row in plan]
    return torch.tensor(plan, dtype=torch.float64)


@pytest.mark.parametrize(("iterations", "temperature"), [(1, 1.0), (3, 0.5), (8, 2.0)])
def test_the_plan_equals_the_loop(iterations, temperature):
    logits = torch.randn(7, 3, dtype=torch.float64)
    plan = transport_plan(logits, iterations=iterations, temperature=temperature)
    close(plan.exp(), slow_plan(logits, iterations, temperature))


def test_many_iterations_balance_the_columns_and_huge_logits_do_not_overflow():
    plan = transport_plan(torch.randn(12, 4) * 2 + torch.tensor([3.0, 0, 0, 0]), iterations=300)
    close(plan.exp().sum(0), torch.full((4,), 3.0))
    close(plan.exp().sum(1), torch.ones(12))
    assert transport_plan(torch.randn(12, 4) * 1e4, iterations=8, temperature=0.01).isfinite().all()
    assert transport_plan(torch.zeros(0, 4), iterations=8).shape == (0, 4)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_near_the_largest_numbers_have_a_finite_plan(sign):
    logits = sign * 1e38 * torch.tensor([[1.0, 2.0], [1.5, 1.0], [3.0, 1.0]])
    plan = transport_plan(logits, iterations=8, temperature=1e-3)
    limit = transport_plan(logits.double(), iterations=8, temperature=1e8)
    assert plan.isfinite().all() and plan.argmax(1).equal(limit.argmax(1))


@pytest.mark.parametrize("temperature", [1e-12, 1e-38, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_plan_of_a_tiny_temperature_is_the_limit_of_small_ones(temperature, dtype):
    logits = 10 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    plan = transport_plan(logits, iterations=8, temperature=temperature)
    limit = transport_plan(logits.double(), iterations=8, temperature=1e-6)
    assert plan.isfinite().all() and plan.argmax(1).equal(limit.argmax(1))
    close(plan.exp(), limit.exp().to(dtype))
    router = SinkhornRouter(4, 4, temperature=temperature).to(dtype)
    router.load_state_dict({"weight": torch.eye(4)})
    assert router(logits).expert.equal(limit.argmax(1))
    assert transport_plan(torch.zeros(2, 2, dtype=dtype), iterations=3, temperature=temperature).exp().eq(0.5).all()


def test_logits_as_large_as_they_can_be_have_a_plan_and_an_assignment():
    most = torch.finfo(torch.float32).max
    logits = torch.tensor([[most, -most], [most, -most / 4], [-most, most]])
    assert transport_plan(logits, iterations=8).isfinite().all()
    values = torch.randn(40, 5)
    even = transport_plan(values, iterations=1, temperature=1e300)
    close(even.exp(), torch.full((40, 5), 0.2))
    best, tiny = (balanced_assignment(values, epsilon=epsilon) for epsilon in (1e-4, 1e-300))
    assert torch.bincount(tiny).tolist() == [8] * 5
    assert values.gather(1, tiny[:, None]).sum() >= values.gather(1, best[:, None]).sum() - 40 * 1e-4


def skewed_inputs(tokens=64, dim=6):
    x = torch.randn(tokens, dim, dtype=torch.float64)
    x[:, 0] = 3.0
    return x


def skew(router):
    with torch.no_grad():
        router.weight[0, 0] += 2.0
    return router.double()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_training_takes_the_plan_and_weighs_by_the_raw_logits(k, padded):
    router = skew(SinkhornRouter(6, 4, k=k, iterations=5, temperature=0.7))
    x = skewed_inputs(20).requires_grad_()
    real = torch.ones(20, dtype=torch.bool)
    real[[2, 9, 19]] = not padded
    routing = router(x, padding_mask=real if padded else None)
    rows = [t for t in range(20) if real[t]]
    logits = x @ router.weight.mT
    plan = slow_plan(logits[rows], 5, 0.7)
    expected = [sorted(range(4), key=lambda e: -plan[i, e].item())[:k] for i in range(len(rows))]
    assert routing.token.tolist() == [t for t in rows for _ in range(k)]
    assert routing.expert.view(-1, k).tolist() == expected
    gates = 1 / (1 + torch.exp(-logits)) if k == 1 else torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    weight = torch.stack([gates[t, e] for t, chosen in zip(rows, expected, strict=True) for e in chosen])
    close(routing.weight, weight)
    close(routing.scores[rows], (torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))[rows])
    coefficients = torch.randn_like(weight)
    actual = torch.autograd.grad((routing.weight * coefficients).sum(), [x, router.weight])
    wanted = torch.autograd.grad((weight * coefficients).sum(), [x, router.weight])
    for got, want in zip(actual, wanted, strict=True):
        close(got, want)


def test_three_routers_three_choices_and_all_are_top_k_in_evaluation():
    x = skewed_inputs()
    top = skew(TopKRouter(6, 4, k=1))
    loads, choices = [], []
    for router in (top, SinkhornRouter(6, 4).double(), BalancedAssignmentRouter(6, 4).double()):
        router.load_state_dict(top.state_dict())
        choices.append(router(x).expert)
        loads.append(torch.bincount(choices[-1], minlength=4).tolist())
        assert router.eval()(x).expert.equal(choices[0])
    assert loads[0][0] >= 40 and max(loads[1]) < 30, "Sinkhorn spreads what top-1 sends to expert 0"
    assert loads[2] == [16, 16, 16, 16] and loads[1] != loads[2], "only the auction is exact"
    assert len({tuple(c.tolist()) for c in choices}) == 3


def best_sum(values, capacity):
    """The largest sum over all assignments with these loads."""
    tokens, experts = values.shape
    sums = [
        sum(values[t, e].item() for t, e in enumerate(chosen))
        for chosen in itertools.product(range(experts), repeat=tokens)
        if [chosen.count(e) for e in range(experts)] == capacity
    ]
    return max(sums)


@pytest.mark.parametrize(
    ("tokens", "experts"), [(1, 1), (1, 3), (2, 3), (5, 1), (6, 2), (6, 3), (7, 3), (4, 4), (8, 3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_auction_equals_brute_force(tokens, experts, seed):
    values = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expert = balanced_assignment(values, rounds=10_000, epsilon=1e-4)
    loads = torch.bincount(expert, minlength=experts).tolist()
    assert sorted(loads) == sorted(len(range(e, tokens, experts)) for e in range(experts))
    reached = values.gather(1, expert[:, None]).sum().item()
    assert reached >= best_sum(values, loads) - tokens * 1e-4 - 1e-9
    if tokens % experts:
        demand = torch.bincount(values.argmax(1), minlength=experts)
        large = [e for e in range(experts) if loads[e] == max(loads)]
        assert min(demand[e] for e in large) >= max(demand[e] for e in range(experts) if e not in large)


def test_the_auction_is_within_tokens_times_epsilon_of_the_best_permutation():
    """Of 8 tokens for 8 experts with steps so large that bids which rise by a few epsilon end further off."""
    permutations = torch.tensor(list(itertools.permutations(range(8))))
    for seed in range(12):
        values = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = values[torch.arange(8), permutations].sum(1).max().item()
        for epsilon in (0.03, 0.1):
            expert = balanced_assignment(values, rounds=10_000, epsilon=epsilon)
            assert expert.sort().values.equal(torch.arange(8))
            assert values.gather(1, expert[:, None]).sum().item() >= best - 8 * epsilon - 1e-9, (seed, epsilon)


def test_the_auction_of_a_large_skewed_problem_ends_in_few_rounds():
    values = torch.randn(512, 16, dtype=torch.float64) + 2 * torch.randn(16, dtype=torch.float64)
    few, many = (
        values.gather(1, balanced_assignment(values, rounds=rounds, epsilon=1e-2)[:, None]).sum()
        for rounds in (100, 10_000)
    )
    assert few >= many - 512 * 1e-2
    fine = balanced_assignment(values, rounds=10_000, epsilon=1e-4)
    assert few >= values.gather(1, fine[:, None]).sum() - 512 * 1e-2, "within T·epsilon of the largest sum"
    assert torch.bincount(fine).tolist() == [32] * 16


def gained_by_the_best_exchange(values, expert):
    """What tokens that change places in a circle of experts can gain: an assignment is best if that is nothing."""
    experts = values.shape[1]
    gain = torch.full((experts, experts), -torch.inf, dtype=values.dtype)
    for e in range(experts):
        mine = values[expert == e]
        if len(mine):
            gain[e] = (mine - mine[:, e : e + 1]).amax(0)
    for between in range(experts):
        gain = torch.maximum(gain, gain[:, between : between + 1] + gain[between])
    return gain.diagonal().max().item()


@pytest.mark.parametrize("spread", ["one expert", "half of them", "all", "shifted"])
@pytest.mark.parametrize(("tokens", "experts"), [(256, 8), (300, 32)])
def test_values_far_apart_take_no_more_rounds_than_there_are(spread, tokens, experts):
    values = torch.randn(tokens, experts, dtype=torch.float64)
    some = {"one expert": slice(0, 1), "half of them": slice(0, experts // 2)}.get(spread, slice(None))
    values[:, some] *= 1e4 if spread == "all" else 30
    values[:, 0] += 100 * (spread == "shifted")
    expert = balanced_assignment(values)
    assert gained_by_the_best_exchange(values, expert) <= experts * 0.01
    assert torch.bincount(expert, minlength=experts).max() <= -(-tokens // experts)


def test_rounds_that_end_inside_a_finer_auction_leave_the_coarser_one():
    torch.manual_seed(1)  # 20 and 50 rounds end inside the second and a later one, with tokens that have no place
    values = 100 * torch.randn(300, 32, dtype=torch.float64)
    short, longer, best = (
        values.gather(1, balanced_assignment(values, rounds=rounds)[:, None]).sum() for rounds in (20, 50, 10_000)
    )
    assert short >= best - 20 and longer >= best - 1


rows = st.lists(st.lists(st.sampled_from([0.0, 0.0, 1.0, -3.0, 50.0]), min_size=4, max_size=4), min_size=0, max_size=13)


@given(rows, st.integers(0, 3))
def test_the_loads_are_balanced_after_any_number_of_rounds_whatever_ties(values, rounds):
    expert = balanced_assignment(torch.tensor(values).view(-1, 4), rounds=rounds)
    loads = torch.bincount(expert, minlength=4) if len(expert) else torch.zeros(4)
    assert (expert >= 0).all() and loads.max() - loads.min() <= 1


def test_without_a_round_the_tokens_of_best_value_come_first():
    values = torch.tensor([[1.0, 0.0], [4.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert balanced_assignment(values, rounds=0).tolist() == [1, 0, 0, 1]


def test_base_weighs_by_the_sigmoid_and_skips_padding():
    router = skew(BalancedAssignmentRouter(6, 4))
    x = skewed_inputs(10).requires_grad_()
    real = torch.tensor([True] * 7 + [False, True, False])
    routing = router(x, padding_mask=real)
    assert routing.token.tolist() == [0, 1, 2, 3, 4, 5, 6, 8] and routing.loads().tolist() == [2, 2, 2, 2]
    logits = x @ router.weight.mT
    expected = torch.stack(
        [1 / (1 + torch.exp(-logits[t, e])) for t, e in zip(routing.token, routing.expert, strict=True)]
    )
    close(routing.weight, expected)
    actual = torch.autograd.grad(routing.weight.square().sum(), [x, router.weight])
    for got, want in zip(actual, torch.autograd.grad(expected.square().sum(), [x, router.weight]), strict=True):
        close(got, want)


@pytest.mark.parametrize("build", [lambda: SinkhornRouter(6, 4, k=2), lambda: BalancedAssignmentRouter(6, 4)])
def test_replay_zero_tokens_and_the_layer(build):
    router = build()
    x, other = torch.randn(9, 6), torch.randn(9, 6)
    first = router(x)
    again = router(other, replay=first.detach())
    assert again.expert.equal(first.expert) and again.token.equal(first.token)
    assert again.weight.equal(router(other, replay=first).weight) and not again.weight.equal(first.weight)
    assert torch.autograd.grad(again.weight.sum(), router.weight)[0].abs().sum() > 0
    assert router(x[:0]).token.shape == (0,)
    layer = MoE(6, 5, 4, router)
    y, routing = layer(x)
    expected = torch.zeros(9, 6)
    for t, e, w in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        expected[t] += w * layer.experts.forward_one(e, x[t : t + 1])[0]
    close(y, expected)


@pytest.mark.parametrize("build", [lambda: SinkhornRouter(6, 4), lambda: BalancedAssignmentRouter(6, 4)])
def test_non_finite_logits_are_refused_unless_they_are_padding(build):
    router = build()
    x = torch.randn(3, 6)
    x[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="for 1 of 3 tokens"):
        router(x)
    assert router(x, padding_mask=torch.tensor([True, False, True])).token.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SinkhornRouter(0, 5), "dim must be >= 1, got 0"),
        (lambda: SinkhornRouter(6, 5, k=6), r"k must be in \[1, num_experts=5\], got 6"),
        (lambda: SinkhornRouter(6, 5, iterations=0), "iterations must be >= 1, got 0"),
        (lambda: SinkhornRouter(6, 5, temperature=0.0), "temperature must be a finite number > 0, got 0.0"),
        (lambda: BalancedAssignmentRouter(6, 0), "num_experts must be >= 1, got 0"),
        (lambda: BalancedAssignmentRouter(6, 5, rounds=0), "rounds must be >= 1, got 0"),
        (lambda: BalancedAssignmentRouter(6, 5, epsilon=math.inf), "epsilon must be a finite number > 0, got inf"),
        (lambda: balanced_assignment(torch.zeros(2, 2), rounds=-1), "rounds must be >= 0, got -1"),
        (lambda: BalancedAssignmentRouter(6, 5)(torch.randn(3, 7)), "x must have width dim=6, got 7"),
    ],
)
def test_bad_input_names_the_bound_and_the_value(build, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        build()
