"""Lottery tickets: rounds against a plain loop, early birds, and masks that move to other models."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import Masks, uniform
from pruning.lottery import EarlyBird, Ticket, draw_early_bird, find_ticket, mask_distance, stretched, transferred
from tests.pruning.test_transformer import build, ids
from tests.tolerances import close

STEPS = 6


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))


def trainer(calls=None, *, steps=STEPS, holds=True):
    """A train_fn of plain SGD with data that depends on the step; it says at which loss it ended."""

    def train(model, masks, first, last):
        if calls is not None:
            calls.append((first, last, masks.sparsity))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(first, steps if last is None else last):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2].sin()).pow(2).mean()
            loss.backward()
            optimizer.step()
            if holds:
                masks.apply(model)
        return loss.item()

    return train


def ticket_by_loop(sparsity, rounds, rewind):
    """The same by hand: one list of (name, place, magnitude) sorted afresh in each round."""
    model, train = net(), trainer()
    names = ["0.weight", "2.weight"]
    own = dict(model.named_parameters())
    masks = {name: torch.ones_like(own[name], dtype=torch.bool) for name in names}
    if rewind:
        train(model, Masks(masks), 0, rewind)
    start = copy.deepcopy(model.state_dict())
    for number in range(1, rounds + 1):
        train(model, Masks(masks), rewind, None)
        alive = [(own[n].flatten()[i].abs().item(), n, i) for n in names for i in range(own[n].numel())
                 if masks[n].flatten()[i]]  # fmt: skip
        total = sum(own[n].numel() for n in names)
        share = 1 - (1 - sparsity) ** (number / rounds)
        gone = math.floor(share * total + 1e-6) - (total - len(alive))
        for _, name, place in sorted(alive)[:gone]:
            masks[name].view(-1)[place] = False
        model.load_state_dict(start)
        Masks(masks).apply(model)
    return masks, model


@pytest.mark.parametrize(("sparsity", "rounds", "rewind"), [(0.5, 1, 0), (0.8, 3, 0), (0.75, 2, 2)])
def test_rounds_are_the_plain_loop(sparsity, rounds, rewind):
    model, calls = net(), []
    ticket = find_ticket(model, trainer(calls), sparsity=sparsity, rounds=rounds, rewind=rewind)
    wanted, other = ticket_by_loop(sparsity, rounds, rewind)
    for name, mask in wanted.items():
        assert ticket.masks.kept[name].equal(mask)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        close(one, two)
    assert calls[0] == ((0, rewind, 0.0) if rewind else (0, None, 0.0))
    assert [call[:2] for call in calls[bool(rewind) :]] == [(rewind, None)] * rounds
    assert len(ticket.results) == rounds and ticket.sparsities[-1] == pytest.approx(sparsity, abs=1 / 64)


@pytest.mark.parametrize("saliency", [torch.abs, lambda weight: -weight.abs()])
def test_what_was_pruned_stays_pruned(saliency):
    seen = []
    train = trainer()

    def watched(model, masks, first, last):
        seen.append({name: mask.clone() for name, mask in masks.kept.items()})
        return train(model, masks, first, last)

    ticket = find_ticket(net(), watched, sparsity=0.9, rounds=4, allocation=uniform, saliency=saliency)
    for before, after in zip(seen, [*seen[1:], ticket.masks.kept], strict=True):
        assert all(not (after[name] & ~before[name]).any() for name in before)


def test_a_rewound_ticket_starts_from_its_step():
    model = net()
    initial = copy.deepcopy(model)
    trainer()(initial, Masks({}), 0, 3)
    ticket = find_ticket(model, trainer(), sparsity=0.5, rounds=2, rewind=3)
    ticket.masks.apply(initial)
    for one, two in zip(model.parameters(), initial.parameters(), strict=True):
        assert one.equal(two)
    assert ticket.step == 3


@pytest.mark.parametrize("kind", ["dense", "moe", "untied"])
def test_a_ticket_of_a_transformer_is_saved_and_applied(tmp_path, kind):
    def train(model, masks, first, last):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(first, last or 3):
            optimizer.zero_grad()
            model(ids(seed=step), labels=ids(seed=step)).loss.backward()
            optimizer.step()
            masks.apply(model)

    model = build(kind)
    ticket = find_ticket(model, train, sparsity=0.7, rounds=2, rewind=1)
    ticket.save(tmp_path / "ticket.safetensors")
    loaded = Ticket.load(tmp_path / "ticket.safetensors")
    assert loaded.step == 1 and loaded.sparsities == ticket.sparsities
    other = build(kind, seed=3)
    loaded.apply(other)
    with torch.no_grad():
        assert other(ids()).logits.equal(model(ids()).logits)
    assert Masks.of(other).sparsity >= 0.69


def test_a_ticket_for_another_shape_changes_nothing(tmp_path):
    ticket = find_ticket(net(), trainer(), sparsity=0.5, rounds=1)
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"the model's '2.weight' must have shape \[2, 8\], got \[3, 8\]"):
        ticket.apply(other)
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())
    with pytest.raises(FileNotFoundError, match="expected a ticket"):
        Ticket.load(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold a ticket saved by Ticket.save"):
        Ticket.load(ticket.masks.save(tmp_path / "masks"))
    path = ticket.save(tmp_path / "cut")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged or cut short"):
        Ticket.load(path)


def distance_by_loop(one, two):
    pairs = [(a, b) for name in one for a, b in zip(one[name].flatten(), two[name].flatten(), strict=True)]
    return sum(bool(a) != bool(b) for a, b in pairs) / len(pairs)


def random_masks(seed, sizes=((3, 4), (2, 5)), share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return Masks({str(n): torch.rand(size, generator=generator) < share for n, size in enumerate(sizes)})


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0.05, 0.95))
def test_distances_are_the_plain_loop_and_relative_ones_reach_one(first, second, share):
    one, two = random_masks(first, share=share), random_masks(100 + second, share=share)
    assert mask_distance(one, two) == pytest.approx(distance_by_loop(one.kept, two.kept))
    assert mask_distance(one, one) == mask_distance(one, one, relative=True) == 0
    assert mask_distance(one, two) == mask_distance(two, one)
    assert 0 <= mask_distance(one, two, relative=True) <= 1 + 1e-12


def test_disjoint_sparse_masks_are_near_by_the_papers_measure_and_far_by_the_relative_one():
    one = Masks({"w": torch.arange(100) < 4})
    two = Masks({"w": torch.arange(100) >= 96})
    assert mask_distance(one, two) == pytest.approx(0.08)
    assert mask_distance(one, two, relative=True) == pytest.approx(1.0)


def bird_of(values, **options):
    """Early birds over a matrix of ten weights that takes each of these orders in turn; what each look said."""
    model = nn.Linear(10, 1, bias=False)
    bird = EarlyBird(model, **{"sparsity": 0.5, "window": 2, "threshold": 0.25} | options)
    said = []
    for row in values:
        with torch.no_grad():
            model.weight.copy_(torch.tensor([row]))
        said.append(bird.observe())
    return bird, said


A = [1.0] * 5 + [2.0] * 5
B = [2.0] * 5 + [1.0] * 5
NEAR = [2.0] + [1.0] * 4 + [1.0] + [2.0] * 4


def test_an_early_bird_waits_until_all_of_its_window_are_near():
    bird, said = bird_of([A, A, A])
    assert said == [False, False, True] and bird.distances == [(), (0.0,), (0.0, 0.0)]
    bird, said = bird_of([A, B, B, NEAR, A, A])
    assert said == [False, False, False, False, False, True]
    assert bird.distances[2] == (1.0, 0.0) and bird.distances[-1] == (pytest.approx(0.2), 0.0)


def test_an_early_bird_resumes():
    bird, _ = bird_of([A, A])
    other = EarlyBird(nn.Linear(10, 1, bias=False), sparsity=0.5, window=2, threshold=0.25)
    other.load_state_dict(copy.deepcopy(bird.state_dict()))
    assert other.masks().kept["weight"].equal(bird.masks().kept["weight"])
    assert other.distances == bird.distances


def test_drawing_an_early_bird_stops_training():
    epochs = []

    def epoch(model, masks, number):
        epochs.append(number)
        if number < 2:
            with torch.no_grad():
                model[0].weight.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(number)))

    model = net()
    masks, found = draw_early_bird(model, epoch, epochs=20, bird=EarlyBird(model, sparsity=0.5, window=3))
    assert found == 5 and epochs == [0, 1, 2, 3, 4]
    assert masks.sparsity == 0.5
    bird = EarlyBird(model, sparsity=0.5, window=3, threshold=1e-9)

    def restless(model, masks, number):
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(number))

    assert draw_early_bird(model, restless, epochs=4, bird=bird)[1] is None


def test_transferred_masks_are_the_same_and_another_shape_is_refused():
    masks = Masks.of(net())
    masks.kept["0.weight"][0] = False
    moved = transferred(masks, net(seed=1))
    assert moved.kept["0.weight"].equal(masks.kept["0.weight"]) and moved.kept["0.weight"] is not masks.kept["0.weight"]
    with pytest.raises(ValueError, match=r"mask of '0.weight' must have shape \[8, 5\], got \[8, 6\]"):
        transferred(masks, nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)))
    with pytest.raises(ValueError, match="'0.weight', which the model does not have"):
        transferred(masks, nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(("order", "source"), [("repeat", [0, 0, 0, 1, 1]), ("cycle", [0, 1, 0, 1, 0])])
def test_elastic_masks_come_from_the_right_layers(kind, order, source):
    small, large = build(kind, layers=2), build(kind, layers=5)
    generator = torch.Generator().manual_seed(0)
    masks = Masks({n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in Masks.of(small).kept.items()})
    longer = stretched(masks, large, order=order)
    for layer, origin in enumerate(source):
        mine = {n.removeprefix(f"layers.{layer}."): m for n, m in longer.kept.items() if f"layers.{layer}." in n}
        theirs = {n.removeprefix(f"layers.{origin}."): m for n, m in masks.kept.items() if f"layers.{origin}." in n}
        assert mine.keys() == theirs.keys() and all(mine[n].equal(theirs[n]) for n in mine)
    longer.apply(large)
    back = stretched(longer, small, order=order)
    first = source.index(0)
    assert all(m.equal(longer.kept[n.replace("layers.0", f"layers.{first}")]) for n, m in back.kept.items()
               if "layers.0" in n)  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_ticket(net(), trainer(), sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda: find_ticket(net(), trainer(), sparsity=0.5, rounds=0), "rounds must be >= 1, got 0"),
        (lambda: find_ticket(net(), trainer(), sparsity=0.5, rewind=-1), "rewind must be >= 0, got -1"),
        (lambda: find_ticket(net(), trainer(holds=False), sparsity=0.5, rounds=2), "train_fn must hold the masks"),
        (lambda: EarlyBird(net(), sparsity=0.5, window=0), "window must be >= 1, got 0"),
        (lambda: EarlyBird(net(), sparsity=0.5, threshold=0.0), "threshold must be > 0, got 0.0"),
        (lambda: EarlyBird(net(), sparsity=0.5).masks(), "observe must be called"),
        (lambda: draw_early_bird(net(), trainer(), epochs=0, bird=EarlyBird(net(), sparsity=0.5)), "epochs must be"),
        (lambda: mask_distance(random_masks(0), random_masks(0, sizes=((3, 4),))), "must be of the same weights"),
        (lambda: stretched(Masks.of(net()), net()), "must have numbered layers, got 0 and 0"),
        (lambda: stretched(Masks.of(build("dense")), build("moe")), "masks must have one of 'layers.0.feedforward"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_order_is_refused():
    from tests.typecheck import unchecked

    with unchecked(), pytest.raises(ValueError, match="order must be 'repeat' or 'cycle', got 'middle'"):
        stretched(Masks.of(build("dense")), build("dense"), order="middle")
