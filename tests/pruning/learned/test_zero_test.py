"""Prechelt's pruning by the statistic of Finnoff, Hergert & Zimmermann, against loops in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import uniform
from pruning.retraining import GeneralizationDriven, ZeroTest, count_below
from tests.pruning.learned.fixtures import make_optimizer, net, train
from tests.tolerances import close
from tests.training.models import small_model
from tests.typecheck import unchecked
from training.sparsify_config import SparsifyConfig, check_sparsify
from training.sparsity import make_sparsifiers


def lprune(model, **options):
    return GeneralizationDriven(model, **{"sparsity": 0.8, "most": 2 / 3, "criterion": "statistic", **options})


def written_out(weights, gradients, rates):
    """T of one weight from the lists of its values, gradients and rates."""
    total, moves = 0.0, [rate * gradient for rate, gradient in zip(rates, gradients, strict=True)]
    for weight, move in zip(weights, moves, strict=True):
        total += weight - move
    mean = sum(moves) / len(moves)
    spread = math.sqrt(sum((move - mean) ** 2 for move in moves))
    return math.log(max(abs(total), torch.finfo(torch.float32).tiny) / spread) if spread else math.inf


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_statistic_is_that_of_the_lists(steps, seed):
    drawn = np.random.default_rng(seed)
    weights, gradients = drawn.integers(-9, 10, size=(2, steps, 3, 2)).astype(np.float32) / 8  # sums are exact
    rates = drawn.choice([0.25, 0.5, 1.0], size=steps)
    gradients[:, 0, 0] = 0
    test = ZeroTest({"a": torch.zeros(3, 2)})
    for weight, gradient, rate in zip(weights, gradients, rates, strict=True):
        test.take({"a": torch.tensor(weight)}, {"a": float(rate) * torch.tensor(gradient)})
    wanted = [[written_out(weights[:, i, j], gradients[:, i, j], rates) for j in range(2)] for i in range(3)]
    assert math.isinf(wanted[0][0])
    close(test.statistic()["a"], torch.tensor(wanted))


def test_at_one_rate_it_is_the_papers():
    weights, gradients, rate = [0.5, 0.4, 0.45], [0.2, -0.1, 0.3], 0.3
    total = abs(sum(w - rate * g for w, g in zip(weights, gradients, strict=True)))
    mean = sum(gradients) / 3
    paper = math.log(total / (rate * math.sqrt(sum((g - mean) ** 2 for g in gradients))))
    assert written_out(weights, gradients, [rate] * 3) == pytest.approx(paper)


def test_as_many_are_below_as_a_loop_counts():
    statistics = {"a": torch.tensor([[1.0, -2.0], [7.0, math.inf]]), "b": torch.tensor([3.0, 3.5, 0.1])}
    values = [1.0, -2.0, 7.0, 3.0, 3.5, 0.1]
    for share in (0.1, 0.4, 0.9):
        assert count_below(statistics, share) == sum(value < share * sum(values) / 6 for value in values)
    assert count_below(statistics, 0.0) == count_below({"a": torch.tensor([math.inf])}, 0.5) == 0


def test_the_gathering_follows_the_optimizers_steps_and_begins_anew_after_each_look():
    model = net()
    method = lprune(model)
    optimizer = make_optimizer(model, method, lr=0.02)
    method.observe(1.0)
    names, seen = list(method.views()), []
    original = ZeroTest.take

    def watched(self, weights, moves):
        seen.append({n: (weights[n].clone(), model.get_parameter(n).grad.clone()) for n in names})
        original(self, weights, moves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ZeroTest, "take", watched)
        train(model, method, optimizer, 3)
    found = method._test.statistic()
    for name in names:
        ends = sum(weight - 0.02 * gradient for weight, gradient in (step[name] for step in seen))
        moves = 0.02 * torch.stack([step[name][1] for step in seen])
        wanted = (ends.abs() / (moves - moves.mean(0)).square().sum(0).sqrt()).log()
        close(found[name], wanted)
    below, total = count_below(found, 2 / 3 * (1 - 1 / 3)), method.masks().total
    method.observe(1.01)
    assert 0 < below == method.masks().zeros < 0.8 * total
    gone = torch.cat([found[n][~kept].flatten() for n, kept in method.masks().kept.items()])
    left = torch.cat([found[n][kept].flatten() for n, kept in method.masks().kept.items()])
    assert gone.max() < left.min()
    sums = method._test.sums().values()
    assert method._test.seen == 0 and not any(part.any() for kind in sums for part in kind.values())


def test_it_prunes_others_than_the_smallest():
    kept = {}
    for criterion in ("magnitude", "statistic"):
        model = net()
        method = GeneralizationDriven(model, sparsity=0.2, most=0.9, criterion=criterion, allocation=uniform)
        method.observe(1.0)
        train(model, method, make_optimizer(model, method), 4)
        method.observe(1.5)
        kept[criterion] = method.masks()
    assert kept["magnitude"].zeros == kept["statistic"].zeros > 0
    assert any(not mask.equal(kept["statistic"].kept[name]) for name, mask in kept["magnitude"].kept.items())


@pytest.mark.parametrize("steps", [0, 1])
def test_fewer_than_two_steps_say_nothing(steps):
    model = net()
    method = lprune(model)
    method.observe(1.0)
    train(model, method, make_optimizer(model, method), steps)
    method.observe(2.0)
    assert method.masks().zeros == 0


def test_none_goes_while_the_held_out_loss_falls_and_none_beyond_the_bound():
    model = net()
    method = lprune(model, sparsity=0.25, most=0.9)
    optimizer = make_optimizer(model, method)
    for held_out, zeros in ((1.0, 0.0), (0.9, 0.0), (5.0, 0.25), (9.0, 0.25)):
        train(model, method, optimizer, 3)
        method.observe(held_out)
        assert method.masks().sparsity == pytest.approx(zeros, abs=1 / method.masks().total)


def test_a_run_that_is_resumed_between_two_looks_prunes_the_same():
    masks = []
    for resumed in (False, True):
        model = net()
        method = lprune(model)
        optimizer = make_optimizer(model, method)
        method.observe(1.0)
        train(model, method, optimizer, 2)
        if resumed:
            weights, state, old = model.state_dict(), method.state_dict(), optimizer.state_dict()
            model = net(seed=1)
            model.load_state_dict(weights)
            method = lprune(model)
            method.load_state_dict(state)
            optimizer = make_optimizer(model, method)
            optimizer.load_state_dict(old)
        train(model, method, optimizer, 2, seed=1)
        method.observe(1.1)
        masks.append(method.masks())
    assert masks[0].zeros > 0
    assert all(mask.equal(masks[1].kept[name]) for name, mask in masks[0].kept.items())


def test_the_state_of_the_other_criterion_is_refused():
    one, other = lprune(net()), lprune(net(), criterion="magnitude")
    with pytest.raises(ValueError, match="criterion must be that of the state, 'magnitude', got 'statistic'"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="criterion must be that of the state, 'statistic', got 'magnitude'"):
        other.load_state_dict(one.state_dict())
    with unchecked(), pytest.raises(ValueError, match="criterion must be 'magnitude' or 'statistic', got 'size'"):
        lprune(net(), criterion="size")


def test_the_word_of_the_table():
    config = SparsifyConfig(sparsity=0.5, method="generalization", criterion="statistic", fraction=0.667)
    check_sparsify(config, steps=10)
    (method,) = make_sparsifiers(config, small_model(), steps=10)
    assert (method.criterion, method.most, method.when) == ("statistic", 0.667, "high")
    assert make_sparsifiers(SparsifyConfig(0.5, "generalization"), small_model(), steps=10)[0].criterion == "magnitude"
    with pytest.raises(ValueError, match=r"sparsify.criterion must be left out for method='rigl'.* got 'statistic'"):
        check_sparsify(SparsifyConfig(sparsity=0.5, method="rigl", criterion="statistic"), steps=100)
