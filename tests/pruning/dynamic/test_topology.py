"""Designed topologies: exact counts whatever the shape, and the shape of each against a plain loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruning import uniform
from pruning.dynamic import StaticSparsity, banded, block_diagonal, locally_connected, small_world

TOPOLOGIES = {
    "banded": banded,
    "local": locally_connected,
    "blocks": block_diagonal,
    "ring": small_world(0.0),
    "small world": small_world(0.3),
    "random": small_world(1.0),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.sampled_from(sorted(TOPOLOGIES)), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 9))
def test_exactly_so_many_connections(name, outputs, inputs, share, seed):
    kept = round(share * outputs * inputs)
    mask = TOPOLOGIES[name](outputs, inputs, kept, seeded(seed))
    assert mask.shape == (outputs, inputs) and mask.dtype == torch.bool and int(mask.sum()) == kept


def test_a_band_by_hand():
    wanted = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert banded(4, 4, 10, seeded()).int().tolist() == wanted


@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 1))
def test_no_pair_outside_the_band_is_nearer_than_one_inside(outputs, inputs, share):
    kept = round(share * outputs * inputs)
    mask = banded(outputs, inputs, kept, seeded())
    distance = {(i, j): abs((j + 0.5) / inputs - (i + 0.5) / outputs) for i in range(outputs) for j in range(inputs)}
    inside = [d for place, d in distance.items() if mask[place]]
    outside = [d for place, d in distance.items() if not mask[place]]
    assert not inside or not outside or max(inside) <= min(outside) + 1e-9


def test_local_connections_by_hand():
    wanted = [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert locally_connected(3, 6, 9, seeded()).int().tolist() == wanted


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1))
def test_local_fields_are_runs_of_equal_length_that_move_on(outputs, inputs, share):
    mask = locally_connected(outputs, inputs, round(share * outputs * inputs), seeded())
    starts = {}
    for row in mask.tolist():
        places = [j for j, on in enumerate(row) if on]
        if places:
            assert places == list(range(places[0], places[-1] + 1))
            starts.setdefault(len(places), []).append(places[0])
    assert all(found == sorted(found) for found in starts.values())
    fan_in = mask.sum(1)
    assert fan_in.max() - fan_in.min() <= 1


def test_blocks_see_their_own_inputs_alone():
    full = block_diagonal(4, 6, 12, seeded())
    assert full.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
    fewer = block_diagonal(4, 6, 10, seeded())
    assert not (fewer & ~full).any() and fewer.sum() == 10
    assert not block_diagonal(4, 6, 10, seeded(1)).equal(fewer)


def test_a_ring_wraps_and_rewiring_keeps_each_fan_in():
    ring = small_world(0.0)(4, 4, 12, seeded())
    assert ring.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]
    ring = small_world(0.0)(50, 40, 400, seeded())
    moved = small_world(0.25)(50, 40, 400, seeded())
    assert moved.sum(1).equal(ring.sum(1))
    share = (ring & ~moved).sum() / 400
    assert 0.18 < share < 0.32


def test_all_topologies_differ():
    masks = [topology(12, 10, 40, seeded()) for topology in TOPOLOGIES.values()]
    assert all(not one.equal(two) for n, one in enumerate(masks) for two in masks[:n])


def test_a_static_method_lays_its_connections_out():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.experts = nn.Linear(8, 6), nn.Parameter(torch.randn(2, 8, 4))

    model = Two()
    before = model.first.weight.detach().clone()
    method = StaticSparsity(model, sparsity=0.5, allocation=uniform, topology=banded)
    masks = method.masks().kept
    assert masks["first.weight"].equal(banded(6, 8, 24, seeded()))
    # a stack is laid out [E, in, out]
    assert masks["experts"][1].mT.equal(banded(4, 8, 16, seeded()))
    assert model.first.weight.equal(before * masks["first.weight"])


def test_bad_options():
    with pytest.raises(ValueError, match=r"kept must be in \[0, outputs\*inputs=6\], got 7"):
        banded(2, 3, 7, seeded())
    with pytest.raises(ValueError, match=r"rewire must be in \[0, 1\], got 1.5"):
        small_world(1.5)
