"""Side losses and statistics by hand, under padding and under drops."""

import math

import pytest
import torch

from moe import load_balancing_loss, router_z_loss, routing_stats
from moe.dispatch import limit_capacity
from moe.routers.top_k import choose_top_k
from tests.tolerances import close


@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_routing_costs_one_whatever_k(k):
    logits = torch.zeros(8, 4)
    for t in range(8):
        logits[t, [(t + i) % 4 for i in range(k)]] = 1e-6
    routing = choose_top_k(logits, k, renormalize=True)
    close(load_balancing_loss(routing), torch.tensor(1.0))
    close(routing.entropy(), torch.tensor(math.log(4)))


def test_collapse_costs_the_number_of_experts():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    routing = choose_top_k(logits, 1, renormalize=False)
    close(load_balancing_loss(routing), torch.tensor(4.0))
    close(routing.entropy(), torch.tensor(0.0))
    close(router_z_loss(routing), torch.tensor(2500.0))


def test_values_and_gradient_against_the_formula_with_padding_and_drops():
    logits = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([True] * 7 + [False] * 3)
    routing = limit_capacity(choose_top_k(logits, 2, renormalize=True, real=real), 0.75)
    assert routing.dropped.shape[0] > 0
    p = torch.softmax(logits[:7], -1)
    chosen = [e for t in range(7) for e in sorted(range(3), key=lambda e: -logits[t, e].item())[:2]]
    share = torch.tensor([chosen.count(e) / 14 for e in range(3)], dtype=torch.float64)
    balance = 3 * (share * p.mean(0)).sum()
    z = (logits[:7].exp().sum(-1).log() ** 2).mean()
    close(load_balancing_loss(routing), balance)
    close(router_z_loss(routing), z)
    close(routing.entropy(), -(p * p.log()).sum(-1).mean())
    got, wanted = (torch.autograd.grad(a + b, logits, retain_graph=True)[0] for a, b in (
        (load_balancing_loss(routing), router_z_loss(routing)), (balance, z)
    ))  # fmt: skip
    close(got, wanted)
    assert not got[7:].any()


def test_padding_of_any_value_leaves_the_gradient_finite():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]], requires_grad=True)
    routing = choose_top_k(logits, 1, renormalize=False, real=torch.tensor([True, False]))
    total = load_balancing_loss(routing) + router_z_loss(routing)
    assert torch.isfinite(total)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_real_token_costs_nothing(num_tokens):
    logits = torch.randn(num_tokens, 4, requires_grad=True)
    routing = choose_top_k(logits, 2, renormalize=True, real=torch.zeros(num_tokens, dtype=torch.bool))
    assert all(v.item() == 0.0 for v in (load_balancing_loss(routing), router_z_loss(routing), routing.entropy()))
    assert routing_stats(routing).imbalance == 0.0 and routing.padding == num_tokens


def test_stats_by_hand():
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    stats = routing_stats(limit_capacity(choose_top_k(logits, 1, renormalize=False), 1.5))
    assert stats.loads == (2, 1, 0) and stats.drops == (1, 0, 0)
    assert stats.imbalance == 2.0 and stats.idle == pytest.approx(1 / 3) and stats.drop_fraction == 0.25


def test_detach_keeps_the_choice_and_drops_the_history():
    logits = torch.randn(5, 3, requires_grad=True)
    kept = choose_top_k(logits, 2, renormalize=True).detach()
    assert not (kept.weight.requires_grad or kept.logits.requires_grad or kept.scores.requires_grad)
