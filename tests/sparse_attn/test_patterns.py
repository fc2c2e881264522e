import re
from bisect import bisect_right

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import causal, full, parse_pattern, sinks, sliding_window
from tests.sparse_attn.expressions import cases

WINDOW_AND_SINKS = causal() & (sliding_window(256) | sinks(4))


@given(cases, st.integers(0, 30), st.integers(0, 30))
def test_visible_is_the_definition(case, query, key):
    pattern, truth = case
    assert bool(pattern.visible(torch.tensor(query), torch.tensor(key))) == truth(query, key)


@given(cases)
def test_text_round_trip_equality_and_hash(case):
    again = parse_pattern(str(case[0]))
    assert again == case[0]
    assert hash(again) == hash(case[0])
    assert str(again) == str(case[0])


def test_text_of_combinations():
    assert str(WINDOW_AND_SINKS) == "causal() & (sliding_window(256) | sinks(4))"
    assert parse_pattern("  causal()&( sliding_window(window=256)|sinks( 4 ))\n") == WINDOW_AND_SINKS
    assert str(causal() & sinks(1) | full()) == "causal() & sinks(1) | full()"
    assert (causal() & (sinks(1) & full())) == (causal() & sinks(1)) & full()


@given(cases, st.integers(0, 20))
def test_is_causal_means_that_no_query_sees_the_future(case, length):
    pattern, truth = case
    if pattern.is_causal:
        assert not any(truth(i, j) for i in range(length) for j in range(i + 1, length))


def test_is_causal_of_the_usual_patterns():
    assert causal().is_causal and WINDOW_AND_SINKS.is_causal
    assert not any(p.is_causal for p in (full(), sliding_window(3), sinks(1), causal() | sinks(1)))


@given(cases, st.integers(0, 40))
def test_retained_keeps_all_that_a_later_query_sees(case, next_query):
    pattern, truth = case
    kept = pattern.retained(torch.arange(next_query), next_query).tolist()
    for key in range(next_query):
        assert kept[key] or not any(truth(query, key) for query in range(next_query, next_query + 40))


def test_retained_is_tight_for_window_and_sinks():
    kept = (causal() & (sliding_window(5) | sinks(2))).retained(torch.arange(100), 100)
    assert kept.nonzero().squeeze(1).tolist() == [0, 1, 96, 97, 98, 99]


@given(cases, st.integers(0, 60), st.integers(0, 60))
def test_visible_pairs_are_counted_exactly(case, q_len, kv_len):
    pattern, truth = case
    expected = sum(truth(i + kv_len - q_len, j) for i in range(q_len) for j in range(kv_len))
    assert pattern.visible_pairs(q_len, kv_len) == expected


def test_visible_pairs_of_a_million_tokens():
    million = 10**6
    assert causal().visible_pairs(million) == million * (million + 1) // 2
    windows = 256 * million - 256 * 255 // 2
    assert (causal() & sliding_window(256)).visible_pairs(million) == windows
    assert WINDOW_AND_SINKS.visible_pairs(million) == windows + 4 * (million - 256) - 6  # the first rows see fewer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sliding_windw(4)", "unknown pattern 'sliding_windw', did you mean 'sliding_window'"),
        ("casual() & sinks(2)", "did you mean 'causal'"),
        ("causal", "must be called"),
        ("nothing", "unknown pattern 'nothing'"),
        ("", "must be an expression"),
        ("causal() &", "must be an expression"),
        ("causal() + sinks(1)", "calls, &, | and ~ only"),
        ("__import__('os')", "unknown pattern '__import__'"),
        ("sinks(1.5)", "arguments must be integers or lists of them, got '1.5'"),
        ("sinks(True)", "arguments must be integers or lists of them, got 'True'"),
        ("sliding_window()", "sliding_window takes (window), got ()"),
        ("sliding_window(1, 2)", "takes (window), got (1, 2)"),
        ("sliding_window(1, window=2)", "takes (window), got (1, window=2)"),
        ("causal(3)", "causal takes (), got (3)"),
        ("sliding_window(size=2)", "takes (window), got (size=2)"),
        ("sliding_window(0)", "window must be >= 1, got 0"),
        ("sinks(-3)", "count must be >= 1, got -3"),
        ("causal().layout", "calls, &, | and ~ only"),
    ],
)
def test_bad_text_is_a_clear_error(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_pattern(text)


def test_bad_arguments():
    with pytest.raises(ValueError, match="window must be >= 1, got 0"):
        sliding_window(0)
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        sinks(0)
    with pytest.raises(TypeError):
        causal() & 3


def test_a_complement_has_a_longest_length_unless_something_bounds_it():
    with pytest.raises(ValueError, match=re.escape("~sinks(4) looks at every block: query blocks x keys must be <=")):
        (~sinks(4)).layout(65_537)
    with pytest.raises(ValueError, match=re.escape("(67108864, or an eighth of 15625 x 1000000), got 7813000000")):
        (causal() & ~sliding_window(256)).layout(1_000_000)
    bounded = causal() & sliding_window(1024) & ~sliding_window(256)
    assert bounded.layout(1_000_000).visited_blocks < 15 * 15_625
    assert (causal() & ~sliding_window(256)).layout(1, 1_000_000).visited_blocks == 15_621


def test_a_complement_is_laid_out_up_to_its_limit_and_refused_beyond():
    assert (~sinks(4)).layout(65_536).visited_blocks == 1024**2
    # under | it is as if alone, whatever bounds the whole
    either = causal() & (~sinks(4) | sliding_window(9))
    assert either.layout(65_536).visited_blocks == 1024 * 1025 // 2
    with pytest.raises(ValueError, match=re.escape("~sinks(4) looks at every block: query blocks x keys")):
        either.layout(65_537)
    # of the keys up to each block's last query, summed over the blocks, 2^26 at most
    late = causal() & ~sliding_window(256)
    assert late.layout(92_608).visited_blocks == sum(max(row - 3, 0) for row in range(1447))
    with pytest.raises(ValueError, match=re.escape(f"<= {1 << 26} (67108864, or an eighth of 1448 x 92609), got")):
        late.layout(92_609)


def test_what_bounds_a_complement_leaves_an_eighth_of_all_keys_at_most():
    rows, length = 3125, 200_000

    def keys(window: int) -> int:
        return sum(64 * row + 64 - max(64 * row - window + 1, 0) for row in range(rows))

    widest = bisect_right(range(length), rows * length // 8, key=keys) - 1
    # 2^26 does not decide here
    assert rows * length // 8 > 1 << 26 and keys(widest) <= rows * length // 8 < keys(widest + 1)
    between = [causal() & sliding_window(window) & ~sliding_window(256) for window in (widest, widest + 1)]
    assert between[0].layout(length).visited_blocks > 1_000_000
    with pytest.raises(
        ValueError, match=re.escape(f"must be <= 78125000 (67108864, or an eighth of {rows} x {length})")
    ):
        between[1].layout(length)


@pytest.mark.parametrize(
    "text", ["full()", "causal()", "causal() & sliding_window(3)", "sinks(2)", "causal() | sinks(2)"]
)
def test_relative_patterns_are_those_that_a_shift_does_not_change(text):
    pattern = parse_pattern(text)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    unchanged = all(pattern.visible(i + s, j + s).equal(pattern.visible(i, j)) for s in range(1, 5))
    assert pattern.is_relative == unchanged
