"""The streaming mode against StreamingLLM's own loop: a list of pairs, turned by their index in it."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import StreamingKVCache, attend, attend_streaming, causal, parse_pattern, window_and_sinks
from tests.tolerances import close


def turned(x, place):
    """RoPE as complex numbers, the pairs (i, i + d/2): one vector at one place."""
    half = len(x) // 2
    angles = place * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


def rotate(x, places):
    """The same for [B, H, n, d] at [n] or [B, n]."""
    half = x.shape[-1] // 2
    angles = places[..., None] * 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos().unsqueeze(-3), angles.sin().unsqueeze(-3)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def by_loops(q, k, v, window, sinks):
    """One batch row: [H, L, d_v]."""
    heads, length, width = q.shape
    rows = []
    for h in range(heads):
        held, kv = [], h // (heads // len(k))
        for i in range(length):
            held.append((k[kv, i], v[kv, i]))
            if len(held) > window + sinks:
                del held[sinks]
            query = turned(q[h, i], len(held) - 1)
            scores = torch.stack([query @ turned(key, place) for place, (key, _) in enumerate(held)])
            rows.append((scores / width**0.5).softmax(0) @ torch.stack([value for _, value in held]))
    return torch.stack(rows).unflatten(0, (heads, length))


def pattern_of(window, sinks):
    return parse_pattern(f"causal() & (sliding_window({window}) | sinks({sinks}))" if sinks else
                         f"causal() & sliding_window({window})")  # fmt: skip


def text_of(length, heads=2):
    shapes = (heads, 4), (1, 4), (1, 3)
    return [torch.randn(2, count, length, width, dtype=torch.float64) for count, width in shapes]


@given(
    window=st.integers(1, 9),
    sinks=st.integers(0, 4),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    tail=st.integers(0, 6),
    slack=st.integers(0, 5),
)
def test_any_chunks_equal_the_loop(window, sinks, chunks, tail, slack):
    sizes = [*chunks, *[1] * tail]
    q, k, v = text_of(sum(sizes))
    cache = StreamingKVCache(pattern_of(window, sinks), rotate, slack=slack)
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    out = torch.cat([cache.attend(*part) for part in parts], 2)
    close(out[1], by_loops(q[1], k[1], v[1], window, sinks))
    if tail > max(slack, 1):
        assert cache.held <= window + sinks + slack


def test_gradients_equal_those_of_the_loop():
    found, wanted = ([x.clone().requires_grad_() for x in ones] for ones in itertools.tee(iter(text_of(17)), 2))
    weight = torch.randn(2, 2, 17, 3, dtype=torch.float64)
    where, pattern = torch.arange(17), pattern_of(5, 2)
    out = attend_streaming(*found, pattern=pattern, rotate=rotate, query_positions=where, key_positions=where)
    expected = torch.stack([by_loops(*row, 5, 2) for row in zip(*wanted, strict=True)])
    close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), found), torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):  # fmt: skip
        close(ours, theirs)


def test_until_the_cache_is_full_it_is_the_exact_mode():
    q, k, v = text_of(12)
    cache, where, pattern = StreamingKVCache(pattern_of(9, 3), rotate), torch.arange(12), pattern_of(9, 3)
    exact = attend(rotate(q, where), rotate(k, where), v, pattern=pattern)
    close(cache.attend(q, k, v), exact)
    more = text_of(3)
    after = [torch.cat(pair, 2) for pair in zip((q, k, v), more, strict=True)]
    where = torch.arange(15)
    exact = attend(rotate(after[0], where), rotate(after[1], where), after[2], pattern=pattern)[:, :, 12:]
    assert (cache.attend(*more) - exact).abs().max() > 1e-3


def test_unequal_rows_stream_as_each_would_alone():
    q, k, v = text_of(20)
    padding = (0, 6)
    cache = StreamingKVCache(pattern_of(4, 2), rotate, slack=2, unequal=True)
    real = torch.arange(20) >= torch.tensor(padding)[:, None]
    positions = (real.cumsum(1) - 1).clamp_min(0)
    out = []
    for here in torch.arange(20).split([9, 1, 4, 1, 1, 1, 1, 1, 1]):
        out.append(cache.attend(q[:, :, here], k[:, :, here], v[:, :, here], key_mask=real[:, here],
                                positions=positions[:, here]))  # fmt: skip
    for row, skipped in enumerate(padding):
        alone = (x[row, :, skipped:] for x in (q, k, v))
        close(torch.cat(out, 2)[row, :, skipped:], by_loops(*alone, 4, 2))
    assert cache.held <= 4 + 2 + 2


def test_places_stay_small_however_long_the_text():
    largest = []

    def noted(x, places):
        largest.append(int(places.abs().max()))
        return rotate(x, places)

    cache, one = StreamingKVCache(pattern_of(6, 2), noted, slack=3), torch.ones(1, 1, 1, 2, dtype=torch.float64)
    step = inspect.unwrap(StreamingKVCache.attend)
    for _ in range(2000):
        step(cache, one, one, one)
        assert cache.held <= 6 + 2 + 3
    assert max(largest) == 6 + 2 - 1


@pytest.mark.parametrize(
    "text", ["causal() & (sinks(2) | sliding_window(7))", "(sinks(2) | sliding_window(7)) & causal()"]
)
def test_the_order_of_the_parts_does_not_matter(text):
    assert window_and_sinks(parse_pattern(text)) == (7, 2)


@pytest.mark.parametrize(
    "text",
    ["causal()", "sliding_window(4)", "causal() & sinks(3)", "causal() & sliding_window(3) | sinks(2)",
     "causal() & (sliding_window(4) | sinks(2) | multiples(8))", "causal() & sliding_window(4) & sinks(2)"],
)  # fmt: skip
def test_other_patterns_are_refused(text):
    with pytest.raises(ValueError, match=r"streaming needs the pattern causal\(\) & \(sliding_window"):
        StreamingKVCache(parse_pattern(text), rotate)


def test_positions_go_with_unequal_rows_alone():
    one = torch.zeros(1, 1, 1, 2)
    where = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="positions must be None unless"):
        StreamingKVCache(pattern_of(4, 1), rotate).attend(one, one, one, positions=where)
    with pytest.raises(ValueError, match="positions must be given"):
        StreamingKVCache(pattern_of(4, 1), rotate, unequal=True).attend(one, one, one)
    with pytest.raises(ValueError, match="slack must be >= 0, got -1"):
        StreamingKVCache(causal() & parse_pattern("sliding_window(3)"), rotate, slack=-1)


@pytest.mark.parametrize("where", [0, 10**9, -7])
def test_positions_of_padding_do_not_matter(where):
    q, k, v = text_of(9)
    rows = torch.arange(9).expand(2, -1) - torch.tensor([[3], [0]])
    real = rows >= 0
    cache = StreamingKVCache(pattern_of(3, 2), rotate, unequal=True)
    found = cache.attend(q, k, v, positions=rows.where(real, where), key_mask=real)
    for row, start in enumerate((3, 0)):
        alone = [x[row : row + 1, :, start:] for x in (q, k, v)]
        close(found[row : row + 1, :, start:], StreamingKVCache(pattern_of(3, 2), rotate).attend(*alone))


@pytest.mark.parametrize("unequal", [False, True])
def test_a_chunk_of_nothing_changes_nothing(unequal):
    tensors = text_of(9)

    def last(*pieces):
        cache = StreamingKVCache(pattern_of(3, 2), rotate, unequal=unequal)
        for piece in pieces:
            where = torch.arange(9)[piece].expand(2, -1) if unequal else None
            found = cache.attend(*(x[:, :, piece] for x in tensors), positions=where)
            assert found.shape[2] == piece.stop - piece.start
        return found

    start, end = slice(0, 7), slice(7, 9)
    close(last(start, slice(7, 7), end), last(start, end))
