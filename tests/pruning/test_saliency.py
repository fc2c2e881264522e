"""Scores of weights and the magnitude of structures, against loops."""

import pytest
import torch
import torch.nn.functional as F

from pruning import magnitude_importance, prunable_weights, taylor
from pruning.saliency import gradient_scores
from tests.pruning.toy import tokens, toy
from tests.tolerances import close


def test_magnitude_of_a_unit_is_the_norm_of_what_it_owns_alone():
    """q rows and bias and o columns of a head; both halves of the fused gate-and-up and the down column of a neuron."""
    model = toy((4, 2, 5))
    scores = magnitude_importance(model, model.prunable_axes())
    attention, feedforward = model.attention[0], model.feedforward[0]
    for head in range(4):
        rows = slice(4 * head, 4 * head + 4)
        own = [attention.q.weight[rows], attention.q.bias[rows], attention.o.weight[:, rows]]
        close(scores["attention.0.heads"][head], torch.cat([part.flatten() for part in own]).norm())
    for neuron in range(5):
        own = [
            part[row] for part in (feedforward.gate_up.weight, feedforward.gate_up.bias) for row in (neuron, neuron + 5)
        ]
        own.append(feedforward.down.weight[:, neuron])
        close(scores["feedforward.0.neurons"][neuron], torch.cat([part.flatten() for part in own]).norm())


def test_gradient_scores_average_over_all_samples_whatever_the_batches():
    model, ids = toy((2, 2, 3)), tokens(4)
    weights = prunable_weights(model)
    for row in ids:
        (F.cross_entropy(model(row[None])[0, :-1], row[1:]) / 4).backward()
    expected = {name: taylor(weight) for name, weight in weights.items()}
    for batches in ([ids], [ids[:1], {"input_ids": ids[1:]}]):
        found = gradient_scores(model, weights, batches)
        for name in weights:
            # gradients are summed in float32
            close(found[name], expected[name], torch.float32)


def test_frozen_weights_have_no_gradient_score():
    model = toy((2, 2, 3)).requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=True, got 'attention.0.q.weight' frozen"):
        gradient_scores(model, prunable_weights(model), [tokens()])
