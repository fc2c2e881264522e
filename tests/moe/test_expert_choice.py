"""Expert choice: equal loads, the loop's choices, weights and gradients, and a fixture that tells it from top-k."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import MoE, TopKRouter
from moe.routers.expert_choice import ExpertChoiceRouter, choose_tokens
from tests.tolerances import close
from tests.typecheck import unchecked


def loop(logits, capacity, real):
    """The combine weight of every expert on every token, by sorting one column of probabilities at a time."""
    odds = [[math.exp(value) for value in row] for row in logits.tolist()]
    shares = [[value / sum(row) for value in row] for row in odds]
    chosen = set()
    for e in range(logits.shape[1]):
        order = sorted((t for t in range(len(shares)) if real[t]), key=lambda t: -shares[t][e])
        chosen |= {(t, e) for t in order[:capacity]}
    mask = torch.zeros_like(logits)
    for t, e in chosen:
        mask[t, e] = 1
    return mask * torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True), sorted(chosen)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "capacity"),
    [
        (9, 4, 2.0, 5),
        (9, 4, 1.0, 3),
        (1, 4, 2.0, 1),
        (6, 1, 1.0, 6),
        (5, 3, 100.0, 5),
        (10, 10, 1.1, 2),
        (0, 3, 2.0, 0),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_choices_weights_and_gradients_equal_the_loop(tokens, experts, factor, capacity, padded):
    router = ExpertChoiceRouter(6, experts, capacity_factor=factor).double()
    x = torch.randn(tokens + 3 * padded, 6, dtype=torch.float64, requires_grad=True)
    real = torch.ones(len(x), dtype=torch.bool)
    real[min(1, tokens) :][: 3 * padded] = False
    routing = router(x, padding_mask=real if padded else None)
    expected, pairs = loop(x @ router.weight.mT, capacity, real.tolist())
    assert list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True)) == pairs, "token-major"
    assert routing.loads().tolist() == [capacity] * experts
    weights = routing.scores.new_zeros(len(x), experts).index_put((routing.token, routing.expert), routing.weight)
    close(weights, expected)
    coefficients = torch.randn_like(weights)
    wanted = [x, router.weight]
    actual = torch.autograd.grad((weights * coefficients).sum(), wanted)
    for got, want in zip(actual, torch.autograd.grad((expected * coefficients).sum(), wanted), strict=True):
        close(got, want)


def test_an_expert_compares_probabilities_and_not_logits_and_a_token_may_go_nowhere():
    # token 0 has the larger logit for expert 0, token 1 the larger probability
    router = ExpertChoiceRouter(2, 2, capacity_factor=1.0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    x = torch.tensor([[5.0, 5.0], [3.0, 0.0]])
    routing = router(x)
    assert (routing.token.tolist(), routing.expert.tolist()) == ([0, 1], [1, 0])
    x = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 2.0], [1.0, 0.9]])
    per_expert = router(x)
    per_token = TopKRouter(2, 2, k=1)
    per_token.load_state_dict(router.state_dict())
    assert (per_expert.token.tolist(), per_expert.expert.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert per_token(x).loads().tolist() != [2, 2], "top-k sends three or four tokens to expert 0"
    skewed = ExpertChoiceRouter(2, 2, capacity_factor=0.5)
    skewed.load_state_dict(router.state_dict())
    assert skewed(x).token.tolist() == [0, 2], "tokens 1 and 3 are taken by no expert"


ties = st.lists(st.lists(st.sampled_from([0.0, 1.0, -200.0]), min_size=3, max_size=3), min_size=0, max_size=8)


@given(ties, st.sampled_from([0.3, 1.0, 2.0, 9.0]), st.data())
def test_every_expert_takes_exactly_c_real_tokens_even_when_they_tie(rows, factor, data):
    flags = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    token, expert = choose_tokens(torch.tensor(rows).view(-1, 3), factor, torch.tensor(flags, dtype=torch.bool))
    capacity = min(sum(flags), math.ceil(sum(flags) * factor / 3 - 1e-9))
    assert torch.bincount(expert, minlength=3).tolist() == [capacity] * 3
    assert all(flags[t] for t in token.tolist())
    pairs = list(zip(token.tolist(), expert.tolist(), strict=True))
    assert pairs == sorted(set(pairs))


def test_a_tiny_factor_leaves_every_expert_one_token():
    assert ExpertChoiceRouter(8, 4, capacity_factor=1e-10)(torch.randn(6, 8)).loads().tolist() == [1] * 4
    assert ExpertChoiceRouter(8, 4, capacity_factor=1e-10)(torch.randn(0, 8)).loads().tolist() == [0] * 4


def test_underflowing_probabilities_still_compare():
    logits = torch.tensor([[0.0, -300.0], [0.0, -200.0], [0.0, -400.0]])
    token, expert = choose_tokens(logits, 0.6)
    assert token[expert == 1].tolist() == [1]


def test_a_replay_keeps_the_choice_and_takes_new_weights():
    router = ExpertChoiceRouter(6, 4)
    x, other = torch.randn(7, 6), torch.randn(7, 6)
    first = router(x)
    again = router(other, replay=first.detach())
    assert torch.equal(again.token, first.token) and torch.equal(again.expert, first.expert)
    close(again.weight, router(other).scores[first.token, first.expert])
    assert torch.autograd.grad(again.weight.sum(), router.weight)[0].abs().sum() > 0


def test_in_the_layer_every_token_sums_the_experts_that_took_it():
    layer = MoE(6, 5, 4, ExpertChoiceRouter(6, 4)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    y, routing = layer(x, padding_mask=mask)
    expected = torch.zeros(10, 6, dtype=torch.float64)
    for t, e, w in zip(routing.token.tolist(), routing.expert.tolist(), routing.weight, strict=True):
        expected[t] += w * layer.experts.forward_one(e, x.view(10, 6)[t : t + 1])[0]
    close(y.view(10, 6), expected)
    assert not y[1, 3:].any()


def test_it_says_that_it_sees_the_future():
    assert ExpertChoiceRouter.sees_future and not ExpertChoiceRouter(2, 2).allow_future
    assert ExpertChoiceRouter(2, 2, allow_future=True).allow_future


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_are_refused_unless_they_are_padding(value):
    router = ExpertChoiceRouter(6, 5)
    x = torch.randn(3, 6)
    x[1, 0] = value
    with pytest.raises(FloatingPointError, match="for 1 of 3 tokens"):
        router(x)
    assert 1 not in router(x, padding_mask=torch.tensor([True, False, True])).token.tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExpertChoiceRouter(0, 5), "dim must be >= 1, got 0"),
        (lambda: ExpertChoiceRouter(6, 0), "num_experts must be >= 1, got 0"),
        (lambda: ExpertChoiceRouter(6, 5, capacity_factor=0.0), "capacity_factor must be a finite number > 0, got 0.0"),
        (lambda: ExpertChoiceRouter(6, 5)(torch.randn(3, 7)), "x must have width dim=6, got 7"),
        (
            lambda: ExpertChoiceRouter(6, 5)(torch.randn(3, 6), padding_mask=torch.ones(2, dtype=torch.bool)),
            "padding_mask must have one entry for each of 3 tokens, got 2",
        ),
    ],
)
def test_bad_input_names_the_bound_and_the_value(build, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        build()
