"""Shuffled masks and fresh weights: counts kept, places new, nothing else touched."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import Masks, sparsify
from pruning.sanity import reinitialise, shuffle_masks
from pruning.weights import matrices
from tests.pruning.test_transformer import build


@given(st.integers(0, 99), st.integers(0, 20))
def test_every_matrix_keeps_its_count(percent, seed):
    generator = torch.Generator().manual_seed(seed)
    kept = {"a": torch.rand(6, 5, generator=generator) > percent / 100, "experts": torch.rand(3, 4, 2) > percent / 100}
    before = {name: mask.clone() for name, mask in kept.items()}
    shuffled = shuffle_masks(Masks(kept), generator=generator)
    for name, mask in matrices(shuffled.kept).items():
        assert mask.sum() == matrices(before)[name].sum()
    assert all(mask.equal(before[name]) for name, mask in kept.items())


def test_places_are_drawn_evenly_and_by_the_seed():
    masks = Masks({"a": torch.tensor([[True, False, False, False]])})
    again = [shuffle_masks(masks, generator=torch.Generator().manual_seed(3)).kept["a"] for _ in range(2)]
    assert again[0].equal(again[1])
    generator = torch.Generator().manual_seed(0)
    counts = sum(shuffle_masks(masks, generator=generator).kept["a"].long() for _ in range(400))
    assert (counts - 100).abs().max() < 40


def test_fresh_weights_under_the_old_masks():
    model = build("moe", layers=1)
    masks = sparsify(model, sparsity=0.5)
    embedding = model.embedding.weight.detach().clone()
    fresh = build("moe", layers=1, seed=9)
    reinitialise(model, lambda: fresh, masks)
    for name, parameter in model.named_parameters():
        if name in masks.kept:
            assert parameter.equal(dict(fresh.named_parameters())[name] * masks.kept[name])
    assert model.embedding.weight.equal(embedding)
    with pytest.raises(ValueError, match=r"build\(\) must give 'layers.0.attention.query.weight' of shape"):
        reinitialise(model, lambda: torch.nn.Linear(2, 2), masks)
