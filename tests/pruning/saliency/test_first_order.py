"""Taylor on each sample and SNIP in rounds, against loops written with plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pruning import global_ranking, prunable_weights, select_masks
from pruning.saliency import gradient_scores, snip_scores, taylor_scores
from tests.pruning.toy import tokens, toy
from tests.tolerances import close


def sample_gradients(model, ids):
    """Name → gradients of each sample's loss [B, ...]."""
    names, found = list(prunable_weights(model)), []
    for row in ids:
        loss = F.cross_entropy(model(row[None])[0, :-1], row[1:])
        found.append(torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names]))
    return {name: torch.stack([sample[i] for sample in found]) for i, name in enumerate(names)}


def test_taylor_takes_the_absolute_value_of_each_sample():
    model, ids = toy((2, 1, 3)), tokens(5)
    weights = prunable_weights(model)
    expected = {name: (weights[name].detach() * g).abs().mean(0) for name, g in sample_gradients(model, ids).items()}
    for batches in ([ids], [ids[:2], {"input_ids": ids[2:]}]):
        found = taylor_scores(model, weights, batches)
        for name in weights:
            close(found[name], expected[name])
    mean = gradient_scores(model, weights, [ids])
    assert all((found[name] >= mean[name] - 1e-12).all() for name in weights)
    assert any((found[name] > 2 * mean[name]).any() for name in weights)


def test_snip_on_one_batch_is_a_share_of_all_connection_sensitivity():
    model, ids = toy((2, 1, 3)), tokens(4)
    weights = prunable_weights(model)
    found = snip_scores(model, weights, [ids])
    raw = {name: (weights[name].detach() * g.mean(0)).abs() for name, g in sample_gradients(model, ids).items()}
    total = sum(score.sum() for score in raw.values())
    assert sum(score.sum() for score in found.values()).item() == pytest.approx(1.0)
    for name in weights:
        close(found[name], raw[name] / total)


def snip_by_hand(model, ids, sparsity, rounds):
    """Positions (name, flat index) that go, as a set, in each round."""
    model = copy.deepcopy(model)
    weights = prunable_weights(model)
    places = [(name, i) for name, w in weights.items() for i in range(w.numel())]
    gone = []
    for k in range(1, rounds + 1):
        count = int((1 - (1 - sparsity) ** (k / rounds)) * len(places) + 1e-9)
        means = {name: g.mean(0).flatten().tolist() for name, g in sample_gradients(model, ids).items()}
        values = {name: weight.detach().flatten().tolist() for name, weight in weights.items()}
        left = [place for place in places if place not in gone]
        left.sort(key=lambda place: abs(values[place[0]][place[1]] * means[place[0]][place[1]]))
        for name, index in left[: count - len(gone)]:
            gone.append((name, index))
            weights[name].data.view(-1)[index] = 0
    return set(gone)


def test_snip_in_rounds_scores_the_masked_network_again():
    model, ids = toy((1, 1, 2), dim=4, width=2), tokens(3)
    weights = prunable_weights(model)
    before = copy.deepcopy(model.state_dict())
    scores = snip_scores(model, weights, [ids], sparsity=0.7, rounds=4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    masks = select_masks(scores, sparsity=0.7, allocation=global_ranking)
    gone = {(name, i) for name, mask in masks.kept.items() for i in (~mask).flatten().nonzero().flatten().tolist()}
    assert gone == snip_by_hand(model, ids, 0.7, 4)
    once = select_masks(snip_scores(model, weights, [ids]), sparsity=0.7, allocation=global_ranking)
    assert any(not once.kept[name].equal(masks.kept[name]) for name in weights)


def test_what_went_in_an_earlier_round_scores_below_all_others():
    model, ids = toy((2, 1, 3)), tokens(3)
    weights = prunable_weights(model)
    scores = snip_scores(model, weights, [ids], sparsity=0.9, rounds=3)
    every = torch.cat([score.flatten() for score in scores.values()])
    assert int((every == -torch.inf).sum()) == int((1 - 0.1 ** (2 / 3)) * len(every))
    assert (every[every > -torch.inf] >= 0).all()


def test_progress_sees_every_round_and_an_error_restores_the_weights():
    model, ids = toy((2, 1, 3)), tokens(3)
    weights, seen = prunable_weights(model), []
    snip_scores(model, weights, [ids], sparsity=0.5, rounds=3, progress=lambda rounds: seen.append(rounds) or rounds)
    assert [len(rounds) for rounds in seen] == [3]
    before, calls = copy.deepcopy(model.state_dict()), []

    def loss(model, batch):
        calls.append(1)
        return model(batch).logsumexp(-1).sum() * (torch.nan if len(calls) == 3 else 1)

    with pytest.raises(ValueError, match="finite"):
        snip_scores(model, weights, [ids], sparsity=0.5, rounds=3, loss=loss)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options, message", [
    ({"rounds": 3}, r"sparsity must be in \[0, 1\) with rounds=3, got None"),
    ({"rounds": 0, "sparsity": 0.5}, "rounds must be >= 1, got 0"),
    ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
])  # fmt: skip
def test_bad_rounds(options, message):
    model = toy((2, 1, 3))
    with pytest.raises(ValueError, match=message):
        snip_scores(model, prunable_weights(model), [tokens()], **options)


def test_frozen_weights_are_named():
    model = toy((2, 1, 3)).requires_grad_(False)
    with pytest.raises(ValueError, match="got 'attention.0.q.weight' frozen"):
        taylor_scores(model, prunable_weights(model), [tokens()])
