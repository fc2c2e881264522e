"""The sigmoid router: chosen by σ + bias, weighed by σ, limited by groups; the bias moves once a step."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import MoE, TopKRouter
from moe.dispatch import limit_capacity
from moe.routers.sigmoid import SigmoidRouter, limit_groups
from tests.tolerances import close
from tests.typecheck import unchecked


def slow_weights(router: SigmoidRouter, x: torch.Tensor, real: list[bool]) -> torch.Tensor:
    """Loops: the weight of every expert on every token."""
    size = router.num_experts // router.num_groups
    rows = []
    for t in range(x.shape[0]):
        row = [x.new_zeros(())] * router.num_experts
        if real[t]:
            sigmoids = [1 / (1 + torch.exp(-(x[t] * router.weight[e]).sum())) for e in range(router.num_experts)]
            biased = [s.item() + b for s, b in zip(sigmoids, router.bias.tolist(), strict=True)]
            groups = [list(range(g * size, (g + 1) * size)) for g in range(router.num_groups)]
            groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
            allowed = [e for group in groups[: router.top_groups] for e in group]
            chosen = sorted(allowed, key=lambda e: -biased[e])[: router.k]
            total = sum(sigmoids[e] for e in chosen) if router.renormalize else 1.0
            for e in chosen:
                row[e] = router.scale * sigmoids[e] / total
        rows.append(torch.stack(row))
    return torch.stack(rows)


def dense(routing) -> torch.Tensor:
    weights = routing.scores.new_zeros(routing.num_tokens, routing.num_experts)
    return weights.index_put((routing.token, routing.expert), routing.weight)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("experts", "k", "num_groups", "top_groups"),
    [(6, 2, 1, 1), (6, 6, 1, 1), (6, 2, 3, 1), (6, 3, 3, 2), (8, 3, 2, 1), (5, 2, 5, 2), (1, 1, 1, 1), (12, 4, 4, 3)],
)
def test_weights_and_gradients_equal_the_loop(experts, k, num_groups, top_groups, renormalize):
    router = SigmoidRouter(
        7, experts, k=k, num_groups=num_groups, top_groups=top_groups, scale=2.5, renormalize=renormalize
    ).double()
    router.bias.copy_(torch.randn(experts) / 4)
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    real = [True] * 7 + [False, True, False, True]
    routing = router(x, padding_mask=torch.tensor(real))
    expected = slow_weights(router, x, real)
    close(dense(routing), expected)
    coefficients = torch.randn(11, experts, dtype=torch.float64)
    fast, slow = (torch.autograd.grad((w * coefficients).sum(), [x, router.weight]) for w in (dense(routing), expected))
    for got, wanted in zip(fast, slow, strict=True):
        close(got, wanted)
    sigmoid = (x[torch.tensor(real)] @ router.weight.mT).sigmoid()
    close(routing.scores[torch.tensor(real)], sigmoid / sigmoid.sum(-1, keepdim=True))


def test_the_bias_chooses_and_does_not_weigh():
    router = SigmoidRouter(4, 4, k=2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    x = torch.tensor([[2.0, 1.0, -1.0, -3.0]])
    assert router(x).expert.tolist() == [0, 1]
    router.bias[3] = 5.0
    routing = router(x)
    assert routing.expert.tolist() == [3, 0]
    s = torch.sigmoid(torch.tensor([-3.0, 2.0]))
    close(routing.weight, s / s.sum())


def test_weights_differ_from_those_of_a_softmax_over_the_same_choice():
    sigmoid, softmax = SigmoidRouter(4, 4, k=2), TopKRouter(4, 4, k=2)
    softmax.load_state_dict({"weight": sigmoid.weight.detach()})
    x = torch.randn(6, 4)
    assert torch.equal(sigmoid(x).expert, softmax(x).expert)
    assert not torch.allclose(sigmoid(x).weight, softmax(x).weight, atol=1e-3)


def test_groups_change_the_choice_by_their_two_best():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5], [0.9, 0.3, 0.6, 0.5]])
    kept = limit_groups(scores, 2, 1)
    assert kept.isfinite().tolist() == [[False, False, True, True], [True, True, False, False]]
    assert limit_groups(scores - 2.0, 2, 1).argmax(-1).tolist() == [2, 0], "negative scores stay above removed ones"
    plain, grouped = SigmoidRouter(4, 4, k=1), SigmoidRouter(4, 4, k=1, num_groups=2, top_groups=1)
    for router in (plain, grouped):
        router.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    x = torch.logit(scores[:1])
    assert plain(x).expert.tolist() == [0] and grouped(x).expert.tolist() == [2]


@given(st.integers(0, 9), st.sampled_from([(8, 2, 1), (8, 4, 2), (6, 3, 3), (6, 6, 2)]), st.data())
def test_choices_are_distinct_and_come_from_at_most_top_groups(tokens, sizes, data):
    experts, num_groups, top_groups = sizes
    k = data.draw(st.integers(1, top_groups * experts // num_groups))
    router = SigmoidRouter(3, experts, k=k, num_groups=num_groups, top_groups=top_groups)
    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(tokens)).round()
    routing = router(x)
    assert routing.token.tolist() == [t for t in range(tokens) for _ in range(k)]
    for chosen in routing.expert.view(-1, k).tolist():
        assert len(set(chosen)) == k and len({e * num_groups // experts for e in chosen}) <= top_groups
    close(routing.weight.view(-1, k).sum(-1), torch.ones(tokens))


def test_after_step_moves_the_bias_against_the_load_of_all_micro_batches():
    router = SigmoidRouter(4, 4, k=1, bias_update=0.01)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    for chosen in ([0, 0, 0, 1], [0, 2, 1, 1]):
        router(10.0 * torch.eye(4)[chosen])
    assert router.pending_loads().tolist() == [4, 3, 1, 0]
    router.after_step()
    close(router.bias, torch.tensor([-0.01, -0.01, 0.01, 0.01]))
    assert router.pending_loads().tolist() == [0, 0, 0, 0]
    router.after_step()
    close(router.bias, torch.tensor([-0.01, -0.01, 0.01, 0.01]))
    router(10.0 * torch.eye(4))
    router.after_step()
    close(router.bias, torch.tensor([-0.01, -0.01, 0.01, 0.01]), torch.float32)


def test_evaluation_replays_and_padding_count_for_nothing():
    router = SigmoidRouter(4, 6, k=2)
    x = torch.randn(5, 4)
    routing = router(x, padding_mask=torch.tensor([True, True, False, True, False]))
    counted = router.pending_loads()
    assert counted.equal(routing.loads()) and int(counted.sum()) == 6
    router(x, replay=router.eval()(x))
    router.train()(x, replay=routing)
    assert router.pending_loads().equal(counted)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_replay", [False, True])
def test_recomputation_under_checkpointing_counts_once(use_reentrant, with_replay):
    layer = MoE(4, 6, 6, SigmoidRouter(4, 6, k=2))
    x = torch.randn(9, 4, requires_grad=True)
    runs, recorded = [], []

    def run(x):
        runs.append(1)
        if with_replay and not recorded:
            with torch.no_grad():
                recorded.append(layer.route(x))
        return layer(x, replay=recorded[0] if recorded else None)[0]

    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()
    assert len(runs) == 2 and layer.router.pending_loads().equal(layer.eval().route(x).loads())


def test_loads_are_counted_before_capacity_drops_any():
    layer = MoE(4, 6, 6, SigmoidRouter(4, 6, k=2), capacity_factor=0.5)
    _, routing = layer(torch.randn(9, 4))
    assert routing.dropped.shape[0] > 0
    assert layer.router.pending_loads().equal(routing.choices())


def test_all_processes_move_alike(monkeypatch):
    here, there = (SigmoidRouter(4, 4, k=1) for _ in range(2))
    for router in (here, there):
        router.load_state_dict({"weight": torch.eye(4), "bias": torch.zeros(4)})
    here(torch.eye(4)[[0, 0, 1]])
    there(torch.eye(4)[[1, 1, 1, 2, 3]])
    sums = here.pending_loads() + there.pending_loads()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts, group=None: counts.copy_(sums))
    for router in (here, there):
        router.after_step()
    assert here.bias.equal(there.bias)
    close(here.bias, torch.tensor([0.0, -1e-3, 1e-3, 1e-3]))


def test_balance_improves_while_the_bias_moves():
    torch.manual_seed(1)
    router = SigmoidRouter(8, 8, k=2, bias_update=0.01)
    x = torch.randn(256, 8) + 1.0
    first = router(x).loads()
    router.after_step()
    for _ in range(100):
        router(x)
        router.after_step()
    last = router(x).loads()
    assert last.max() < 0.6 * first.max() and last.min() > first.min()


def test_a_replay_repeats_the_choice_drops_included_and_recomputes_the_weights():
    router = SigmoidRouter(4, 6, k=2, scale=1.5).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    recorded = limit_capacity(router(x), 0.5)
    again = router(x, replay=recorded)
    close(again.weight, recorded.weight)
    with torch.no_grad():
        router.weight.neg_()
    router.bias += torch.randn(6)
    moved = router(x, replay=recorded)
    assert moved.expert.equal(recorded.expert) and moved.dropped.equal(recorded.dropped)
    assert not torch.allclose(moved.weight, recorded.weight)
    with pytest.raises(ValueError, match=r"replay must hold \(tokens, experts\)=\(8, 6\), got \(9, 6\)"):
        router(x[:8], replay=recorded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_bias_is_float32_saved_and_no_parameter(dtype):
    router = SigmoidRouter(4, 4, k=2)
    router.bias += 0.5 + 1e-3
    moved = copy.deepcopy(router).to(dtype)
    assert moved.weight.dtype == dtype and moved.bias.dtype == torch.float32 and moved.bias.equal(router.bias)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    fresh = SigmoidRouter(4, 4, k=2)
    fresh.load_state_dict(router.state_dict())
    assert sorted(router.state_dict()) == ["bias", "weight"] and fresh.bias.equal(router.bias)
    x = torch.randn(3, 4, dtype=dtype)
    assert moved(x).weight.dtype == torch.promote_types(dtype, torch.float32)


def test_sigmoids_that_all_underflow_still_weigh_by_their_ratio():
    router = SigmoidRouter(2, 2, k=2)
    router.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
    x = torch.tensor([[-200.0, -200.0 - math.log(3.0)]], requires_grad=True)
    routing = router(x)
    assert sorted(routing.weight.tolist()) == pytest.approx([0.25, 0.75], rel=1e-4)
    assert torch.autograd.grad(routing.weight[0], x)[0].isfinite().all()


def test_no_tokens_and_no_numbers():
    router = SigmoidRouter(4, 4, k=2, num_groups=2, top_groups=1)
    assert router(torch.randn(0, 4)).loads().tolist() == [0, 0, 0, 0]
    router.after_step()
    assert not router.bias.any()
    with pytest.raises(FloatingPointError, match="router logits must be finite, got NaN or infinity for 1 of 2 tokens"):
        router(torch.tensor([[0.0] * 4, [torch.nan] * 4]))
    assert not router.pending_loads().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_token_is_routed_by_a_bias_that_is_no_number(value):
    layer = MoE(4, 6, 4, SigmoidRouter(4, 4, k=2), name="layers.3")
    layer.router.bias[1:3] = value
    message = r"layers\.3: the router's bias must be finite, got NaN or infinity for 2 of 4 experts"
    with pytest.raises(FloatingPointError, match=message):
        layer(torch.randn(5, 4))
    assert not layer.router.pending_loads().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, r"k must be in \[1, num_experts=4\], got 5"),
        ({"k": 1, "num_groups": 3}, "num_groups must divide num_experts=4, got 3"),
        ({"k": 1, "num_groups": 0}, "num_groups must divide num_experts=4, got 0"),
        ({"k": 1, "num_groups": 2, "top_groups": 3}, r"top_groups must be in \[1, num_groups=2\], got 3"),
        ({"k": 3, "num_groups": 2}, r"k must be at most top_groups · num_experts / num_groups = 2, got 3"),
        ({"k": 1, "scale": 0.0}, "scale must be a finite number > 0, got 0.0"),
        ({"k": 1, "scale": math.nan}, "scale must be a finite number > 0, got nan"),
        ({"k": 1, "bias_update": -1.0}, "bias_update must be a finite number >= 0, got -1.0"),
    ],
)
def test_bad_options_name_the_bound_and_the_value(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        SigmoidRouter(4, 4, **options)


def test_groups_shrink_with_their_experts_or_stay_whole():
    layer = MoE(4, 6, 8, SigmoidRouter(4, 8, k=1, num_groups=4, top_groups=3))
    for uneven in ([0, 1, 2], [0, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="kept must leave equally many experts in each group that stays"):
            layer.keep_experts(uneven)
        assert layer.num_experts == layer.router.num_experts == 8 and layer.router.num_groups == 4
    layer.router.bias += torch.arange(8.0)
    layer.keep_experts([2, 3, 6, 7])
    assert (layer.router.num_groups, layer.router.top_groups) == (2, 2)
    assert layer.router.bias.tolist() == [2.0, 3.0, 6.0, 7.0]
    layer = MoE(4, 6, 8, SigmoidRouter(4, 8, k=1, num_groups=4, top_groups=3))
    layer.keep_experts([1, 2, 4, 7])
    assert (layer.router.num_groups, layer.router.top_groups) == (4, 3)
