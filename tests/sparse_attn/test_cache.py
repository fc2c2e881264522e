import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import KVCache, attend, parse_pattern
from tests.tolerances import close

PATTERNS = (
    "causal()",
    "causal() & sliding_window(5)",
    "causal() & (sliding_window(5) | sinks(2))",
    "causal() & sliding_window(3) | causal() & sinks(4)",
)


def decode(pattern, q, k, v, chunks, key_mask=None, slack=4):
    """Output of each chunk in turn through a cache, and the most keys held between chunks of one."""
    cache, outs, start, most = KVCache(pattern, slack=slack), [], 0, 0
    for size in chunks:
        here = slice(start, start + size)
        mask = None if key_mask is None else key_mask[:, here]
        keys, values, positions = cache.append(k[:, :, here], v[:, :, here], key_mask=mask)
        where = torch.arange(start, start + size)
        outs.append(
            attend(
                q[:, :, here],
                keys,
                values,
                pattern=pattern,
                query_positions=where,
                key_positions=positions,
                key_mask=cache.key_mask,
            )
        )
        start += size
        most = max(most, cache.held if size == 1 else 0)
    assert cache.length == start
    return torch.cat(outs, 2), most


@pytest.mark.parametrize("text", PATTERNS)
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=6), tail=st.integers(0, 12), padded=st.booleans())
def test_chunks_and_steps_equal_the_full_forward(text, chunks, tail, padded):
    pattern, sizes = parse_pattern(text), [*chunks, *[1] * tail]
    q, k, v = torch.randn(2, 4, sum(sizes), 6), torch.randn(2, 2, sum(sizes), 6), torch.randn(2, 2, sum(sizes), 6)
    key_mask = torch.arange(sum(sizes)) >= torch.tensor([[0], [3]]) if padded else None
    expected = attend(q, k, v, pattern=pattern, key_mask=key_mask, backend="reference")
    close(decode(pattern, q, k, v, sizes, key_mask)[0], expected)


def test_window_and_sinks_stay_bounded_over_many_positions():
    pattern, length = parse_pattern("causal() & (sliding_window(16) | sinks(2))"), 3000
    cache = KVCache(pattern, slack=8)
    one = torch.zeros(1, 1, 1, 2)
    for position in range(length):
        _, _, positions = cache.append(one, one)
        held = set(positions.tolist())
        assert {0, 1, *range(max(0, position - 15), position + 1)} & set(range(position + 1)) <= held
        assert cache.held <= 16 + 2 + 8
    assert cache.length == length


def test_a_long_prefill_is_forgotten_at_the_next_step():
    cache = KVCache(parse_pattern("causal() & sliding_window(8)"), slack=0)
    cache.append(torch.zeros(1, 1, 500, 2), torch.zeros(1, 1, 500, 2))
    keys, _, positions = cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert positions.tolist() == list(range(493, 501)) and keys.shape[2] == 8
    assert keys.untyped_storage().nbytes() < 500 * 2 * 4


def test_a_key_mask_may_begin_later():
    pattern = parse_pattern("causal()")
    cache = KVCache(pattern)
    x = torch.randn(2, 1, 3, 4)
    cache.append(x, x)
    assert cache.key_mask is None
    cache.append(x, x, key_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert cache.key_mask.tolist() == [[True] * 3 + [False] * 3] * 2


@pytest.mark.parametrize(
    ("k", "v", "mask", "message"),
    [
        (torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 2, 4), None, "equal B, Hkv, n"),
        (torch.zeros(2, 1, 1, 5), torch.zeros(2, 1, 1, 4), None, "k must match the cache"),
        (torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4).double(), None, "v must match the cache"),
        (torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4), torch.ones(2, 2, dtype=torch.bool), "key_mask must be"),
    ],
)
def test_wrong_shapes_are_refused(k, v, mask, message):
    cache = KVCache(parse_pattern("causal()"))
    cache.append(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(KVCache.append)(cache, k, v, key_mask=mask)
    with pytest.raises(ValueError, match="slack must be >= 0, got -1"):
        KVCache(parse_pattern("causal()"), slack=-1)
