"""Robustness, memorisation, data hunger and transfer, on models whose answers are known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pruning.batches import next_token_loss
from pruning.diagnostics import (
    adversarial_robustness,
    data_hunger,
    mean_loss,
    memorisation,
    random_labels,
    transfer_curve,
)
from pruning.dynamic import Attack, adversarial_loss
from tests.pruning.test_transformer import build, ids

VOCAB = 11


class ByHeart(nn.Module):
    """Remembers the label after every sequence of ids that it was shown; elsewhere it says 0."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.known = {}

    def forward(self, input_ids):
        said = [[self.known.get((tuple(row.tolist()), t), 0) for t in range(len(row))] for row in input_ids]
        return 20 * F.one_hot(torch.tensor(said), VOCAB).float() + 0 * self.unused


def learn(model, batches):
    for batch in batches:
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for t in range(len(row) - 1):
                model.known[tuple(row.tolist()), t] = int(labels[t + 1])


def text(count=4, length=9, seed=0):
    return [torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed + n)) for n in range(count)]


def seeded():
    return torch.Generator().manual_seed(0)


def test_labels_are_random_where_it_says_so_and_nowhere_else():
    batches = text(30)
    made = random_labels(batches, share=0.4, vocab_size=VOCAB, generator=seeded())
    chosen = torch.cat([c.flatten() for c in made.random])
    assert abs(chosen.float().mean() - 0.4) < 0.06
    for batch, new, where in zip(batches, made.batches, made.random, strict=True):
        assert new["input_ids"].equal(batch) and new["labels"][~where].equal(batch[~where])
    drawn = torch.cat([b["labels"][w] for b, w in zip(made.batches, made.random, strict=True)])
    assert drawn.unique().tolist() == list(range(VOCAB))


def test_ignored_labels_stay():
    batch = {"input_ids": torch.zeros(2, 4).long(), "labels": torch.full((2, 4), -100)}
    made = random_labels([batch], share=1.0, vocab_size=5, generator=seeded())
    assert made.batches[0]["labels"].equal(batch["labels"]) and not made.random[0].any()


def test_a_model_that_learns_by_heart_knows_its_random_labels_and_one_that_learns_nothing_does_not():
    found = memorisation(ByHeart, learn, text(), vocab_size=VOCAB, shares=(0.0, 0.5, 1.0), generator=seeded())
    assert found.random_accuracy[1:] == (1.0, 1.0) and math.isnan(found.random_accuracy[0])
    assert found.plain_accuracy[:2] == (1.0, 1.0) and math.isnan(found.plain_accuracy[2])
    assert max(found.losses) < 1e-3 and found.chance == 1 / VOCAB
    blank = memorisation(ByHeart, lambda m, b: None, text(20), vocab_size=VOCAB, shares=(1.0,), generator=seeded())
    assert abs(blank.random_accuracy[0] - 1 / VOCAB) < 0.08 and blank.losses[0] > 10


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_transformer_memorises(kind):
    def train(model, batches):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for _ in range(25):
            for batch in batches:
                optimizer.zero_grad()
                next_token_loss(model, batch).backward()
                optimizer.step()

    batches = [ids(batch=2, length=6)]
    found = memorisation(lambda: build(kind).float(), train, batches, vocab_size=31, shares=(1.0,), generator=seeded())
    assert found.random_accuracy[0] > 0.8


def shift(model, batches):
    with torch.no_grad():
        model.weight += sum(len(batch) for batch in batches)


def squared(model, x):
    return (model(x) - 10).pow(2).sum()


def one():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model


def test_data_hunger_trains_anew_on_more_and_more():
    ones = [torch.ones(2, 1), torch.ones(3, 1), torch.ones(5, 1)]
    found = data_hunger(one, shift, ones, [torch.full((1, 1), 2.0)], counts=(1, 2, 3), loss=squared)
    assert found.samples == (2, 5, 10)
    assert found.train_losses == (64.0, 25.0, 0.0) and found.held_out == (36.0, 0.0, 100.0)
    assert found.gaps() == (-28.0, -25.0, 100.0)


def test_transfer_measures_before_and_after_on_a_copy():
    models = {0.0: one(), 0.5: one()}
    with torch.no_grad():
        models[0.5].weight += 4
    found = transfer_curve(models, shift, [torch.ones(3, 1)], [torch.ones(1, 1)], loss=squared)
    assert (found.sparsities, found.before, found.after) == ((0.0, 0.5), (100.0, 36.0), (49.0, 9.0))
    assert float(models[0.5].weight) == 4


@pytest.mark.parametrize("steps", [1, 3])
def test_robustness_is_the_loss_under_each_attack(steps):
    model, batches = build("dense"), [ids(seed=0), ids(batch=1, seed=1)]
    found = adversarial_robustness(model, batches, radii=(0.0, 0.05, 0.2), steps=steps)
    for radius, loss in zip(found.radii, found.losses, strict=True):
        under = adversarial_loss(Attack(radius, steps))
        assert loss == pytest.approx(sum(float(under(model, b).detach()) for b in batches) / 4)
    assert found.losses[0] == pytest.approx(found.clean) == pytest.approx(mean_loss(model, batches))
    assert found.losses[0] < found.losses[1] < found.losses[2] and found.gaps()[2] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_labels(text(), share=1.5, vocab_size=5, generator=seeded()), r"share must be in \[0, 1\], got"),
        (lambda: random_labels(text(), share=0.5, vocab_size=1, generator=seeded()), "vocab_size must be >= 2, got 1"),
        (lambda: memorisation(one, shift, text(), vocab_size=5, shares=(), generator=seeded()), "at least one value"),
        (lambda: data_hunger(one, shift, text(2), text(1), counts=(3,)), r"counts must be in \[1, 2\], got 3"),
        (lambda: transfer_curve({}, shift, text(), text()), "models must hold at least one"),
        (lambda: adversarial_robustness(build(), text(), radii=()), "radii must hold at least one value"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
