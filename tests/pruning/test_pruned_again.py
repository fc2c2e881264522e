"""A model that has zeros is pruned again: by every method the masks hold each of them, whatever is asked."""

import copy

import pytest
import torch
from torch import nn

from pruning import Masks, sparsify
from pruning.criteria import METHODS
from tests.pruning.test_combinations import data, refusal, small

CHOICES = [
    (method, structure, allocation)
    for method in METHODS
    for structure in (None, "2:4", "row", "column")
    for allocation in ("uniform", "global")
    if refusal(method, allocation, structure) is None
]


def half_zero() -> nn.Module:
    """Half of each matrix is 0, in places drawn row by row, with unequal rows and groups."""
    model, drawn = small(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in model.layers:
            places = torch.randperm(layer.weight.numel(), generator=drawn)[: layer.weight.numel() // 2]
            layer.weight.view(-1)[places] = 0
    return model


def pruned(model: nn.Module, method: str, share: float | None, structure: str | None, allocation: str) -> Masks:
    takes_rounds = method in ("snip", "synflow") and structure != "2:4"
    return sparsify(
        model, sparsity=share, method=method, structure=structure, allocation=allocation, calibration=data(),
        rounds=2 if takes_rounds else None, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def by_hand(kept: torch.Tensor, zero: torch.Tensor, structure: str | None) -> None:
    """Every zero that was there, and beside them no more than the structure asks for."""
    assert not kept[zero].any()
    fresh = (~kept & ~zero).sum()
    if structure is None:
        assert fresh == 0
    elif structure == "2:4":
        before = zero.unflatten(1, (-1, 4)).sum(-1)
        assert (kept.unflatten(1, (-1, 4)).sum(-1) == 4 - before.clamp_min(2)).all()
    else:
        tiles = kept if structure == "row" else kept.mT
        gone = int((~tiles).all(1).sum())
        assert gone == 3 * len(tiles) // 10 and fresh <= gone * tiles.shape[1]


@pytest.mark.parametrize(("method", "structure", "allocation"), CHOICES)
def test_masks_hold_every_zero_that_is_there(method, structure, allocation):
    model = half_zero()
    before = {f"layers.{at}.weight": layer.weight == 0 for at, layer in enumerate(model.layers)}
    masks = pruned(model, method, None if structure == "2:4" else 0.3, structure, allocation)
    assert masks.kept.keys() == before.keys()
    for name, kept in masks.kept.items():
        assert torch.equal(model.get_parameter(name) == 0, ~kept), name
        by_hand(kept, before[name], structure)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "descent"])
def test_counts_above_the_zeros_are_exact(method):
    model = half_zero()
    before = copy.deepcopy(model)
    masks = pruned(model, method, 0.75, None, "global" if method == "lamp" else "uniform")
    assert masks.zeros == 3 * masks.total // 4
    assert all(not kept[before.get_parameter(name) == 0].any() for name, kept in masks.kept.items())


def test_one_matrix_with_more_zeros_than_the_others_keeps_them_beside_the_exact_counts():
    model = small()
    with torch.no_grad():
        model.layers[1].weight[:12] = 0
    masks = sparsify(model, sparsity=0.5)
    assert [int((~kept).sum()) for kept in masks.kept.values()] == [32, 96, 64]
