"""Pruning and training in turn: each rule against loops in NumPy, and the schedules by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import cubic, linear, one_shot, uniform
from pruning.retraining import (
    DenseSparseDense,
    Feedback,
    GeneralizationDriven,
    HardThresholding,
    LearningCompression,
    NeuralWirings,
    generalization_loss,
    pruning_share,
)
from pruning.schedules import exponential, iterative, prunings, rewarmed, rewound
from pruning.weights import matrices
from tests.pruning.learned.fixtures import IN, OUT, Regression, make_optimizer, net, smallest, train
from tests.tolerances import close

LR = 0.02


def same(actual: torch.Tensor, expected: np.ndarray) -> None:
    close(actual.detach(), torch.from_numpy(np.asarray(expected)).reshape(actual.shape))


def test_feedback_moves_dense_weights_by_the_gradient_at_the_pruned_ones():
    task = Regression()
    model = task.model()
    method = Feedback(model, schedule=linear(0.6, begin=0, end=6), every=2)
    task.run(model, method, steps=7, lr=LR)
    theta, mask = task.start.copy(), np.ones((OUT, IN), dtype=bool)
    for step in range(7):
        theta = theta - LR * task.slope(theta * mask)
        if (step + 1) % 2 == 0:
            mask = smallest(np.abs(theta), math.floor(0.6 * min(1, (step + 1) / 6) * OUT * IN + 1e-9))
    same(model.weight, theta)
    assert method.masks().kept["weight"].numpy().tolist() == mask.tolist()
    method.finish()
    same(model.weight, theta * mask)


def test_neural_wirings_swap_edges_in_every_step_over_the_whole_network():
    task = Regression()
    model = task.model()
    method = NeuralWirings(model, sparsity=0.6)
    theta = task.start.copy()
    seen = []
    for _ in range(6):
        mask = smallest(np.abs(theta), 9)
        seen.append(mask.tolist())
        theta = theta - LR * task.slope(theta * mask)
        task.run(model, method, steps=1, lr=LR)
        same(model.weight, theta)
    assert any(mask != seen[0] for mask in seen)
    whole = net()
    with torch.no_grad():
        whole.first.weight.mul_(100)
    kept = NeuralWirings(whole, sparsity=0.5).masks().kept
    # every other matrix is smaller throughout, and keeps one edge
    others = sum(int(mask.sum()) for name, mask in matrices(kept).items() if name != "first.weight")
    assert int(kept["first.weight"].sum()) == 216 - others and others == len(matrices(kept)) - 1


def test_dense_sparse_dense():
    task = Regression()
    model = task.model()
    method = DenseSparseDense(model, sparsity=0.4, begin=2, end=5)
    w, v, mask = task.start.copy(), np.zeros((OUT, IN)), np.ones((OUT, IN), dtype=bool)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for step in range(8):
        if step == 2:
            mask = smallest(np.abs(w), 6)
            w, v = w * mask, v * mask
        if step == 5:
            mask = np.ones((OUT, IN), dtype=bool)
        v = (0.9 * v + task.slope(w)) * mask
        w = (w - LR * v) * mask
        task.loss(model).backward()
        method.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)
        expected = w * smallest(np.abs(w), 6) if step == 1 else w
        same(model.weight, expected)
        assert int((model.weight == 0).sum()) == (6 if 1 <= step < 5 else 0)
    method.finish()
    assert model.weight.all()


def test_iterative_hard_thresholding_restores_and_chooses_again():
    task = Regression()
    model = task.model()
    method = HardThresholding(model, sparsity=0.4, sparse_steps=2, dense_steps=3, begin=1)
    w, mask = task.start.copy(), np.ones((OUT, IN), dtype=bool)
    chosen = []
    for step in range(9):
        if step >= 1 and (step - 1) % 5 == 0:
            mask = smallest(np.abs(w), 6)
            chosen.append(mask.tolist())
            w = w * mask
        elif step >= 1 and (step - 1) % 5 == 2:
            mask = np.ones((OUT, IN), dtype=bool)
        w = (w - LR * task.slope(w)) * mask
        task.run(model, method, steps=1, lr=LR)
    same(model.weight, w)
    assert len(chosen) == 2 and chosen[0] != chosen[1]
    assert method.masks().zeros == 6
    method.finish()
    same(model.weight, w * smallest(np.abs(w), 6))


@pytest.mark.parametrize("multipliers", [True, False])
def test_learning_compression_alternates(multipliers):
    task = Regression()
    model = task.model()
    method = LearningCompression(
        model, sparsity=0.6, mu=0.5, growth=1.5, every=3, multipliers=multipliers, allocation=uniform
    )
    task.run(model, method, steps=10, lr=LR)
    w, lam, mu = task.start.copy(), np.zeros((OUT, IN)), 0.5
    c = w * smallest(np.abs(w), 9)
    for step in range(10):
        w = w - LR * (task.slope(w) + mu * (w - c - lam / mu))
        if (step + 1) % 3 == 0:
            target = w - lam / mu
            c = target * smallest(np.abs(target), 9)
            lam = lam - mu * (w - c) if multipliers else lam
            mu *= 1.5
    same(model.weight, w)
    assert method.mu == pytest.approx(mu)
    assert method.gap() == pytest.approx(np.linalg.norm(w - c) / np.linalg.norm(w))
    method.finish()
    same(model.weight, w * smallest(np.abs(w), 9))


def test_the_constraint_is_met_as_the_penalty_grows():
    task = Regression()
    model = task.model()
    method = LearningCompression(model, sparsity=0.6, mu=0.1, growth=1.3, every=5)
    before = method.gap()
    task.run(model, method, steps=120, lr=0.01)
    assert method.gap() < 0.05 * before


def test_the_generalisation_loss_drives_the_pruning():
    assert generalization_loss(1.1, 1.0) == pytest.approx(10.0)
    assert pruning_share(0.0, most=0.2, alpha=2.0, when="low") == 0.2
    assert pruning_share(0.0, most=0.2, alpha=2.0, when="high") == 0.0
    model = net()
    method = GeneralizationDriven(model, sparsity=0.5, most=0.3, alpha=2.0, when="low", begin=1)
    method.observe(2.0)
    assert method.masks().zeros == 0
    optimizer = make_optimizer(model, method)
    train(model, method, optimizer, 1)
    total = method.masks().total
    left = 1.0
    for held_out, best in ((1.9, 1.9), (1.95, 1.9), (1.85, 1.85)):
        method.observe(held_out)
        left *= 1 - 0.3 / (1 + 2.0 * 100 * (held_out / best - 1))
        assert method.masks().zeros == math.floor(max(1 - left, 0) * total + 1e-6) or left < 0.5
    assert method.masks().zeros == total // 2
    kept = method.masks().kept
    train(model, method, optimizer, 3)
    for name, mask in kept.items():
        assert not model.get_parameter(name)[~mask].any()


def test_lprune_prunes_more_where_the_net_overfits():
    zeros = {}
    for when in ("low", "high"):
        method = GeneralizationDriven(net(), sparsity=0.9, when=when)
        method.observe(1.0)
        calm = method.masks().zeros
        method.observe(1.5)
        zeros[when] = (calm, method.masks().zeros - calm)
    assert zeros["low"][0] > 10 * zeros["low"][1]
    assert zeros["high"][0] == 0 < zeros["high"][1]


def test_exponential_and_iterative_by_hand():
    schedule = exponential(0.75, begin=10, end=20, every=5)
    assert [schedule(t) for t in (9, 10, 14, 15, 19, 20, 99)] == pytest.approx([0, 0, 0, 0.5, 0.5, 0.75, 0.75])
    schedule = iterative(0.875, begin=4, every=3, rounds=3)
    assert [schedule(t) for t in (3, 4, 6, 7, 9, 10, 99)] == pytest.approx([0, 0.5, 0.5, 0.75, 0.75, 0.875, 0.875])
    assert prunings(schedule, steps=20) == [4, 7, 10]
    assert prunings(one_shot(0.5), steps=3) == [0]


@given(
    st.sampled_from([linear, cubic, exponential]),
    st.floats(0, 0.98),
    st.floats(0, 1),
    st.integers(0, 20),
    st.integers(1, 50),
    st.integers(1, 9),
)
def test_gradual_schedules_rise_from_the_first_to_the_last(make, sparsity, share, begin, length, every):
    schedule = make(sparsity, begin=begin, end=begin + length, every=every, initial=share * sparsity)
    values = [schedule(step) for step in range(begin + length + 3)]
    assert all(value == 0 for value in values[:begin])
    assert values[begin] == pytest.approx(share * sparsity, abs=1e-12)
    assert values[-1] == sparsity
    assert all(b >= a - 1e-12 for a, b in zip(values[begin:], values[begin + 1 :], strict=False))


def test_the_learning_rate_is_warmed_up_again_or_wound_back_at_each_pruning():
    warm = rewarmed([4, 10], warmup=4)
    assert [warm(t) for t in (0, 3, 4, 5, 7, 8, 10, 13)] == [1, 1, 0.25, 0.5, 1, 1, 0.25, 1]
    back = rewound([4, 10], to=2)
    assert [back(t) for t in (0, 3, 4, 5, 9, 10, 12)] == [0, 3, 2, 3, 7, 2, 4]
    assert rewound([1], to=5)(3) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iterative(0.5, begin=-1, every=1, rounds=1), "begin must be >= 0, got -1"),
        (lambda: iterative(0.5, begin=0, every=1, rounds=0), "rounds must be >= 1, got 0"),
        (lambda: exponential(1.0, begin=0, end=1), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda: rewarmed([], warmup=0), "warmup must be >= 1, got 0"),
        (lambda: rewound([], to=-1), "to must be >= 0, got -1"),
        (lambda: DenseSparseDense(net(), sparsity=0.5, begin=4, end=4), r"begin must be in \[0, end=4\), got 4"),
        (lambda: HardThresholding(net(), sparsity=0.5, sparse_steps=0, dense_steps=1), "sparse_steps must be >= 1"),
        (lambda: LearningCompression(net(), sparsity=0.5, mu=0.0), "mu must be > 0, got 0.0"),
        (lambda: LearningCompression(net(), sparsity=0.5, growth=0.5), "growth must be >= 1, got 0.5"),
        (lambda: GeneralizationDriven(net(), sparsity=0.5, most=1.0), r"most must be in \(0, 1\), got 1.0"),
        (lambda: GeneralizationDriven(net(), sparsity=0.5).observe(0.0), "best must be > 0, got 0.0"),
        (lambda: Feedback(net(), schedule=one_shot(0.5), every=0), "every must be >= 1, got 0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
