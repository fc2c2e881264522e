"""Tickets within one run: a worked example, rewinding against find_ticket, and the step at which an early bird is."""

import pytest
import torch
from torch import nn

from pruning import global_ranking
from pruning.lottery import find_ticket
from pruning.retraining import EarlyBirdPruning, Rewinding
from tests.tolerances import close


def line(values):
    """One neuron of these weights."""
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.data.copy_(torch.tensor([values]))
    return model


def push(model, method, optimizer, gradient):
    """One step with this gradient of the weights."""
    model.weight.grad = torch.tensor([gradient])
    if method.before_step(optimizer):
        optimizer.step()
    method.after_step(optimizer)
    return model.weight.detach()[0].tolist()


def test_three_passes_of_a_neuron_by_hand():
    model = line([4.0, 3.0, 2.0, 1.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    method = Rewinding(model, sparsity=0.75, every=2, rounds=2, rewind=1)
    gradient = [2.5, 0.5, 0.0, -2.0]
    # W_1 = 1.5 2.5 2 3, kept; its pass of two steps ends at −3.5 1.5 2 7: two of four go, and the others are W_1 again
    assert push(model, method, optimizer, gradient) == [1.5, 2.5, 2.0, 3.0]
    assert push(model, method, optimizer, gradient) == [-1.0, 2.0, 2.0, 5.0]
    assert push(model, method, optimizer, gradient) == [1.5, 0.0, 0.0, 3.0]
    # the second ends at −3.5 and 7: three of four are gone; magnitude at the start or in W_1 would keep another
    assert push(model, method, optimizer, gradient) == [-1.0, 0.0, 0.0, 5.0]
    assert push(model, method, optimizer, gradient) == [0.0, 0.0, 0.0, 3.0]
    assert push(model, method, optimizer, gradient) == [0.0, 0.0, 0.0, 5.0]
    assert push(model, method, optimizer, gradient) == [0.0, 0.0, 0.0, 7.0]
    assert [method.share(step) for step in range(8)] == [0, 0, 0, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert method.masks().sparsity == 0.75


@pytest.mark.parametrize("rewind", [0, 2])
def test_it_is_find_ticket_and_the_training_of_its_ticket(rewind):
    every, rounds = 5, 3

    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))

    def loss(model, place):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(place))
        return (model(x) - x[:, :2].sin()).pow(2).mean()

    def train(model, masks, first, last):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for place in range(first, rewind + every if last is None else last):
            optimizer.zero_grad()
            loss(model, place).backward()
            optimizer.step()
            masks.apply(model)

    expected = made()
    ticket = find_ticket(expected, train, sparsity=0.7, rounds=rounds, rewind=rewind)
    train(expected, ticket.masks, rewind, None)
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    method = Rewinding(model, sparsity=0.7, every=every, rounds=rounds, rewind=rewind, allocation=global_ranking)
    for step in range(rewind + (rounds + 1) * every):
        if step == rewind:
            for slots in optimizer.state.values():  # find_ticket's own rounds start with a fresh optimiser
                for slot in slots.values():
                    slot.zero_()
        optimizer.zero_grad()
        loss(model, step if step < rewind else rewind + (step - rewind) % every).backward()
        if method.before_step(optimizer):
            optimizer.step()
        method.after_step(optimizer)
    for name, mask in ticket.masks.kept.items():
        assert mask.equal(method.masks().kept[name])
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        close(one, two)


def test_an_early_bird_is_found_once_six_masks_are_alike_or_at_the_end():
    still = line([1.0, 2.0, 3.0, 4.0])
    optimizer = torch.optim.SGD(still.parameters(), lr=1.0)
    method = EarlyBirdPruning(still, sparsity=0.5, every=2, end=100, relative=True)
    for _ in range(11):
        assert push(still, method, optimizer, [0.0] * 4) == [1.0, 2.0, 3.0, 4.0] and method.masks().sparsity == 0
    assert push(still, method, optimizer, [0.0] * 4) == [0.0, 0.0, 3.0, 4.0] and method.found == 12
    # what is gone stays gone, whatever its gradient; the others train on from where they are
    assert push(still, method, optimizer, [-9.0, 0.0, 1.0, 0.0]) == [0.0, 0.0, 2.0, 4.0]

    restless = line([1.0, 2.0, 3.0, 4.0])
    method = EarlyBirdPruning(restless, sparsity=0.5, every=2, end=21, relative=True)
    for step in range(21):
        sign = 1.0 if step // 2 % 2 else -1.0
        restless.weight.data.copy_(torch.tensor([[2.5 + sign, 2.5 + sign, 2.5 - sign, 2.5 - sign]]))
        method.after_step(optimizer)
        assert method.found == (21 if step == 20 else None)
    assert method.masks().sparsity == 0.5


def test_both_go_on_from_their_state():
    torch.manual_seed(0)
    gradients = torch.randn(20, 4).tolist()
    for make in (
        lambda model: Rewinding(model, sparsity=0.5, every=6, rounds=2, rewind=2),
        lambda model: EarlyBirdPruning(model, sparsity=0.5, every=1, end=15, relative=True),
    ):
        whole = line([4.0, 3.0, 2.0, 1.0])
        method, optimizer = make(whole), torch.optim.SGD(whole.parameters(), lr=0.1)
        for gradient in gradients[:11]:
            push(whole, method, optimizer, gradient)
        other = line(whole.weight.detach()[0].tolist())
        resumed, same = make(other), torch.optim.SGD(other.parameters(), lr=0.1)
        resumed.load_state_dict(method.state_dict())
        for gradient in gradients[11:]:
            assert push(whole, method, optimizer, gradient) == push(other, resumed, same, gradient)
        assert resumed.masks().sparsity == 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"rewind": -1}, "rewind must be >= 0, got -1"),
    ],
)
def test_wrong_passes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Rewinding(line([1.0, 2.0]), **({"sparsity": 0.5, "every": 3} | options))


@pytest.mark.parametrize("name", ["every", "end"])
def test_a_bird_that_never_looks_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        EarlyBirdPruning(line([1.0, 2.0]), **({"sparsity": 0.5, "every": 3, "end": 9} | {name: 0}))
