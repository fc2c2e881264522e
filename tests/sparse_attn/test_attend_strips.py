from functools import partial

import pytest
import torch

from sparse_attn import attend, block_sparse, causal, parse_pattern, sinks, sliding_window
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


def test_strips_of_other_heights_have_masks_of_their_own():
    few, many = [0, 2, 3], [0, 1, 2, 3]
    rows = [few, many, [], [], [], [], [], [], [], [], [], [], few, many, []]
    inputs = tensors(1, 1, 1, 240, 240, 8)
    results = []
    for backend in ("folded", "reference"):
        out = attend(*inputs, pattern=block_sparse(rows, 16), backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    pattern = parse_pattern(
        "(sliding_window(160) | multiples(160)) & (sliding_window(80) | multiples(80))"
        " & (same_row(112) | last_columns(112, 48))"
    )
    inputs = tensors(1, 1, 1, 492, 759, 4)
    close(attend(*inputs, pattern=pattern, backend="folded"), attend(*inputs, pattern=pattern, backend="reference"))


def test_few_queries_over_many_keys_stay_in_tiles():
    """A chunk of a prefill: one row of a strip would be computed at once."""
    plan = make_plan(causal().layout(512, 16384, block=64, offset=15872))
    assert [gather.masks.shape for gather in plan.gathers] == [(1, 5, 253)]


def test_dropout_is_drawn_for_the_same_pieces_in_both_passes_where_products_are_written_out(monkeypatch):
    monkeypatch.setattr("sparse_attn.backends.work._has_tiles", lambda: True)
    monkeypatch.setattr("sparse_attn.backends.work.PIECE", 1 << 14)
    q, k, v = (torch.randn(1, 2, 1024, 64, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, pattern=causal() & sliding_window(64), dropout=0.3)
    (grad,) = torch.autograd.grad(out.sum(), v)
    close((grad * v).sum(), out.sum())  # linear in the values


@pytest.mark.parametrize("text", ["full()", "causal() & sliding_window(64)", "sliding_window(30) | sinks(100)"])
def test_alibi_of_pieces_that_begin_inside_a_strip(text, monkeypatch):
    monkeypatch.setattr("sparse_attn.backends.work.PIECE", 1 << 14)
    inputs, pattern = tensors(1, 2, 2, 1024, 1024, 4), parse_pattern(text)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    folded, reference = (
        attend(*inputs, pattern=pattern, backend=backend, alibi=slopes) for backend in ("folded", "reference")
    )
    close(folded, reference)


def test_causal_keys_that_begin_before_the_queries_are_not_the_plain_triangle():
    inputs = tensors(1, 2, 2, 300, 300, 8)
    at = torch.arange(10, 310)
    auto, reference = (
        attend(*inputs, pattern=causal(), query_positions=at, backend=backend) for backend in ("auto", "reference")
    )
    close(auto, reference)


@pytest.mark.parametrize("text", ["causal() & bigbird(64, 16, 2, 16, length=512)", "causal() & fixed(32, 8)"])
def test_heads_in_pieces_of_their_own_drop_apart(text, monkeypatch):
    monkeypatch.setattr("sparse_attn.backends.work.PIECE", 1)
    monkeypatch.setattr("sparse_attn.backends.pieces.PIECE", 1)
    layout = parse_pattern(text).layout(512, block=16)
    zero = torch.zeros(1, 4, 512, 4)
    shown = attend(zero, zero, torch.eye(512).expand(1, 4, -1, -1), layout=layout, dropout=0.5)[0] > 0
    # by query block: each piece has one head of one block or list, and two heads draw the same for none of them
    for one, other in ((0, 1), (1, 3)):
        same = (shown[one] == shown[other]).view(32, -1).all(1)
        assert not same[2:].any()
    assert make_plan(layout).late or make_plan(layout).gathers


def test_heads_in_thin_pieces_of_their_own_drop_apart(monkeypatch):
    monkeypatch.setattr("sparse_attn.backends.work.PIECE", 1)
    layout = (causal() & (sliding_window(32) | sinks(3))).layout(512, block=16)
    assert make_plan(layout).thin
    zero = torch.zeros(1, 2, 512, 4)
    shown = attend(zero, zero, torch.eye(512).expand(1, 2, -1, -1), layout=layout, dropout=0.5)[0] > 0
    assert not shown[0, 64:, :3].equal(shown[1, 64:, :3])
