"""Layouts are built some rows at a time, by lists and tables: each way gives exactly the blocks that show anything."""

import tracemalloc
from contextlib import contextmanager
from unittest.mock import Mock, patch

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import candidates, causal, documents, global_tokens, layout, parse_pattern, sliding_window
from sparse_attn.arrays import starts
from tests.sparse_attn.expressions import cases

# lengths around a block of 16 and primes
AWKWARD = st.sampled_from([1, 2, 13, 15, 16, 17, 31, 32, 33, 47, 53, 64, 67])
LISTS = (
    "causal() & (axial(41) | global_tokens([5, 38, 39, 60]))",
    "(strided(37) | fixed(29, 3)) & ~sliding_window(5)",
    "multiples(36) & multiples(24) | last_columns(40, 3)",
    "last_columns(31, 2) & multiples(27)",
    "multiples(33) & (sliding_window(40) | sinks(9))",
    "block_sparse([[0, 3], [], [1, 2, 5], [0]], 9) & multiples(20) | dilated(3, 19)",
    "documents([40, 1, 1, 1, 20]) & fixed(19, 1) | random_blocks(1, 7)",
    "~(last_columns(31, 2) | documents([33, 10])) & multiples(7)",
)


@contextmanager
def sizes(chunk: int, places: int):
    """Few blocks at a time, and few signatures in a table."""
    before = candidates.CHUNK, layout.PLACES
    candidates.CHUNK, layout.PLACES = chunk, places
    try:
        yield
    finally:
        candidates.CHUNK, layout.PLACES = before


def check(pattern, q_len, kv_len, block, offset, key_offset):
    found = pattern.layout(q_len, kv_len, block=block, offset=offset, key_offset=key_offset)
    truth = pattern.visible(torch.arange(q_len)[:, None] + offset, torch.arange(kv_len) + key_offset)
    place = found.query_block * (kv_len + 1) + found.key_block
    assert bool((place.diff() > 0).all())
    for row, column, kind in zip(
        found.query_block.tolist(), found.key_block.tolist(), found.mask_index.tolist(), strict=True
    ):
        part = truth[row * block : (row + 1) * block, column * block : (column + 1) * block]
        assert part.any() and bool(part.all()) == (kind < 0)
    assert len({mask.numpy().tobytes() for mask in found.masks}) == len(found.masks)
    assert found.to_mask().equal(truth)


@given(cases, AWKWARD, AWKWARD, st.sampled_from([1, 5, 16, 17]), st.integers(-70, 70), st.integers(0, 40),
       st.sampled_from([1, 3, 20]), st.sampled_from([0, 1 << 20]))  # fmt: skip
def test_any_expression_some_rows_at_a_time(case, q_len, kv_len, block, offset, key_offset, chunk, places):
    with sizes(chunk, places):
        check(case[0], q_len, kv_len, block, offset, key_offset)


@pytest.mark.parametrize("text", LISTS)
@given(
    AWKWARD, AWKWARD, st.sampled_from([3, 8, 16]), st.integers(-70, 70), st.integers(0, 40), st.sampled_from([4, 99])
)
def test_lists_and_runs_in_one_row_are_brought_in_order(text, q_len, kv_len, block, offset, key_offset, chunk):
    with sizes(chunk, 1 << 20):
        check(parse_pattern(text), q_len, kv_len, block, offset, key_offset)


def by_formula(seen, rows: int, columns: int) -> int:
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return int((seen(row, column) & (column <= row)).sum())


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("causal()", lambda r, c: c <= r),
        ("causal() & strided(128)", lambda r, c: ((r - c) % 2 == 0) | (r - c <= 2)),
        ("causal() & fixed(128, 32)", lambda r, c: (c % 2 == 1) | (r // 2 == c // 2)),
        ("causal() & axial(640)", lambda r, c: ((r - c) % 10 == 0) | (r // 10 == c // 10)),
        ("causal() & documents([6400, 44800])", lambda r, c: (r < 100) == (c < 100)),
        ("causal() & global_tokens([3, 6500])", lambda r, c: (c == 0) | (c == 101) | (r == 101)),
    ],
)
def test_the_blocks_of_a_long_sequence_are_those_of_a_formula_and_memory_is_theirs(text, seen):
    pattern, length = parse_pattern(text), 51_200
    tracemalloc.start()
    found = pattern.layout(length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.visited_blocks == by_formula(seen, 800, 800)
    assert found.visible_pairs() == pattern.visible_pairs(length)
    # two integers a visit, and what is worked on at a time
    assert peak < 16 * found.visited_blocks + (4 << 20)


@pytest.mark.parametrize("text", [*LISTS, "causal() & (sliding_window(8) | global_tokens([0]))", "fixed(16, 4)"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (0, 16), (5, 0)])
def test_no_queries_or_no_keys_have_a_layout_without_blocks(text, q_len, kv_len):
    found = parse_pattern(text).layout(q_len, kv_len)
    assert found.visited_blocks == 0 and found.row_start.numel() == found.num_query_blocks + 1


def test_many_short_documents_take_work_by_their_blocks():
    """The ends of 28,571 documents are worked out once, not for every few blocks."""
    pattern = causal() & documents([7] * 28_571)
    with patch("sparse_attn.patterns.documents.starts", Mock(wraps=starts)) as found_ends:
        found = pattern.layout(199_997)
    assert found_ends.call_count <= 2
    assert found.visited_blocks == 2 * 3125 - 1 - sum(64 * k % 7 == 0 for k in range(1, 3125))


@given(st.sets(st.integers(0, 90), min_size=1, max_size=30), AWKWARD, st.sampled_from([3, 8, 16]), st.integers(-20, 20))
def test_scattered_global_tokens(positions, length, block, offset):
    pattern = causal() & (global_tokens(positions) | sliding_window(3))
    check(pattern, length, length, block, offset, 0)
    query, key = torch.arange(length, dtype=torch.int32)[:, None], torch.arange(length, dtype=torch.int32)
    rows = torch.tensor(sorted(positions))
    held = (query[..., None] == rows).any(-1) | (key[..., None] == rows).any(-1) | ((query - key).abs() < 3)
    assert pattern.visible(query, key).equal(held & (key <= query))


def test_many_global_tokens_are_made_a_tensor_once_and_not_for_every_few_blocks():
    pattern = causal() & (sliding_window(256) | global_tokens(range(0, 60_000, 37)))
    with (
        patch("torch.tensor", Mock(wraps=torch.tensor)) as made,
        patch("numpy.array", Mock(wraps=numpy.array)) as listed,
    ):
        found = pattern.layout(2_000)
    assert found.visible_pairs() == int(pattern.visible(torch.arange(2_000)[:, None], torch.arange(2_000)).sum())
    assert made.call_count == 0
    assert sum(call.args[0] is pattern.parts[1].parts[1].positions for call in listed.call_args_list) <= 1
