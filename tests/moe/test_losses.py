"""Side losses and statistics by hand, under padding and under drops."""

import dataclasses
import math

import pytest
import torch

from moe import SigmoidRouter, SinkhornRouter, load_balancing_loss, router_z_loss, routing_stats
from moe.dispatch import limit_capacity
from moe.losses import entropy_loss, importance_loss, squared_variation
from moe.routers.top_k import choose_top_k
from tests.tolerances import close
from tests.training.spawning import spawn
from tests.typecheck import unchecked


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


def test_of_first_choices_alone_the_best_of_those_made_counts():
    """A replayed choice may leave out the expert of the largest score."""
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    routing = choose_top_k(logits, 2, renormalize=True)
    routing = dataclasses.replace(routing, expert=torch.tensor([2, 1]), balance_first=True)
    close(load_balancing_loss(routing), torch.tensor(3 * 0.3))


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


def slow_balance(p, chosen, rows) -> torch.Tensor:
    """E · Σ f P over the tokens in ``rows``, the choices of each in ``chosen``."""
    experts = p.shape[1]
    picks = [e for t in rows for e in chosen[t]]
    mean = sum(p[t] for t in rows) / len(rows)
    return experts * sum(picks.count(e) / len(picks) * mean[e] for e in range(experts))


def test_sequence_scope_is_the_mean_over_sequences_with_real_tokens():
    logits = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([True] * 5 + [True, False, True, False, False] + [False] * 5 + [True] * 4 + [False])
    routing = limit_capacity(choose_top_k(logits, 2, renormalize=True, real=real), 0.75)
    assert routing.dropped.shape[0] > 0
    p = torch.softmax(logits, -1)
    chosen = [logits[t].topk(2).indices.tolist() for t in range(20)]
    runs = [[t for t in range(s, s + 5) if real[t]] for s in (0, 5, 15)]
    expected = sum(slow_balance(p, chosen, rows) for rows in runs) / 3
    loss = load_balancing_loss(routing, scope="sequence", sequences=4)
    close(loss, expected)
    close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)))
    assert abs(loss.item() - load_balancing_loss(routing).item()) > 1e-3, "the scopes differ"
    close(load_balancing_loss(routing, scope="sequence", sequences=1), load_balancing_loss(routing))


@pytest.mark.parametrize("sequences", [1, 3])
def test_sequence_scope_of_no_token_is_zero(sequences):
    routing = choose_top_k(torch.randn(0, 4), 2, renormalize=True)
    assert load_balancing_loss(routing, scope="sequence", sequences=sequences).item() == 0.0


def test_global_scope_alone_is_the_micro_batch():
    routing = choose_top_k(torch.randn(9, 4), 2, renormalize=True)
    assert torch.equal(load_balancing_loss(routing, scope="global"), load_balancing_loss(routing))


def test_two_processes_average_to_the_global_batch(tmp_path):
    logits = torch.randn(20, 3, dtype=torch.float64)
    real = torch.tensor([True] * 10 + [True] * 4 + [False] * 6)
    torch.save((logits, real), tmp_path / "in.pt")
    spawn("tests.moe.loss_ranks", 2, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    (loss, grad, bias), (other_loss, other_grad, other_bias) = one, other
    whole = logits.requires_grad_()
    expected = load_balancing_loss(choose_top_k(whole, 2, renormalize=True, real=real))
    close((loss + other_loss) / 2, expected)
    close(torch.cat([grad, other_grad]) / 2, torch.autograd.grad(expected, whole)[0])
    close(bias, torch.tensor([0.0, -1e-3, 1e-3, 1e-3]))
    assert bias.equal(other_bias)


def test_entropy_loss_by_hand_with_padding():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([True, True, False, True, True, False])
    loss = entropy_loss(choose_top_k(logits, 1, renormalize=False, real=real))
    mean = torch.softmax(logits, -1)[real].mean(0)
    expected = math.log(4) + sum(m * torch.log(m) for m in mean)
    close(loss, expected)
    close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)))
    certain = 1000.0 * torch.eye(4)[[0, 0]].requires_grad_()
    collapsed = entropy_loss(choose_top_k(certain, 1, renormalize=False))
    close(collapsed, torch.tensor(math.log(4)))
    assert torch.autograd.grad(collapsed, certain)[0].isfinite().all(), "probabilities of 0 leave a finite gradient"
    close(entropy_loss(choose_top_k(1000.0 * torch.eye(4), 1, renormalize=False)), torch.tensor(0.0))


def test_importance_loss_by_hand():
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(6, 1)
    close(importance_loss(choose_top_k(logits, 1, renormalize=False)), torch.tensor(3.0))
    close(importance_loss(choose_top_k(torch.eye(4), 1, renormalize=True)), torch.tensor(0.0))
    assert importance_loss(choose_top_k(logits[:0], 1, renormalize=False)).item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, "scope must be one of micro_batch, sequence, global, got 'layer'"),
        ({"scope": "sequence"}, "sequences must be given for scope='sequence' and no other, got None for 'sequence'"),
        ({"sequences": 3}, "sequences must be given for scope='sequence' and no other, got 3 for 'micro_batch'"),
        ({"scope": "sequence", "sequences": 4}, "sequences must divide the number of tokens 9, got 4"),
        ({"scope": "sequence", "sequences": 0}, "sequences must divide the number of tokens 9, got 0"),
    ],
)
def test_a_scope_that_does_not_fit_is_refused(options, message):
    routing = choose_top_k(torch.randn(9, 4), 2, renormalize=True)
    with unchecked(), pytest.raises(ValueError, match=message):
        load_balancing_loss(routing, **options)


def test_sequence_scope_counts_the_best_scores_whatever_the_bias_chose():
    """DeepSeek-V3, eq. 18: f is over the top of the scores themselves."""
    router = SigmoidRouter(4, 4, k=1)
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 10.0]))
    x = torch.randn(6, 4)
    routing = router.eval()(x)
    assert set(routing.expert.tolist()) == {3}
    p = routing.scores
    best = p.argmax(-1)
    expected = 4 * sum((best == e).float().mean() * p[:, e].mean() for e in range(4))
    close(load_balancing_loss(routing, scope="sequence", sequences=1), expected)
    assert abs(expected - load_balancing_loss(routing)) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-22, 1e20, 1e37])
def test_squared_variation_knows_no_scale(scale):
    values = (torch.tensor([1.0, 2.0]) * scale).requires_grad_()
    found = squared_variation(values)
    close(found, torch.tensor(1 / 9))
    (gradient,) = torch.autograd.grad(found, values)
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(exact.var(correction=0) / exact.mean().square(), exact)
    close(gradient.double() * scale, wanted, torch.float32)
    assert squared_variation(torch.zeros(3)) == 0


def test_importance_of_all_but_closed_gates_is_finite():
    router = SinkhornRouter(4, 2).eval()
    with torch.no_grad():
        router.weight.fill_(-15.0)
    loss = importance_loss(router(torch.ones(3, 4)))
    assert loss.isfinite()
    loss.backward()
    assert router.weight.grad.isfinite().all()
