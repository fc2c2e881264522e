"""Single queries and keys beside blocks: each pair is shown once, and attend gives what the reference gives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import alibi_slopes, attend, full, parse_pattern
from sparse_attn.backends.plan import make_plan
from sparse_attn.backends.thinning import divide
from tests.sparse_attn.expressions import cases
from tests.sparse_attn.test_attend import grads, tensors
from tests.tolerances import close

# Patterns, lengths, and the shapes [R, m] of the lists of queries that they must lead to at blocks of 16.
THIN = [
    ("causal() & bigbird(96, 16, 2, 16, length=512)", 512, 512),
    ("causal() & (sliding_window(40) | sinks(3))", 208, 208),
    ("causal() & (sliding_window(40) | sinks(3))", 201, 230),
    ("causal() & (sliding_window(40) | global_tokens([0, 50, 111, 170]))", 208, 208),
    ("sliding_window(20) | global_tokens([3, 77, 150])", 250, 250),
    ("causal() & strided(32)", 256, 256),
    ("causal() & strided(32)", 245, 270),
    ("causal() & strided(40)", 403, 403),
    ("strided(32)", 250, 250),
    ("causal() & fixed(32, 8)", 256, 256),
    ("causal() & fixed(32, 5)", 251, 251),
    ("causal() & bigbird(40, 16, 2, 16, length=256)", 256, 256),
]


def shown(layout, parts):
    """How often each pair is shown, by loops over the lists."""
    times = torch.zeros(layout.q_len, layout.kv_len, dtype=torch.long)
    for part in parts:
        for some in part.shown:
            for r, queries in enumerate(part.queries.index):
                mask = torch.ones(len(queries), some.keys.index.shape[1], dtype=torch.bool)
                mask = mask if some.seen is None else some.seen[r if len(some.seen) > 1 else 0]
                times[queries[:, None], some.keys.index[r]] += mask.long()
    return times


def adds_up(layout):
    found = divide(layout)
    times = found.regular.to_mask().long() + shown(layout, found.thin)
    times += 0 if found.lone is None else found.lone.to_mask().long()
    assert torch.equal(times, layout.to_mask().long())
    for part in found.thin:
        for places in (part.queries, *(some.keys for some in part.shown)):
            assert places.index.unique().numel() == places.index.numel()
            if places.grid is not None:
                rows = torch.arange(int(places.index.max()) + 1).view(1, -1, 1)
                assert torch.equal(places.read(rows)[0, ..., 0], places.index)
    return found


@pytest.mark.parametrize(("text", "q_len", "kv_len"), THIN)
def test_each_pair_is_shown_once(text, q_len, kv_len):
    layout = parse_pattern(text).layout(q_len, kv_len, block=16, offset=kv_len - q_len)
    assert adds_up(layout).thin


@given(case=cases, q_len=st.integers(1, 90), kv_len=st.integers(1, 90), block=st.sampled_from([4, 8, 16]))
def test_each_pair_of_any_pattern_is_shown_once(case, q_len, kv_len, block):
    adds_up(case[0].layout(q_len, kv_len, block=block, offset=kv_len - q_len))


def listed(rows, columns, block, masks, kind):
    """A layout of [rows, columns] blocks; kind: -2 hidden, -1 full, else a mask."""
    base = full().layout(rows * block, columns * block, block=block)
    keep = (kind > -2).flatten()
    start = torch.zeros(rows + 1, dtype=torch.long)
    start[1:] = (kind > -2).sum(1).cumsum(0)
    return replace(base, row_start=start, key_block=base.key_block[keep], mask_index=kind.flatten()[keep], masks=masks)


@given(seed=st.integers(0, 2**32), density=st.sampled_from([0.02, 0.2, 0.7]), rows=st.integers(1, 14))
def test_each_pair_of_any_layout_is_shown_once(seed, density, rows):
    draws = torch.Generator().manual_seed(seed)
    masks = torch.rand(5, 8, 8, generator=draws) < torch.tensor([density, density, 1, 1, 1])[:, None, None]
    masks[2], masks[3], masks[4] = False, False, False
    masks[2, :, 3], masks[3, 5], masks[4] = True, True, torch.eye(8, dtype=torch.bool)
    kind = torch.randint(-2, 5, (rows, 9), generator=draws)
    adds_up(listed(rows, 9, 8, masks, kind))
    # A band in which some rows show more than the others.
    kind = torch.where(torch.arange(rows)[:, None] == torch.arange(9), 2, kind.clamp(max=-1) * 0 - 2)
    masks[3] |= masks[2]
    kind[rows // 2, rows // 2 : rows // 2 + 1] = 3
    adds_up(listed(rows, 9, 8, masks, kind))


@pytest.mark.parametrize(("text", "q_len", "kv_len"), THIN)
@pytest.mark.parametrize("case", ["fused", "grouped", "padded", "capped", "half"])
def test_attend_equals_the_reference(text, q_len, kv_len, case):
    dtype = torch.bfloat16 if case == "half" else torch.float64
    q, k, v = inputs = tensors(2, 4, 2, q_len, kv_len, 8, value_dim=5 if case == "padded" else 8, dtype=dtype)
    layout = parse_pattern(text).layout(q_len, kv_len, block=16, offset=kv_len - q_len)
    assert make_plan(layout).thin
    options = {}
    if case == "padded":
        options = {"key_mask": torch.arange(kv_len) >= torch.tensor([[0], [60]])}
    if case == "capped":
        options = {"softcap": 2.0, "alibi": alibi_slopes(4)}
    if case == "half":
        out = attend(q, k, v, layout=layout)
        assert out.dtype == dtype
        wide = attend(*(x.double() for x in inputs), layout=layout, backend="reference")
        close(out, wide)
        for actual, wanted in zip(grads(out, None, inputs, 1, 0), grads(wide, None, inputs, 1, 0), strict=True):
            assert actual.dtype == dtype
            close(actual, wanted)
        return
    weight = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype)
    lse_weight = torch.randn(q.shape[:3], dtype=dtype) * (case != "fused")
    results = []
    for backend in ("auto", "reference"):
        out, lse = attend(q, k, v, layout=layout, backend=backend, return_lse=True, **options)
        # Without a gradient of the log-sum-exp torch's kernel takes the backward.
        taken = None if case == "fused" else lse
        results.append((out, lse, *grads(out, taken, inputs, weight, lse_weight)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_dropout_gradient_is_that_of_the_sampled_function():
    inputs = tensors(1, 2, 1, 96, 96, 3)
    layout = parse_pattern("causal() & (sliding_window(20) | sinks(2))").layout(96, block=16)
    assert make_plan(layout).thin

    def sampled(*inputs):
        torch.manual_seed(3)
        return attend(*inputs, layout=layout, dropout=0.4)[:, :, ::31]

    assert torch.autograd.gradcheck(sampled, inputs, fast_mode=True)


def test_a_window_stays_blocks():
    layout = parse_pattern("causal() & sliding_window(70)").layout(400)
    found = adds_up(layout)
    assert found.lone is None and not found.thin and found.regular.visited_blocks == layout.visited_blocks


def test_strides_are_lists_of_remainders():
    layout = parse_pattern("causal() & strided(128)").layout(2048)
    found = adds_up(layout)
    assert found.regular.visited_blocks < 3 * layout.num_query_blocks
    assert [tuple(part.queries.index.shape) for part in found.thin] == [(128, 16)]
    assert len(found.thin[0].shown[0].seen) == 1


def test_random_blocks_lie_beside_the_band():
    found = adds_up(parse_pattern("causal() & bigbird(96, 16, 2, 16, length=512)").layout(512, block=16))
    assert found.lone is not None and 0 < found.lone.visited_blocks < found.regular.visited_blocks / 3
