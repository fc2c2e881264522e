"""Every method that is sparse from the first step, through the trainer and its checkpoints."""

import json
from pathlib import Path

import pytest

from pruning import Masks
from tests.training.models import small_trainer
from training.config import SparsifyConfig
from training.optim import make_optimizers
from training.run import make_sparsifiers

METHODS = ["static", "set", "rigl", "snfs", "dsr", "deep_r", "top_kast", "nest", "preferential",
           "robust_rewiring"]  # fmt: skip


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def trainer(out: Path, method: str, **train):
    made = small_trainer(out, train=train)
    config = SparsifyConfig(sparsity=0.8, method=method, every=3, fraction=0.3)
    made.sparsifiers = tuple(make_sparsifiers(config, made.model, steps=made.train.steps))
    return made


@pytest.mark.parametrize("method", ["rigl", "deep_r"])
def test_moments_of_the_weights_that_are_there_resume_to_the_same_losses(method, tmp_path):
    def compact(out, **train):
        made = trainer(out, method, **train)
        made.optimizers = make_optimizers(made.model, lr=0.01, sparse_state=True)
        return made

    whole = compact(tmp_path / "whole")
    whole.run()
    first = compact(tmp_path / "parts", stop_at=10)
    first.run()
    second = compact(tmp_path / "parts")
    second.resume(first.saved[1])
    second.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    masks = whole.sparsifiers[0].masks().kept
    active = sum(int(mask.sum()) for mask in masks.values())
    dense = sum(p.numel() for name, p in whole.model.named_parameters() if name not in masks)
    assert whole.optimizers.main.moment_bytes() == 12 * active + 8 * dense


@pytest.mark.parametrize("topology", ["banded", "local", "block_diagonal", "small_world"])
def test_a_topology_is_one_word(topology, tmp_path):
    model = small_trainer(tmp_path).model
    masks = {}
    for name in ("random", topology):
        config = SparsifyConfig(sparsity=0.8, method="static", topology=name)
        masks[name] = make_sparsifiers(config, model, steps=20)[0].masks().kept
    assert not any(one.equal(two) for one, two in zip(masks["random"].values(), masks[topology].values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_ends_sparse_and_resumes_to_the_same_losses(method, tmp_path):
    whole = trainer(tmp_path / "whole", method)
    whole.run()
    assert Masks.of(whole.model).sparsity >= 0.79
    first = trainer(tmp_path / "parts", method, stop_at=10)
    first.run()
    second = trainer(tmp_path / "parts", method)
    second.resume(first.saved[1])
    second.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert one.equal(two)
