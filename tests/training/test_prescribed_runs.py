"""Masks found before training as words of [sparsify], through the trainer."""

from pathlib import Path

import pytest
import torch

from pruning import Masks
from tests.training.models import small_data, small_model, small_trainer
from training.config import SparsifyConfig
from training.sparsify_config import check_sparsify
from training.sparsity import calibration_ids, make_sparsifiers

STEPS = 20
WORDS = {
    "snip": {},
    "grasp": {},
    "synflow": {"shuffle": True},
    "random": {"reinitialise": True},
}


def batches():
    return calibration_ids(small_data(), batch=4, length=16, seed=0, device=torch.device("cpu"))


def trainer(out, config, **train):
    made = small_trainer(out, train={"save_every": 1, "keep": 1} | train)
    made.sparsifiers = tuple(make_sparsifiers(config, made.model, steps=STEPS, calibration=batches))
    return made


@pytest.mark.parametrize("method", WORDS)
def test_a_run_is_sparse_from_the_first_step_and_resumes_exactly(method, tmp_path):
    config = SparsifyConfig(sparsity=0.8, method=method, **WORDS[method])
    whole = trainer(tmp_path / "whole", config)
    masks = whole.sparsifiers[0].masks()
    assert masks.sparsity == pytest.approx(0.8, abs=0.01)
    whole.run()
    assert all(not whole.model.get_parameter(n)[~m].any() for n, m in masks.kept.items())
    first = trainer(tmp_path / "parts", config, stop_at=8)
    first.run()
    second = trainer(tmp_path / "parts", config)
    second.resume(first.saved[1])
    second.run()
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert left.equal(right)


def test_a_saved_models_zeros_and_a_file_of_masks_are_masks(tmp_path):
    model = small_model()
    (method,) = make_sparsifiers(SparsifyConfig(sparsity=0.5, method="random"), model, steps=STEPS)
    wanted = method.masks()
    model.save_pretrained(tmp_path / "model")
    wanted.save(tmp_path / "masks.safetensors")
    for path in (tmp_path / "model", tmp_path / "masks.safetensors"):
        (other,) = make_sparsifiers(SparsifyConfig(method="mask", mask=path), small_model(), steps=STEPS)
        assert all(other.masks().kept[name].equal(mask) for name, mask in wanted.kept.items())
    small_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="must have zeros, got none"):
        make_sparsifiers(SparsifyConfig(method="mask", mask=tmp_path / "dense"), small_model(), steps=STEPS)
    assert Masks.of(model).sparsity > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "mask"}, "sparsify.mask must be set for method='mask'"),
        (
            {"method": "rigl", "sparsity": 0.5, "mask": Path("m")},
            "sparsify.mask must be set for method='mask' and left out",
        ),
        ({"method": "mask", "mask": Path("m"), "sparsity": 0.5}, "sparsify.sparsity must be 0 for method='mask'"),
        ({"method": "rigl", "sparsity": 0.5, "shuffle": True}, "sparsify.shuffle must be false unless method is one"),
        ({"method": "set", "sparsity": 0.5, "reinitialise": True}, "sparsify.reinitialise must be false unless"),
    ],
)
def test_words_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check_sparsify(SparsifyConfig(**settings), steps=100)


def test_scores_that_need_text_say_so():
    with pytest.raises(ValueError, match="calibration"):
        make_sparsifiers(SparsifyConfig(sparsity=0.5, method="snip"), small_model(), steps=STEPS)
