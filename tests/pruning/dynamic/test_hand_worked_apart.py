"""All methods worked by hand: no two end with the same mask, and none is missing."""

from itertools import combinations

import pytest

from pruning import Sparsifier, dynamic, learned, retraining
from tests.pruning.dynamic import (
    test_hand_worked,
    test_hand_worked_learned,
    test_hand_worked_schedules,
    test_hand_worked_shrinkage,
    test_hand_worked_walks,
)

MODULES = (
    test_hand_worked,
    test_hand_worked_walks,
    test_hand_worked_schedules,
    test_hand_worked_learned,
    test_hand_worked_shrinkage,
)
WORKED = {name: worked for module in MODULES for name, worked in module.WORKED.items()}


@pytest.fixture(scope="module")
def traces():
    return {name: worked.run() for name, worked in WORKED.items()}


def test_no_two_methods_end_with_the_same_mask(traces):
    """The layer's mask after two updates; where methods would agree by definition, the numbers are such
    that they do not.

    Dense training followed by a choice of the largest is one mask whoever chooses: feedback is still on its way to its
    sparsity, wirings rank the companion too, tickets go back to their start and early birds choose alone."""
    assert len(WORKED) == sum(len(module.WORKED) for module in MODULES) == 35
    for one, two in combinations(traces, 2):
        assert traces[one].masks[-1] != traces[two].masks[-1], (one, two)


def test_every_method_is_worked_out(traces):
    """Every class of `pruning.dynamic` and `pruning.retraining` that trains sparsely, and those with learned masks."""
    worked = {type(trace.method) for trace in traces.values()}
    offered = [getattr(package, name) for package in (dynamic, retraining) for name in package.__all__]
    methods = {made for made in offered if hasattr(made, "after_step")} - {dynamic.DynamicSparsity}
    assert len(methods) > 15
    names = ("Movement", "SoftMovement", "STR", "L0", "VariationalDropout", "Proximal", "Regularized")
    assert methods | {getattr(learned, name) for name in names} | {Sparsifier} <= worked
