"""Preferential attachment: chances by a plain loop, and draws that follow them."""

from collections import Counter

import pytest
import torch
from torch import nn

from pruning import uniform
from pruning.dynamic import PreferentialAttachment
from pruning.dynamic.preferential import attachment
from tests.pruning.dynamic.test_methods import net
from tests.tolerances import close

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


def chances_by_loop(mask, offset):
    rows, columns = mask.shape
    table = torch.zeros(rows, columns)
    for i in range(rows):
        for j in range(columns):
            k_i = sum(bool(mask[i, c]) for c in range(columns))
            k_j = sum(bool(mask[r, j]) for r in range(rows))
            table[i, j] = (k_i + offset) * (k_j + offset)
    return table


@pytest.mark.parametrize("offset", [0.5, 1.0, 3.0])
def test_chances_are_products_of_degrees(offset):
    close(attachment(MASK, offset=offset), chances_by_loop(MASK, offset))


def grown_by(seed, *, offset=1.0):
    """Where one update of MASK puts the single connection that it moves; the one in row 1 is the smallest."""
    model = nn.Linear(4, 3, bias=False)
    method = PreferentialAttachment(
        model, sparsity=8 / 12, allocation=uniform, every=1, fraction=0.3, offset=offset,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with torch.no_grad():
        model.weight.copy_(MASK * torch.tensor([[3.0, 2.0, 4.0, 0.0], [0.1, 0, 0, 0], [0, 0, 0, 0]]))
        method.masks().kept["weight"].copy_(MASK)
    model.weight.grad = torch.zeros(3, 4)
    method.step = 1
    assert method.before_step(torch.optim.SGD(model.parameters(), lr=1.0))
    after = method.masks().kept["weight"]
    assert after.sum() == 4 and model.weight[1, 0] == 0
    left = MASK.clone()
    left[1, 0] = False
    (place,) = (after & ~left).nonzero().tolist()
    return tuple(place)


def test_growth_follows_the_degrees():
    left = MASK.clone()
    left[1, 0] = False
    chances = chances_by_loop(left, 1.0) * ~left
    chances = chances / chances.sum()
    draws = 600
    counts = Counter(grown_by(seed) for seed in range(draws))
    for i in range(3):
        for j in range(4):
            p = chances[i, j].item()
            spread = (p * (1 - p) / draws) ** 0.5
            assert abs(counts[i, j] / draws - p) <= 4 * spread + 1e-9
    # the hub's last place is likelier than all of a neuron without connections would have it
    assert counts[0, 3] > 2 * counts[2, 3]


def test_the_offset_must_be_positive():
    with pytest.raises(ValueError, match="offset must be > 0, got 0.0"):
        PreferentialAttachment(net(), sparsity=0.5, offset=0.0)
