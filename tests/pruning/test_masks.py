"""Masks: applied, saved, loaded and refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from pruning import Masks, sparsify
from tests.pruning.test_sparsify import Mixed


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(0, 20))
def test_masks_survive_saving_and_the_model_tells_its_own(tmp_path_factory, percent, seed):
    torch.manual_seed(seed)
    model = Mixed()
    masks = sparsify(model, sparsity=percent / 100)
    path = masks.save(tmp_path_factory.mktemp("masks") / "masks.safetensors")
    for other in (Masks.load(path), Masks.from_state_dict(masks.state_dict()), Masks.of(model)):
        assert other.kept.keys() == masks.kept.keys()
        assert all(mask.equal(masks.kept[name]) for name, mask in other.kept.items())
    assert [file.name for file in path.parent.iterdir()] == ["masks.safetensors"]


def test_masks_apply_sets_exactly_the_pruned_weights_even_nan():
    model = Mixed()
    masks = sparsify(copy.deepcopy(model), sparsity=0.5)
    kept = masks.kept["first.weight"]
    with torch.no_grad():
        model.first.weight[~kept] = torch.nan
    before = model.first.weight.detach().clone()
    masks.apply(model)
    assert (model.first.weight[~kept] == 0).all() and model.first.weight[kept].equal(before[kept])
    assert "weights are zero (50.00%)" in str(masks)


def test_masks_take_a_bit_a_weight_and_older_files_of_bytes_are_read(tmp_path):
    masks = Masks({"a": torch.rand(130, 1000) < 0.4, "experts": torch.rand(3, 5, 7) < 0.5})
    path = masks.save(tmp_path / "m.safetensors")
    assert path.stat().st_size < 130 * 1000 / 8 + 600
    save_file(dict(masks.kept), tmp_path / "old.safetensors")
    for file in (path, tmp_path / "old.safetensors"):
        found = Masks.load(file).kept
        assert found.keys() == masks.kept.keys() and all(found[name].equal(masks.kept[name]) for name in found)


def test_damaged_and_foreign_masks_are_refused(tmp_path):
    masks = sparsify(Mixed(), sparsity=0.5)
    path = masks.save(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged or cut short"):
        Masks.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        Masks.load(tmp_path / "none")
    with pytest.raises(ValueError, match="must be boolean, got torch.float32"):
        Masks.from_state_dict({"a": torch.ones(2)})
    with pytest.raises(ValueError, match="'experts', which the model does not have"):
        masks.apply(nn.Linear(2, 2))
