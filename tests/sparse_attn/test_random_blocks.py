import tracemalloc
from functools import reduce
from operator import or_
from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import (
    attend,
    bigbird,
    causal,
    global_tokens,
    layout,
    parse_pattern,
    random_blocks,
    sinks,
    sliding_window,
)
from sparse_attn.patterns import blocks
from tests.tolerances import close
from tests.typecheck import unchecked


def blocks_seen(pattern, rows: int, size: int, length: int) -> list[list[int]]:
    """By the definition, one pair of blocks at a time."""
    return [
        [c for c in range(length) if pattern.visible(torch.tensor(r * size), torch.tensor(c * size))]
        for r in range(rows)
    ]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_each_row_sees_exactly_count_earlier_blocks_or_all_there_are(count, size, seed):
    seen = blocks_seen(random_blocks(count, size, seed), 8, size, 8)
    assert [len(s) for s in seen] == [min(count, r + 1) for r in range(8)]
    assert all(max(s) <= r for r, s in enumerate(seen))


@given(st.integers(1, 6), st.integers(0, 99))
def test_with_a_length_the_draw_is_from_all_of_its_blocks(count, seed):
    seen = blocks_seen(random_blocks(count, 4, seed, 18), 5, 4, 9)
    assert [len(s) for s in seen] == [min(count, 5)] * 5
    assert all(max(s) < 5 for s in seen)


def by_drawing(count: int, seed: int, row: int, blocks: int) -> list[int]:
    """Draw by draw, from a list of what is left."""
    left, found = list(range(blocks)), []
    for draw in range(min(count, blocks)):
        x = (row * 0x1000003 + draw) ^ (seed * 0x5851F42D4C957F2D + 0x14057B7EF767814F) % 2**62
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            x = (x ^ (x >> shift)) * factor % 2**64
        found.append(left.pop(x % 2**63 % len(left)))
    return sorted(found)


@given(st.integers(1, 70), st.integers(0, 2**40), st.sampled_from([None, 1, 5, 64, 65, 200]), st.integers(1, 90))
def test_the_draw_is_one_block_after_the_other(count, seed, length, drawn):
    rows, before = np.arange(-2, 90), blocks.DRAWN
    blocks.DRAWN = drawn
    try:
        chosen = random_blocks(count, 1, seed, length).chosen(rows)
    finally:
        blocks.DRAWN = before
    for row, found in zip(rows.tolist(), chosen.tolist(), strict=True):
        wanted = by_drawing(count, seed, row, 0 if row < 0 else length or row + 1)
        assert sorted(c for c in found if c >= 0) == wanted


def test_saved_models_keep_their_blocks():
    pattern = random_blocks(3, 64, 5)
    assert np.sort(pattern.chosen(np.array([2, 9, 400])), 1).tolist() == [[0, 1, 2], [0, 3, 5], [260, 358, 373]]


@pytest.mark.parametrize("length", [None, 40])
def test_more_than_there_is_to_draw_is_all_of_it_at_once(length):
    pattern = random_blocks(10**12, 1, 0, length)
    row, column = torch.arange(40)[:, None], torch.arange(40)
    truth = (column <= row) if length is None else torch.ones(40, 40, dtype=torch.bool)
    assert pattern.layout(40, block=8).to_mask().equal(truth)
    assert pattern.visible(row, column).equal(truth)
    assert pattern.visible_pairs(40) == int(truth.sum())


def test_work_is_that_of_the_draws_and_not_of_their_pairs():
    start = process_time()
    chosen = random_blocks(4000, 1).chosen(np.array([9000]))
    # 3 ms; a look at all earlier draws in each takes over 10 s
    assert process_time() - start < 2
    assert np.sort(chosen)[0].tolist() == by_drawing(4000, 0, 9000, 9001)


@given(st.sampled_from([33, 40, 64, 100]), st.integers(1, 3), st.sampled_from([1, 5, 16]), st.integers(-9, 9))
def test_of_many_choices_layouts_show_what_is_drawn(count, size, block, offset):
    pattern = random_blocks(count, size, 3)
    truth = torch.zeros(90, 80, dtype=torch.bool)
    for query in range(max(0, -offset), 90):
        row = (query + offset) // size
        for column in by_drawing(count, 3, row, row + 1):
            truth[query, column * size : (column + 1) * size] = True
    positions = torch.arange(90)[:, None] + offset
    assert pattern.visible(positions, torch.arange(80)).equal(truth)
    assert pattern.visible(positions, torch.arange(-8, 80))[:, 8:].equal(truth)
    assert pattern.layout(90, 80, block=block, offset=offset).to_mask().equal(truth)
    assert pattern.visible(positions, torch.arange(0)).shape == (90, 0)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 9), st.sampled_from([1, 3, 4, 8, 16]), st.integers(-9, 9))
def test_layout_holds_what_visible_says(count, size, seed, block, offset):
    pattern = random_blocks(count, size, seed)
    truth = pattern.visible(torch.arange(30)[:, None] + offset, torch.arange(40))
    assert pattern.layout(30, 40, block=block, offset=offset).to_mask().equal(truth)


@pytest.mark.parametrize("length", [100, 10_000])
def test_blocks_of_a_large_prime_are_counted_in_little_memory(length):
    size, pattern = 4099, random_blocks(1, 4099)
    sizes = [min(size, length - start) for start in range(0, length, size)]
    tracemalloc.start()
    found = pattern.visible_pairs(length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = blocks_seen(pattern, len(sizes), size, len(sizes))
    assert found == sum(height * sizes[c] for height, row in zip(sizes, rows, strict=True) for c in row)
    # a mask of one block is 16 MiB
    assert peak < 2**20


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([7, 17, 31, 64, 67]))
def test_large_blocks_are_counted_some_rows_at_a_time(q_len, keys, size):
    pattern = causal() & (random_blocks(1, size, 3) | sliding_window(3))
    before, layout.STRIP = layout.STRIP, 50
    try:
        found = pattern.visible_pairs(q_len, keys)
    finally:
        layout.STRIP = before
    assert found == int(pattern.visible(torch.arange(keys - q_len, keys)[:, None], torch.arange(keys)).sum())


def test_a_longer_sequence_does_not_move_the_blocks_of_a_shorter_one():
    short, long = (random_blocks(2, 4, 7).layout(n, block=4).to_mask() for n in (40, 200))
    assert long[:40, :40].equal(short)


def test_choices_are_uniform():
    hits = torch.zeros(5)
    for seed in range(2000):
        for choice in random_blocks(2, 1, seed, 5).chosen(np.array([3]))[0]:
            hits[choice] += 1
    assert hits.sum() == 4000
    # the variance of a count is 2000 · 0.4 · 0.6, so 5 standard deviations are 110
    assert (hits - 800).abs().max() < 110


def test_a_generator_draws_the_seed():
    first, again = (random_blocks(1, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = random_blocks(1, generator=torch.Generator().manual_seed(4))
    assert first == again != other


def test_bigbird_is_its_three_parts():
    parts = sliding_window(6) | global_tokens(0, 1) | random_blocks(2, 4, 5, 32)
    assert bigbird(6, 2, 2, 4, 5, 32) == parts
    assert parse_pattern(str(parts)) == parts
    assert bigbird(6, 0, 0) == sliding_window(6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random_blocks(0)", "count must be >= 1, got 0"),
        ("random_blocks(1, 0)", "block must be >= 1, got 0"),
        ("random_blocks(1, 4, -1)", "seed must be >= 0, got -1"),
        ("random_blocks(1, 4, 0, 0)", "length must be >= 1, got 0"),
        ("bigbird(4, -1, 1)", "num_global must be >= 0, got -1"),
        ("global_tokens(-1)", "positions must be >= 0, got -1"),
        ("global_tokens()", "positions must hold at least one"),
        ("documents(3, 0)", "lengths must be >= 1, got 0"),
        ("documents([])", "lengths must hold at least one"),
        ("block_sparse([[0], [-2]], 4)", "rows must be >= 0, got -2"),
        ("fixed(4, 5)", "summary must be in [1, stride=4], got 5"),
        ("last_columns(4, 5)", "columns must be in [1, width=4], got 5"),
        ("dilated(3, 0)", "dilation must be >= 1, got 0"),
        ("sliding_window([3])", "window must be an int, got [3]"),
        ("same_row(0)", "width must be >= 1, got 0"),
        ("~3", "calls, &, | and ~ only"),
        (f"sliding_window({2**63 - 1})", f"window must be <= {2**62}, got {2**63 - 1}"),
        (f"sinks({2**63})", f"count must be <= {2**62}, got {2**63}"),
        (f"dilated({2**40}, {2**40})", f"(window - 1) * dilation must be <= {2**62}, got {(2**40 - 1) * 2**40}"),
        (f"global_tokens(1, {2**63})", f"positions must be <= {2**62}, got {2**63}"),
        (f"documents({2**62}, 1)", f"the sum of lengths must be <= {2**62}, got {2**62 + 1}"),
        (f"block_sparse([[{2**62}]], 4)", f"(rows + 1) * block must be <= {2**62}, got {2**64 + 4}"),
        ("&".join(["causal()"] * 5000), "fewer parts, and be nested less deeply, for Python's parser; got 'causal()&"),
        ("~" * 20_000 + "causal()", "fewer parts, and be nested less deeply, for Python's parser; got '~~~"),
        ("sinks(" + "-" * 5000 + "1)", "fewer parts, and be nested less deeply, for Python's parser; got 'sinks(--"),
        ("(" * 20_000 + "causal()", "must be an expression such as"),
    ],
)
def test_bad_values_are_clear_errors(text, message):
    with unchecked(), pytest.raises(ValueError) as error:
        parse_pattern(text)
    assert message in str(error.value)
    # not all of a text that is longer than a screen
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        f"sliding_window({2**62})",
        f"sinks({2**62})",
        f"dilated(2, {2**62})",
        f"dilated({2**31}, {2**31})",
        f"global_tokens(3, {2**62})",
        f"documents(5, {2**61})",
        f"axial({2**62}) & ~same_row(7)",
        f"block_sparse([[0]], {2**62})",
        f"random_blocks(1, 7, {2**70})",
    ],
)
def test_the_largest_sizes_attend(text):
    pattern = causal() & parse_pattern(text)
    assert parse_pattern(str(pattern)) == pattern
    positions = torch.arange(200)
    truth = pattern.visible(positions[:, None], positions)
    assert pattern.layout(200).to_mask().equal(truth)
    assert pattern.visible_pairs(200) == int(truth.sum())
    q = torch.randn(1, 2, 200, 4)
    mine, reference = (attend(q, q, q, pattern=pattern, backend=name) for name in ("folded", "reference"))
    close(mine, reference)


def test_a_long_chain_is_read():
    pattern = reduce(or_, (sinks(n) for n in range(1, 1501)))
    assert parse_pattern(str(pattern)) == pattern


def test_text_only():
    with unchecked(), pytest.raises(TypeError, match="pattern must be text such as 'causal.*', got None"):
        parse_pattern(None)
