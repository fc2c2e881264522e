"""Learned gates on whole units, then surgery: what they close can be cut out, grouped-query attention included."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import Axis, masked, prunable_axes, shrink
from pruning.learned import L0Units, UnitGates, VariationalUnits
from pruning.selection import completed
from tests.pruning.adapters.models import answer, ids, peer
from tests.tolerances import close

METHODS = {
    "sigmoid": lambda model, **options: UnitGates(model, sparsity=0.4, **options),
    "softplus": lambda model, **options: UnitGates(model, sparsity=0.4, form="softplus", polarize=1.2, **options),
    "l0": lambda model, **options: L0Units(model, **options),
    "variational": lambda model, **options: VariationalUnits(model, **options),
}


def spread(method, seed):
    """Gates far enough apart that every method closes some."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in method.named_gates().values():
            gate.copy_(torch.randn(gate.shape, generator=generator) * 6)


@pytest.mark.filterwarnings("ignore:the (layers|config)")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_gates_close_under_grouped_queries_can_be_cut_out(name, seed):
    model = peer("Llama", num_attention_heads=4, num_key_value_heads=2).double()
    method = METHODS[name](model)
    spread(method, seed)
    before, found = copy.deepcopy(model), method.kept()
    with method.parametrise():
        wanted = answer(model, ids())
    method.finish()
    close(answer(model, ids()), wanted)
    axes, kept = prunable_axes(model), method.kept()
    assert any(len(units) < 4 for key, units in kept.items() if "heads" in key)
    if name == "sigmoid":
        assert kept == found
    with masked(model, axes, kept):
        close(answer(model, ids()), wanted)
    shrink(model, axes, kept)
    close(answer(model, ids()), wanted)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())


def lowest_feasible(values, count):
    """Of 4 heads on 2 key-value heads in each layer, by trying everything: the closed sets of each layer."""
    sets = [[], [0, 2], [0, 3], [1, 2], [1, 3], [0, 1], [2, 3],
            [0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3], [0, 1, 2, 3]]  # fmt: skip
    best = [(0, 0.0, ())]
    for row in values:
        best = [(gone + len(s), total + sum(row[i] for i in s), (*chosen, tuple(sorted(s))))
                for gone, total, chosen in best for s in sets if gone + len(s) <= count]  # fmt: skip
    most = max(gone for gone, _, _ in best)
    return min((total, chosen) for gone, total, chosen in best if gone == most)[1], most


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.42, 0.6, 0.9])
def test_heads_that_close_are_the_lowest_that_surgery_takes(sparsity, seed):
    method = UnitGates(peer("Llama").double(), sparsity=sparsity, kinds=("head",))
    spread(method, seed)
    values = [torch.sigmoid(gate.detach()).tolist() for gate in method.named_gates().values()]
    closed, many = lowest_feasible(values, int(sparsity * 12))
    assert [tuple(sorted(set(range(4)) - set(units))) for units in method.kept().values()] == list(closed)
    assert sum(4 - len(units) for units in method.kept().values()) == many


def test_a_neuron_closes_for_a_head_that_cannot_go_alone():
    model = peer("Llama").double()
    method = UnitGates(model, sparsity=0.013)  # one of 84 units
    with torch.no_grad():
        for gate in method.named_gates().values():
            gate.fill_(2.0)
        method.named_gates()["model.layers.1.self_attn.o_proj.weight"][3] = 0.0
        method.named_gates()["model.layers.2.mlp.down_proj.weight"][17] = 1.0
    kept = method.kept()
    closed = {key: set(range(24 if "neurons" in key else 4)) - set(units) for key, units in kept.items()}
    assert {key: units for key, units in closed.items() if units} == {"model.layers.2.mlp.neurons": {17}}


def axis_of(groups, size, least):
    return Axis("head", 0, "heads", groups * size, 1, "output", (), lambda kept: None, groups=groups, least=least)


@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_a_completed_set_is_the_smallest_that_surgery_takes(data, groups, size):
    axis = axis_of(groups, size, 0)
    units = data.draw(st.lists(st.integers(0, groups * size - 1), unique=True))
    found = completed(axis, units)
    counts = [sum(unit // size == group for unit in found) for group in range(groups)]
    given_counts = [sum(unit // size == group for unit in units) for group in range(groups)]
    assert set(units) <= set(found) and found == sorted(set(found))
    assert counts == [max(given_counts) if count else 0 for count in given_counts]


def test_an_axis_keeps_its_least():
    assert completed(axis_of(1, 5, 2), []) == [0, 1]
    assert completed(axis_of(1, 5, 2), [4]) == [0, 4]
    assert completed(axis_of(1, 5, 2), [3, 4]) == [3, 4]
