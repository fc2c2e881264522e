"""A run that goes on under another [sparsify] method, sparsity or spread is refused, and says what differs."""

from itertools import permutations

import pytest

from tests.training.models import small_model
from training.sparsify_config import SparsifyConfig
from training.sparsity import make_sparsifiers

STEPS = 12
WORDS = {
    "static": {}, "set": {"every": 2}, "rigl": {"every": 2}, "snfs": {"every": 2}, "dsr": {"every": 2}, "deep_r": {},
    "top_kast": {"every": 2}, "nest": {"every": 2}, "preferential": {"every": 2}, "robust_rewiring": {},
    "magnitude": {"end": 6, "every": 2}, "movement": {"every": 2}, "lottery": {"rounds": 2}, "random": {},
    "early_bird": {"every": 1}, "iht": {"every": 2},
}  # fmt: skip
NAMES = {"lottery": "Rewinding", "early_bird": "EarlyBirdPruning", "random": "Prescribed", "magnitude": "Sparsifier",
         "iht": "HardThresholding"}  # fmt: skip


def made(method, *, sparsity=0.5, **words):
    config = SparsifyConfig(sparsity=sparsity, method=method, **WORDS[method], **words)
    (found,) = make_sparsifiers(config, small_model(experts=0), steps=STEPS)
    return found


@pytest.fixture(scope="module")
def states():
    return {method: made(method).state_dict() for method in WORDS}


def test_every_other_methods_state_is_refused_by_name(states):
    runs = {method: made(method) for method in WORDS}
    names = {method: type(run).__name__ for method, run in runs.items()}
    assert len(set(names.values())) == len(WORDS) and NAMES.items() <= names.items()
    for saved, now in permutations(WORDS, 2):
        with pytest.raises(ValueError, match=rf"state must be one of {names[now]}, got .*{names[saved]}"):
            runs[now].load_state_dict(states[saved])


@pytest.mark.parametrize("method", WORDS)
def test_its_own_is_taken(states, method):
    made(method).load_state_dict(states[method])


OTHERWISE = [
    *((method, 0.75, {}, "sparsity must be 0.5, with which the state of .* was trained, got 0.75")
      for method in ("static", "set", "rigl", "snfs", "dsr", "deep_r", "top_kast", "nest", "preferential",
                     "robust_rewiring", "lottery", "early_bird")),
    ("random", 0.75, {}, "masks must have [0-9]+ zeros, as in the state, got [0-9]+: go on with the method, sparsity"),
    ("early_bird", 0.5, {"distance": "relative"}, "relative must be False, .* EarlyBirdPruning was trained, got True"),
    ("lottery", 0.5, {"begin": 3}, "every must be 4, with which the state of Rewinding was trained, got 3"),
    *((method, 0.5, {"allocation": "uniform"}, "allocation must give '.*weight.*' the [0-9]+ connections with which the"
       " state of .* began, got [0-9]+") for method in ("static", "set", "dsr")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "sparsity", "words", "message"), OTHERWISE)
def test_another_sparsity_or_spread_is_refused_and_nothing_changes(states, method, sparsity, words, message):
    run = made(method, sparsity=sparsity, **words)
    before = {name: mask.clone() for name, mask in run.masks().kept.items()}
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(states[method])
    assert all(mask.equal(before[name]) for name, mask in run.masks().kept.items())


def test_states_from_before_they_were_named(states):
    def unnamed(method):
        return {name: value for name, value in states[method].items() if name not in ("method", "asked", "begun")}

    for method in ("magnitude", "random"):
        made(method).load_state_dict(unnamed(method))
    for method in ("set", "rigl", "top_kast", "lottery", "early_bird"):
        with pytest.raises(ValueError, match=r"got one that names no method, .*; start the run anew"):
            made(method).load_state_dict(unnamed(method))
