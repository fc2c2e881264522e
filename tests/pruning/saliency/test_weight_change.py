"""Total weight change against sums kept by hand, and its place in pruning."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning import Sparsifier, one_shot, prunable_weights, select_masks
from pruning.saliency import WeightChange
from tests.tolerances import close


def train(model, change, steps, *, start=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(start, start + steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
        optimizer.step()
        change.after_step()


def test_path_and_distance_by_hand():
    model = nn.Sequential(nn.Linear(1, 3, bias=False))
    values = torch.tensor([[[1.0], [2.0], [-1.0]], [[1.5], [2.0], [1.0]], [[1.0], [0.0], [3.0]]])
    with torch.no_grad():
        model[0].weight.copy_(values[0])
    change = WeightChange(model)
    for value in values[1:]:
        with torch.no_grad():
            model[0].weight.copy_(value)
        change.after_step()
    # |1·.5| + |1.5·-.5|, |2·0| + |2·-2|, |-1·2| + |1·2|
    close(change.scores()["0.weight"], torch.tensor([[1.25], [4.0], [4.0]]))
    close(change.scores("distance")["0.weight"], torch.tensor([[0.0], [2.0], [4.0]]))


def test_it_resumes_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    change = WeightChange(model)
    train(model, change, 3)
    other = WeightChange(model)
    other.load_state_dict(change.state_dict())
    for followed in (change, other):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, followed, 2, start=3)
        model.load_state_dict(weights)
    for kind in ("path", "distance"):
        assert all(score.equal(other.scores(kind)[name]) for name, score in change.scores(kind).items())
    with pytest.raises(ValueError, match="'1.weight' besides"):
        WeightChange(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))).load_state_dict(change.state_dict())


def test_it_composes_with_masks_and_sparsifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    change = WeightChange(model)
    train(model, change, 3)
    expected = select_masks(change.scores(), sparsity=0.5)
    sparsifier = Sparsifier(model, schedule=one_shot(0.5), saliency=change.saliency)
    assert all(mask.equal(expected.kept[name]) for name, mask in sparsifier.masks().kept.items())
    assert change.scores().keys() == prunable_weights(model).keys()


def test_bad_input():
    change = WeightChange(nn.Sequential(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="followed, got another"):
        change.saliency(torch.ones(1, 1))
