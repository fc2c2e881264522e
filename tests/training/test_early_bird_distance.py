"""The word that says how far two masks of an early bird are apart: the paper's distance unless asked."""

import pytest
import torch
from torch import nn

from pruning.retraining import EarlyBirdPruning
from tests.training.models import small_model
from training.sparsify_config import SparsifyConfig, check_sparsify
from training.sparsity import make_sparsifiers


def found(relative: bool) -> tuple[list[tuple[float, ...]], int | None, bool]:
    """Of twenty weights two stay; the largest pair moves on by one at each look, so that neighbours share one.

    By hand: two masks differ in 2 of 20 weights, 0.1, if they share one, in 4, 0.2, if none. The most that masks of two
    weights can differ in is 4, so that relatively they are at 0.5 and 1."""
    model = nn.Linear(20, 1, bias=False)
    method = EarlyBirdPruning(model, sparsity=0.9, every=1, end=6, window=2, threshold=0.25, relative=relative)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in range(6):
        if method.found is None:
            model.weight.data.fill_(1.0)[0, step : step + 2] = 2.0
        method.after_step(optimizer)
    return method.bird.distances, method.found, method.forced


def test_the_two_distances_by_hand():
    distances, step, forced = found(relative=False)
    assert distances == [(), pytest.approx((0.1,)), pytest.approx((0.2, 0.1))]
    assert (step, forced) == (3, False)
    distances, step, forced = found(relative=True)
    assert distances[2] == pytest.approx((1.0, 0.5)) and (step, forced) == (6, True)


def test_the_word_of_the_config():
    options = {"sparsity": 0.9, "method": "early_bird", "every": 1, "end": 9}
    for words, relative in (({}, False), ({"distance": "absolute"}, False), ({"distance": "relative"}, True)):
        config = SparsifyConfig(**options, **words)
        check_sparsify(config, steps=10)
        (method,) = make_sparsifiers(config, small_model(experts=0), steps=10)
        assert isinstance(method, EarlyBirdPruning) and method.bird.relative is relative
