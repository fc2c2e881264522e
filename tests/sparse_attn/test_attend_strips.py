from functools import partial

import pytest
import torch

from sparse_attn import attend, causal, parse_pattern, sliding_window
from sparse_attn.backends.plan import make_plan
from tests.sparse_attn.test_attend import grads, tensors
from tests.tolerances import close


@pytest.mark.parametrize(
    "text", ["causal() & sliding_window(140)", "sliding_window(75)", "causal() & sliding_window(136)"]
)
@pytest.mark.parametrize(("heads", "padded"), [((2, 2), False), ((4, 2), True)])
def test_wide_windows_read_several_query_blocks_as_one(text, heads, padded):
    layout = parse_pattern(text).layout(333, block=8)
    assert any(strip.height > 8 for strip in make_plan(layout).strips)
    inputs = tensors(1, *heads, 333, 333, 3)
    key_mask = torch.rand(1, 333) > 0.2 if padded else None
    weight = torch.randn_like(inputs[0])
    results = []
    for seen in ({"layout": layout}, {"pattern": parse_pattern(text), "backend": "reference"}):
        out = attend(*inputs, key_mask=key_mask, **seen)
        results.append((out, *grads(out, None, inputs, weight, None)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(
    "text",
    [
        "causal() & sliding_window(70)",
        "sliding_window(200)",
        "causal() & (sliding_window(70) | sinks(40))",
        "causal() & bigbird(96, 16, 2, 16, length=512)",
    ],
)
def test_backward_by_products_written_out(text, heads, monkeypatch):
    """As on processors with AMX; forward and what has many queries a product stay with torch's kernel."""
    import sparse_attn.backends.folded as folded

    monkeypatch.setattr("sparse_attn.backends.work._has_tiles", lambda: True)
    layout = parse_pattern(text).layout(512, block=16)
    done = {"_backward": set(), "flash_backward": set()}

    def watched(name, inner, *args):
        if args[-1].width >= 32:  # narrower ones are written out everywhere
            done[name].add(args[-1].height * (heads[0] // heads[1]))
        inner(*args)

    for name in done:
        monkeypatch.setattr(folded, name, partial(watched, name, getattr(folded, name)))
    inputs = tensors(2, *heads, 512, 512, 64)
    weight = torch.randn_like(inputs[0])
    results = []
    for seen in ({"layout": layout}, {"pattern": parse_pattern(text), "backend": "reference"}):
        out = attend(*inputs, **seen)
        results.append((out, *grads(out, None, inputs, weight, None)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    assert done["_backward"] and max(done["_backward"]) < 192
    assert all(height >= 192 for height in done["flash_backward"])


def test_products_written_out_are_for_processors_and_heads_where_they_are_faster(monkeypatch):
    from sparse_attn.backends.work import written_faster

    monkeypatch.setattr("sparse_attn.backends.work._has_tiles", lambda: True)
    assert written_faster(64) and not written_faster(48)
    monkeypatch.setattr("sparse_attn.backends.work._has_tiles", lambda: False)
    assert not written_faster(64)


@pytest.mark.parametrize(("rows", "expected"), [(60, [30, 30]), (51, [51]), (150, [50, 50, 50]), (12, [12])])
def test_a_strip_is_cut_into_pieces_of_about_equal_size(rows, expected):
    from sparse_attn.backends.pieces import pieces

    layout = (causal() & sliding_window(256)).layout(64 * (rows + 4), block=64)
    found = [piece.rows for piece in pieces(make_plan(layout), 0, slice(0, 1), 1, 1 << 20) if piece.height == 64]
    assert found == expected


def test_neighbouring_blocks_are_read_without_a_copy():
    """The first query blocks of a window, which see fewer keys than the others."""
    plan = make_plan((causal() & sliding_window(256)).layout(4096, block=64))
    assert not plan.gathers
    assert sorted((strip.first, strip.height, strip.width) for strip in plan.strips) == [
        (0, 128, 128),
        (128, 128, 256),
        (256, 64, 320),
    ]


@pytest.mark.parametrize("text", ["causal() & sliding_window(40)", "causal() & bigbird(48, 16, 2, 16, length=300)"])
def test_merged_heads_give_what_separate_ones_do(text):
    rows = [torch.randn(2, 300, 4, 16, dtype=torch.float64) for _ in range(4)]
    results = []
    for lay in (torch.Tensor.contiguous, lambda x: x):
        q, k, v, weight = (lay(x.transpose(1, 2)).detach().requires_grad_() for x in rows)
        out = attend(q, k, v, pattern=parse_pattern(text), backend="folded")
        assert out.stride() == q.stride()
        results.append((out, *torch.autograd.grad(out, (q, k, v), weight.detach())))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
