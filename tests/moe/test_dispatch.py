"""Grouping, blocks and capacity: nothing lost, nothing twice, drops where and only where room is out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.depth import MixtureOfDepths, passing_tokens
from moe.dispatch import expert_capacity, group_by_expert, limit_capacity, plan_blocks
from moe.routers.top_k import choose_top_k
from tests.typecheck import unchecked

sizes = st.lists(st.integers(0, 200), min_size=1, max_size=12)


@given(st.lists(st.integers(0, 4), max_size=30))
def test_groups_hold_every_assignment_once_and_in_token_order(experts):
    expert = torch.tensor(experts, dtype=torch.int64)
    token = torch.arange(len(experts)) // 2
    groups = group_by_expert(token, expert, 5)
    assert sorted(groups.order.tolist()) == list(range(len(experts)))
    assert expert[groups.order].tolist() == sorted(experts)
    assert groups.counts.tolist() == [experts.count(e) for e in range(5)]
    for rows in groups.token.split(groups.counts.tolist()):
        assert rows.tolist() == sorted(rows.tolist())


@given(sizes, st.integers(1, 4), st.sampled_from([1, 8, 32]), st.sampled_from([32, 64, 1024]), st.sampled_from([8, 10]))
def test_blocks_cover_each_expert_once_with_bounded_padding(sizes, width, multiple, chunk, spare):
    blocks = plan_blocks(sizes, width=width, multiple=multiple, chunk=chunk, spare=spare)
    room = [0] * len(sizes)
    row = 0
    for block in blocks:
        assert block.start == row and block.rows <= chunk and 1 <= block.experts <= width
        row += block.experts * block.rows
        for e in range(block.first, block.first + block.experts):
            room[e] += block.rows
        if block.experts > 1:
            most = (1 + 1 / spare) * sum(sizes[block.first : block.first + block.experts])
            assert block.experts * block.rows <= most + 1e-9
    for size, given_rows in zip(sizes, room, strict=True):
        assert given_rows >= size and given_rows % multiple == 0
    if width == 1:
        assert room == [-(-size // multiple) * multiple for size in sizes]


@given(st.integers(0, 40), st.integers(1, 4), st.sampled_from([0.1, 0.5, 1.0, 1.1, 2.0]))
def test_capacity_keeps_the_first_and_counts_the_rest(num_tokens, k, factor):
    logits = torch.randn(num_tokens, 4, generator=torch.Generator().manual_seed(num_tokens)).round()
    routing = choose_top_k(logits, k, renormalize=True)
    limited = limit_capacity(routing, factor)
    room = expert_capacity(num_tokens * k, 4, factor)
    pairs = list(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    kept, lost = [], []
    for pair in pairs:
        (kept if sum(e == pair[1] for _, e in kept) < room else lost).append(pair)
    assert list(zip(limited.token.tolist(), limited.expert.tolist(), strict=True)) == kept
    assert [tuple(pair) for pair in limited.dropped.tolist()] == lost
    assert torch.equal(limited.choices(), routing.loads())
    assert limited.drop_fraction() == len(lost) / max(len(pairs), 1)
    again = limit_capacity(limited, factor)
    assert torch.equal(again.token, limited.token) and torch.equal(again.dropped, limited.dropped)


def test_capacity_formula_by_hand():
    assert expert_capacity(2 * 10, 8, 1.0) == 3
    assert expert_capacity(100, 10, 1.1) == 11, "1.1 · 10 is 11.000000000000002 in floating point"
    assert expert_capacity(0, 4, 2.0) == 0
    assert expert_capacity(8, 4, 1e-10) == 1, "a positive factor leaves every expert a place"
    assert passing_tokens(8, capacity=1e-10) == 1 and passing_tokens(0, capacity=1e-10) == 0
    _, depths = MixtureOfDepths(8, capacity=1e-10)(torch.randn(2, 5, 8), lambda part, _: part)
    assert depths.selected.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf, "a", None, True])
def test_capacity_refuses_what_is_no_positive_number(factor):
    with pytest.raises(ValueError, match="capacity_factor must be a finite number > 0"), unchecked():
        expert_capacity(4, 2, factor)
