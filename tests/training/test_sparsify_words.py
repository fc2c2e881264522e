"""Words of [sparsify] that a method does not read, sparsities that leave a matrix empty, and ends before the start."""

from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from pruning import prunable_weights
from tests.training.models import small_model
from training.sparsify_config import (
    ALWAYS_READ,
    FINDING,
    READS,
    SparsifyConfig,
    SparsifyMethod,
    check_sparsify,
    unread,
)
from training.sparsity import FROM_THE_START, make_sparsifiers
from training.study.spec import Cell, load_study, run_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1200
OTHERWISE = {
    "strength": 0.5, "gate_lr": 3.0, "fraction": 0.7, "when": "low", "criterion": "statistic", "mask": Path("m"),
    "shuffle": True, "reinitialise": True, "topology": "banded", "attack": 0.5, "allocation": "uniform", "begin": 10,
    "end": 600, "every": 5, "rounds": 2, "schedule": "linear", "distance": "relative", "scope": "global",
    "rate": "rewarm",
}  # fmt: skip
# What these need besides to come in time.
TOGETHER = {("dsd", "begin"): {"end": 600}, ("lottery", "begin"): {"begin": 20}, ("iht", "begin"): {"begin": 150},
            ("early_bird", "end"): {"end": 300}}  # fmt: skip
METHODS = get_args(SparsifyMethod)


def plain(method):
    config = SparsifyConfig(method=method, sparsity=0.0 if method in FINDING or method == "mask" else 0.5)
    return replace(config, mask=Path("m")) if method == "mask" else config


def test_every_method_and_every_word_has_its_place():
    assert set(READS) == set(METHODS)
    words = {word.name for word in fields(SparsifyConfig)}
    assert words == {*OTHERWISE, *ALWAYS_READ} == {*ALWAYS_READ}.union(*READS.values())
    assert all(word.default is not MISSING for word in fields(SparsifyConfig))


@pytest.mark.parametrize("method", METHODS)
def test_a_word_that_the_method_does_not_read_is_refused_by_name_and_the_others_are_not(method):
    config = plain(method)
    check_sparsify(config, steps=STEPS)
    assert {*unread(method), *READS[method], *ALWAYS_READ} == {word.name for word in fields(SparsifyConfig)}
    for word in unread(method):
        with pytest.raises(ValueError, match=rf"sparsify\.{word} must .*{method}") as caught:
            check_sparsify(replace(config, **{word: OTHERWISE[word]}), steps=STEPS)
        # these had a message of their own
        if word not in ("mask", "shuffle", "reinitialise", "strength", "rate"):
            reads = ", ".join(READS[method]) or "sparsity alone"
            assert f"must be left out for method={method!r}, which reads {reads}, got" in str(caught.value)
    for word in READS[method]:
        check_sparsify(replace(config, **{word: OTHERWISE[word]} | TOGETHER.get((method, word), {})), steps=STEPS)


def test_a_studys_base_is_every_arms_and_what_an_arm_says_is_its_own():
    study = load_study(ROOT / "examples" / "studies" / "sparse-from-scratch.toml")
    arms = {arm.name: arm for arm in study.arm}

    def table(arm):
        return run_config(study, Cell(arm, 1e-2, 0), out=Path("out"), threads=1).sparsify

    study = replace(study, base=study.base | {"sparsify": {"every": 15}})
    assert table(arms["set sparsity 0.9"]).every == 15
    assert table(arms["static sparsity 0.9"]) == SparsifyConfig(0.9, "static")
    own = arms["static sparsity 0.9"].changes | {"sparsify.every": 15}
    with pytest.raises(ValueError, match="sparsify.every must be left out for method='static', .*, got 15"):
        table(replace(arms["static sparsity 0.9"], changes=own))


def test_what_prunes_nothing_reads_nothing():
    check_sparsify(SparsifyConfig(topology="banded", fisher_penalty=0.1, every=3), steps=STEPS)


@pytest.mark.parametrize("method", [name for name in METHODS if "scope" in READS[name]] + ["dnw"])
def test_one_ranking_that_leaves_a_matrix_empty_is_refused_before_any_training(method):
    words = {} if method == "dnw" else {"scope": "global"}
    message = (
        r"sparsify\.sparsity must be <= 0\.9[0-9]*, so that each of .* 'layers.*' \[.*, keeps a weight, got 0\.99999"
    )
    with pytest.raises(ValueError, match=message):
        make_sparsifiers(SparsifyConfig(0.99999, method, **words), small_model(experts=2), steps=STEPS)
    if words:
        assert make_sparsifiers(SparsifyConfig(0.99999, method), small_model(experts=2), steps=STEPS)


@pytest.mark.parametrize("method", FROM_THE_START)
def test_erdos_renyi_that_leaves_a_matrix_empty_is_refused_before_any_training(method):
    with pytest.raises(
        ValueError, match=r"sparsify\.sparsity must leave 'layers.*' \[.*\] a weight under .* got 0\.99999"
    ):
        make_sparsifiers(SparsifyConfig(0.99999, method), small_model(experts=2), steps=STEPS)


def test_the_most_that_one_ranking_may_take_is_taken():
    """All but one weight of each matrix, by hand: 1 − matrices/weights."""
    model = small_model(experts=0)
    shapes = [weight.shape for weight in prunable_weights(model).values()]
    assert all(len(shape) == 2 for shape in shapes)
    total = sum(shape.numel() for shape in shapes)
    most = 1 - len(shapes) / total
    (method,) = make_sparsifiers(SparsifyConfig(most, "feedback", scope="global", end=1, every=1), model, steps=2)
    method.after_step(torch.optim.SGD(model.parameters(), lr=0.0))
    assert [int(mask.sum()) for mask in method.masks().kept.values()] == [1] * len(shapes)
    with pytest.raises(ValueError, match="so that each of"):
        make_sparsifiers(SparsifyConfig(most + 1 / total, "feedback", scope="global"), model, steps=2)


@pytest.mark.parametrize("method", [name for name in METHODS if "end" in READS[name]])
def test_a_negative_end_is_refused(method):
    with pytest.raises(ValueError, match=r"sparsify\.end must be >= 0, got -5"):
        check_sparsify(SparsifyConfig(0.5, method, end=-5), steps=STEPS)


def test_the_methods_that_are_sparse_from_the_start_say_when_they_rest():
    assert [name for name in FROM_THE_START if "end" not in READS[name]] == ["static", "top_kast"]
