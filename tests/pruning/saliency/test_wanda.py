"""Wanda's scores in a Sparsifier: by hooks of this file, inside each row, and rows that lose equally many."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import Sparsifier, cubic, one_shot, prunable_weights
from pruning.saliency import dense_wanda_scores
from pruning.structure import within_rows
from tests.pruning.test_calibrated_models import BATCHES, inputs_of, language_model
from tests.tolerances import close


def test_a_sparsifier_by_wanda_takes_the_lowest_of_every_row_on_the_dense_model():
    dense = language_model()
    model = copy.deepcopy(dense)
    masks = Sparsifier(model, schedule=one_shot(0.5), saliency="wanda", calibration=BATCHES).masks()
    scores = dense_wanda_scores(dense, prunable_weights(dense), BATCHES)
    for name, weight in prunable_weights(dense).items():
        x = inputs_of(dense, name.removesuffix(".weight"), BATCHES)
        expected = [[abs(float(w)) * float(x[:, j].norm()) for j, w in enumerate(row)] for row in weight]
        close(scores[name], torch.tensor(expected), torch.float32)
        lowest = torch.tensor(expected).argsort(1)[:, : weight.shape[1] // 2]
        assert not masks.kept[name].gather(1, lowest).any() and masks.kept[name].sum() == weight.numel() // 2
        assert model.get_parameter(name).equal(weight * masks.kept[name])


@pytest.mark.parametrize("allocation", ["uniform", "global", "owl"])
def test_rows_stay_even_while_sparsity_rises_and_what_is_gone_stays(allocation):
    model = language_model(experts=2, layers=1)
    keeper = Sparsifier(model, schedule=cubic(0.7, begin=0, end=4), saliency="wanda", allocation=allocation,
                        calibration=BATCHES)  # fmt: skip
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), keeper.masks().kept
    for _ in range(4):
        model(BATCHES[0]).logits.square().mean().backward()
        optimizer.step()
        keeper.after_step(optimizer)
        optimizer.zero_grad()
        kept = keeper.masks().kept
        assert not any((kept[name] & ~mask).any() for name, mask in before.items())
        before = kept
    for name, mask in before.items():
        if mask.ndim == 2:
            assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1, name


def test_other_structures_take_its_scores():
    masks = Sparsifier(language_model(), schedule=one_shot(0.5), saliency="wanda", structure="2:4",
                       calibration=BATCHES).masks()  # fmt: skip
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in masks.kept.values())


@given(st.lists(st.integers(-1, 3), min_size=20, max_size=20), st.integers(0, 20))
def test_rows_lose_alike_whatever_is_gone(values, count):
    scores = torch.tensor(values, dtype=torch.float32).view(4, 5)
    scores[scores == -1] = -torch.inf
    kept = within_rows(scores, count)
    assert int((~kept).sum()) == count
    gone = (scores == -torch.inf).sum(1).tolist()
    lost = (~kept).sum(1).tolist()
    if sum(gone) >= count:
        assert not (~kept & (scores > -torch.inf)).any()
        return
    assert all(a >= b for a, b in zip(lost, gone, strict=True))
    # a row loses more than another by at most one, unless by what was gone
    assert all(a <= max(b, min(lost) + 1) for a, b in zip(lost, gone, strict=True))
    for row, mask, number in zip(scores.tolist(), kept, lost, strict=True):
        order = sorted(range(5), key=lambda j: (row[j], j))
        assert sorted((~mask).nonzero().squeeze(1).tolist()) == sorted(order[:number])


def test_bad_rows():
    with pytest.raises(ValueError, match=r"count must be in \[0, 6\], got 7"):
        within_rows(torch.rand(2, 3), 7)
    with pytest.raises(ValueError, match="scores must not be NaN, got 1 of 6"):
        within_rows(torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]]), 3)
    with pytest.raises(ValueError, match="got no row of input: give more batches"):
        model = language_model(experts=4)
        dense_wanda_scores(model, prunable_weights(model), [BATCHES[0][:1, :1]])
