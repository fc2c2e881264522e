"""Intervals and beginnings that a training is too short for: refused for every method, as a config says them."""

import pytest
import torch

from pruning.retraining import EarlyBirdPruning, HardThresholding
from tests.training.models import small_model
from training.config import OptimConfig, RunConfig, TrainConfig
from training.sparsify_config import SparsifyConfig, check_sparsify
from training.sparsity import make_sparsifiers

REFUSED = [
    ({"method": "top_kast", "every": 100}, "every must be < train.steps=100 for method='top_kast', got 100"),
    ({"method": "lc", "every": 100}, "every must be < train.steps=100 for method='lc', got 100"),
    ({"method": "rigl", "every": 75}, "every must be < 75, the step at which method='rigl' rests .* got 75"),
    ({"method": "rigl", "every": 500, "end": 10000}, "every must be < 100, .* got 500: it would never update"),
    ({"method": "rigl", "every": 1, "end": 1}, "every must be < 1, .* got 1: it would never update"),
    ({"method": "set", "every": 100, "end": 200}, "every must be < 100, .* got 100: it would never update"),
    ({"method": "snfs", "every": 80}, "every must be < 75"),
    ({"method": "dsr", "every": 80}, "every must be < 75"),
    ({"method": "preferential", "every": 80}, "every must be < 75"),
    ({"method": "nest", "every": 38}, "every must be <= 37 .* so that 'nest' grows and then prunes, got 38"),
    ({"method": "nest", "every": 50, "end": 100}, "every must be <= 49 .* got 50"),
    (
        {"method": "feedback", "every": 10000},
        "every must be <= 75, the steps from sparsify.begin to .* at 75, got 10000",
    ),
    ({"method": "movement", "every": 10000}, "every must be <= 75"),
    ({"method": "movement", "every": 60}, r"every must have a multiple in \[75, train.steps=100\], .* got 60"),
    (
        {"method": "feedback", "begin": 80, "every": 60},
        r"every must have a multiple in \[80, train.steps=100\], .* got 60",
    ),
    ({"method": "movement", "end": 200}, "end must be <= train.steps=100, got 200: the sparsity would not be reached"),
    ({"method": "magnitude", "end": 200}, "end must be <= train.steps=100, got 200: the sparsity would not be reached"),
    ({"method": "magnitude", "begin": 500, "end": 900}, r"begin must be in \[0, train.steps=100\), got 500"),
    ({"method": "magnitude", "begin": 100}, r"begin must be in \[0, train.steps=100\), got 100"),
    ({"method": "magnitude", "begin": -1}, r"begin must be in \[0, train.steps=100\), got -1"),
    ({"method": "magnitude", "begin": 60, "end": 100, "every": 41}, "every must be <= 40, the steps .* at 100, got 41"),
    ({"method": "movement", "begin": 500, "end": 900}, r"begin must be in \[0, train.steps=100\), got 500"),
    ({"method": "generalization", "begin": 1000}, r"begin must be in \[0, train.steps=100\), got 1000"),
    ({"method": "lottery", "begin": 100}, r"begin must be in \[0, train.steps=100\), got 100"),
    ({"method": "iht", "begin": 1000}, r"begin must be in \[0, train.steps=100\), got 1000"),
    ({"method": "iht", "every": 10000}, "every must be <= 100, the steps from sparsify.begin=0 on, .* got 10000"),
    (
        {"method": "iht", "begin": 60, "every": 50},
        "every must be <= 40, the steps from sparsify.begin=60 on, .* got 50",
    ),
    ({"method": "iht", "begin": 1, "every": 10}, "ends in a dense phase of 'iht', .*: sparsify.begin must be 10, or 0"),
    ({"method": "dsd", "begin": 500, "end": 900}, r"begin must be in \[0, train.steps=100\), got 500"),
    ({"method": "dsd", "begin": 50, "end": 100}, r"end must be in \(sparsify.begin=50, train.steps=100\) .* got 100"),
    ({"method": "dsd", "begin": 50, "end": 50}, r"end must be in \(sparsify.begin=50, train.steps=100\) .* got 50"),
    ({"method": "dsd", "begin": 50}, "begin must be 0 without sparsify.end for method='dsd', got 50"),
    ({"method": "early_bird", "end": 1000}, "end must be <= train.steps=100, or it may never prune, got 1000"),
    ({"method": "early_bird", "every": 13}, "every must be <= 12, so that the 6 masks .* by step 75, got 13"),
    ({"method": "early_bird", "every": 9, "end": 50}, "every must be <= 8, so that the 6 masks .* by step 50, got 9"),
]
TAKEN = [
    {"method": "top_kast", "every": 99},
    {"method": "lc", "every": 99},
    {"method": "rigl", "every": 74},
    {"method": "rigl", "every": 99, "end": 10000},
    {"method": "nest", "every": 37},
    {"method": "deep_r", "end": 10000},
    {"method": "feedback", "every": 75},
    {"method": "movement", "begin": 99, "end": 0, "every": 1},
    {"method": "magnitude", "begin": 60, "end": 100, "every": 40},
    {"method": "magnitude", "begin": 99, "every": 10000},
    {"method": "iht", "begin": 10, "every": 10},
    {"method": "iht", "every": 100},
    {"method": "dsd", "begin": 50, "end": 99},
    {"method": "dsd"},
    {"method": "early_bird", "every": 8, "end": 50},
]


def text(options):
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[text(options) for options, _ in REFUSED])
def test_what_would_not_come_in_time_is_refused_and_nothing_that_prunes_nothing(options, message):
    with pytest.raises(ValueError, match=f"sparsify.{message}" if not message.startswith("ends") else message):
        check_sparsify(SparsifyConfig(sparsity=0.5, **options), steps=100)
    check_sparsify(SparsifyConfig(**options), steps=100)


@pytest.mark.parametrize("options", TAKEN, ids=text)
def test_what_comes_in_time_is_taken_and_made(options):
    config = SparsifyConfig(sparsity=0.5, **options)
    check_sparsify(config, steps=100)
    assert len(make_sparsifiers(config, small_model(experts=0), steps=100)) == 1


@pytest.mark.parametrize("every", [1, 7, 50, 500, 999])
def test_iht_ends_in_a_whole_sparse_phase_by_itself(every):
    config = SparsifyConfig(sparsity=0.5, method="iht", every=every)
    check_sparsify(config, steps=1000)
    (method,) = make_sparsifiers(config, small_model(experts=0), steps=1000)
    assert isinstance(method, HardThresholding)
    assert all(method.sparse_at(step) for step in range(1000 - every, 1000))
    assert every == 1000 or not method.sparse_at(999 - every)


def test_an_evaluation_that_comes_too_late_for_generalization():
    def config(eval_every, begin=0):
        sparsify = SparsifyConfig(sparsity=0.5, method="generalization", begin=begin)
        return RunConfig(
            train=TrainConfig(steps=100, eval_every=eval_every), sparsify=sparsify, optim=OptimConfig(warmup=1)
        )

    for eval_every, begin, least in ((100, 0, 1), (1000, 0, 1), (50, 60, 60)):
        message = rf"train.eval_every must have a multiple in \[{least}, train.steps=100\) .* got {eval_every}"
        with pytest.raises(ValueError, match=message):
            config(eval_every, begin)
    config(99)
    config(30, 90)


def test_generalization_prunes_by_magnitude_as_prechelts_share_says_unless_asked():
    (method,) = make_sparsifiers(SparsifyConfig(sparsity=0.5, method="generalization"), small_model(), steps=10)
    assert (method.when, method.criterion) == ("high", "magnitude")


def test_a_mask_that_had_to_be_taken_is_no_early_bird():
    """The same run with and without a threshold that any mask meets."""
    for threshold, found, forced in ((10.0, 6, False), (1e-9, 9, True)):
        model = small_model(experts=0)
        method = EarlyBirdPruning(model, sparsity=0.5, every=1, end=9, threshold=threshold)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(12):
            for parameter in model.parameters():
                parameter.data.normal_()
            method.after_step(optimizer)
        assert (method.found, method.forced) == (found, forced)
        other = EarlyBirdPruning(small_model(experts=0), sparsity=0.5, every=1, end=9)
        other.load_state_dict(method.state_dict())
        assert (other.found, other.forced) == (found, forced)
