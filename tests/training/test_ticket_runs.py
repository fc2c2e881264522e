"""Lottery tickets and early birds through the trainer: schedules start again, runs end sparse and resume exactly."""

import json

import pytest

from moe.memory_values import sparse_tables
from pruning import Masks
from tests.training.models import small_trainer
from tests.training.test_memories import memory_trainer
from training.config import SparsifyConfig
from training.sparsify_config import check_sparsify
from training.sparsity import make_pace, make_sparsifiers

STEPS = 20
CONFIGS = {
    "lottery": SparsifyConfig(sparsity=0.8, method="lottery", begin=4, rounds=3),
    "early_bird": SparsifyConfig(sparsity=0.8, method="early_bird", every=2, end=15, distance="relative"),
}


def trainer(out, method, **train):
    made = small_trainer(out, train={"save_every": 1, "keep": 1} | train)
    made.sparsifiers = tuple(make_sparsifiers(CONFIGS[method], made.model, steps=STEPS))
    made.pace = make_pace(CONFIGS[method], steps=STEPS, warmup=3)
    return made


def lines(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "loss" in line]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("stop", [8, 11])  # a pass of the lottery ends at 8
def test_it_ends_sparse_and_resumes_to_the_same_losses(method, stop, tmp_path):
    whole = trainer(tmp_path / "whole", method)
    outcome = whole.run()
    assert Masks.of(whole.model).sparsity == pytest.approx(0.8, abs=0.01)
    assert outcome.sparsifiers == whole.sparsifiers
    first = trainer(tmp_path / "parts", method, stop_at=stop)
    first.run()
    second = trainer(tmp_path / "parts", method)
    second.resume(first.saved[1])
    second.run()
    one, two = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert left.equal(right)


def test_every_pass_of_a_lottery_has_the_same_rates(tmp_path):
    trainer(tmp_path, "lottery").run()
    rates = [line["lr"] for line in lines(tmp_path)]
    passes = [rates[4 + 4 * n : 8 + 4 * n] for n in range(4)]
    assert passes[0] == passes[1] == passes[2] == passes[3]
    # each is a whole schedule of 8 steps: warm-up to the peak of 0.01, and a last rate of a tenth
    assert max(rates) == pytest.approx(0.01) and rates[-1] == pytest.approx(0.001)


@pytest.mark.parametrize("kind", ["product_key", "peer", "pool"])
def test_a_rewound_memory_starts_afresh_in_every_optimiser(kind, tmp_path):
    """Three passes of 4 steps from step 2: at 6 and 10 all parameters are those of step 2, all moments 0."""
    made = memory_trainer(tmp_path, kind, train={"steps": 14, "save_every": 50})
    config = SparsifyConfig(sparsity=0.8, method="lottery", begin=2, rounds=2)
    made.sparsifiers = tuple(make_sparsifiers(config, made.model, steps=14))
    begun = {}
    for step in range(1, 15):
        made.train_step()
        optimizers = (made.optimizers.main, made.optimizers.tables)
        slots = [s for o in optimizers for state in o.state.values() for s in state.values()]
        if step == 2:
            begun = {name: value.clone() for name, value in made.model.state_dict().items()}
        assert (not any(slot.any() for slot in slots)) == (step in (6, 10))
        if step in (6, 10):
            kept = made.sparsifiers[0].masks().kept
            for name, value in made.model.state_dict().items():
                assert value.equal(begun[name] * kept[name] if name in kept else begun[name])
    assert int(made.optimizers.tables.state[next(sparse_tables(made.model))]["step"]) == 4


def test_a_rewound_memory_resumes_to_the_same_losses(tmp_path):
    def run(out, **train):
        made = memory_trainer(out, "product_key", train={"save_every": 1, "keep": 1} | train)
        made.sparsifiers = tuple(make_sparsifiers(CONFIGS["lottery"], made.model, steps=STEPS))
        return made

    whole, first = run(tmp_path / "whole"), run(tmp_path / "parts", stop_at=8)
    whole.run(), first.run()
    second = run(tmp_path / "parts")
    second.resume(first.saved[1])
    second.run()
    for left, right in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert left.equal(right)


def test_steps_that_are_no_whole_passes_are_refused():
    with pytest.raises(ValueError, match=r"train.steps - sparsify.begin must be a multiple of .* = 4, got 15"):
        check_sparsify(SparsifyConfig(sparsity=0.5, method="lottery", begin=5), steps=20)
    with pytest.raises(ValueError, match=r"sparsify.rounds must be >= 1, got 0"):
        check_sparsify(SparsifyConfig(rounds=0), steps=20)
    with pytest.raises(ValueError, match=r"sparsify.every must be <= 2, so that the 6 masks .* by step 15, got 15"):
        check_sparsify(SparsifyConfig(sparsity=0.5, method="early_bird", every=15), steps=20)
