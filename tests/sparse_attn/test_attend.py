import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import attend, causal, documents, explain_backend, full, parse_pattern, sinks, sliding_window
from sparse_attn.backends.plan import make_plan
from tests.sparse_attn.expressions import cases
from tests.tolerances import close

# Without the shape checks that the tests add, so that attend's own errors are seen.
unchecked = inspect.unwrap(attend)


def tensors(batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim=None, dtype=torch.float64):
    """q as the model makes it (heads transposed, not contiguous); k and v contiguous."""
    q = torch.randn(batch, q_len, heads, head_dim, dtype=dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, kv_len, head_dim, dtype=dtype)
    v = torch.randn(batch, kv_heads, kv_len, value_dim or head_dim, dtype=dtype)
    return [x.detach().requires_grad_() for x in (q, k, v)]


def dense_attention(q, k, v, truth, key_mask=None):
    """A loop over queries, sharing nothing with the package."""
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        seen = [j for j in range(k.shape[2]) if truth(i + k.shape[2] - q.shape[2], j)]
        seen = [j for j in seen if key_mask is None or key_mask[b, j]]
        if seen:
            scores = k[b, h // group, seen] @ q[b, h, i] / q.shape[3] ** 0.5
            out[b, h, i] = scores.softmax(0) @ v[b, h // group, seen]
            lse[b, h, i] = scores.logsumexp(0)
    return out, lse


def grads(out, lse, inputs, weight, lse_weight):
    """Gradients of a weighted sum of the output and of the finite log-sum-exps."""
    loss = (out * weight).sum()
    if lse is not None:
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * lse_weight).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def agree(inputs, pattern, truth, backend, key_mask=None, **options):
    q, k, v = inputs
    weight, lse_weight = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.randn(q.shape[:3], dtype=q.dtype)
    expected, expected_lse = dense_attention(q, k, v, truth, key_mask)
    if backend == "sdpa":
        out, lse, expected_lse = attend(q, k, v, pattern=pattern, key_mask=key_mask, backend=backend), None, None
    else:
        out, lse = attend(q, k, v, pattern=pattern, key_mask=key_mask, backend=backend, return_lse=True)
        close(lse, expected_lse)
    close(out, expected)
    for actual, wanted in zip(
        grads(out, lse, inputs, weight, lse_weight),
        grads(expected, expected_lse, inputs, weight, lse_weight),
        strict=True,
    ):
        assert actual.isfinite().all()
        close(actual, wanted)


@pytest.mark.parametrize("backend", ["reference", "folded", "sdpa"])
@given(
    case=cases,
    q_len=st.integers(0, 20),
    kv_len=st.integers(0, 20),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    head_dim=st.sampled_from([1, 3, 4]),
    padded=st.booleans(),
)
def test_every_backend_equals_the_loop(backend, case, q_len, kv_len, heads, head_dim, padded):
    inputs = tensors(2, *heads, q_len, kv_len, head_dim, value_dim=head_dim + 1)
    key_mask = torch.rand(2, kv_len) > 0.4 if padded else None
    agree(inputs, *case, backend, key_mask)


@given(
    case=cases,
    q_len=st.integers(0, 90),
    kv_len=st.integers(0, 90),
    same=st.booleans(),
    heads=st.sampled_from([(2, 2), (4, 2)]),
    padded=st.booleans(),
)
def test_many_small_blocks_equal_the_reference(case, q_len, kv_len, same, heads, padded):
    kv_len = q_len if same else kv_len
    q, k, v = inputs = tensors(1, *heads, q_len, kv_len, 3)
    key_mask = torch.rand(1, kv_len) > 0.2 if padded else None
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    results = []
    for backend, seen in (
        ("folded", {"layout": case[0].layout(q_len, kv_len, block=8)}),
        ("reference", {"pattern": case[0]}),
    ):
        out, lse = attend(q, k, v, key_mask=key_mask, backend=backend, return_lse=True, **seen)
        results.append((out, lse, *grads(out, lse, inputs, weight, lse_weight)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


REAL = [
    ("causal() & sliding_window(70)", 300, 300),
    ("causal() & (sliding_window(40) | sinks(4))", 333, 333),
    ("causal() & (sliding_window(100) | sinks(70))", 448, 448),
    ("sliding_window(65) | sinks(3)", 256, 256),
    ("causal()", 129, 257),
    ("causal() & sliding_window(64)", 200, 64),
    ("full()", 65, 190),
    # blocks beside a band, some of which end beyond the lengths
    ("causal()", 300, 300),
    ("causal()", 257, 384),
    ("full()", 257, 330),
    ("sliding_window(400)", 320, 333),
    ("causal() & sliding_window(1)", 1, 1),
    ("causal() & sliding_window(500)", 100, 100),
]


@pytest.mark.parametrize(("text", "q_len", "kv_len"), REAL)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_folded_equals_the_reference_over_many_blocks(text, q_len, kv_len, heads, padded):
    q, k, v = inputs = tensors(2, *heads, q_len, kv_len, 5)
    key_mask = torch.arange(kv_len) >= torch.tensor([[0], [min(90, kv_len - 1)]]) if padded else None
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    results = []
    for backend in ("folded", "reference"):
        out, lse = attend(q, k, v, pattern=parse_pattern(text), key_mask=key_mask, backend=backend, return_lse=True)
        results.append((out, lse, *grads(out, lse, inputs, weight, lse_weight)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("budget", [1, 1 << 13, 1 << 30])
def test_pieces_of_any_size_give_the_same(budget, monkeypatch):
    from sparse_attn.backends import pieces, work

    monkeypatch.setattr(pieces, "PIECE", budget)
    monkeypatch.setattr(work, "PIECE", budget)
    q, k, v = inputs = tensors(2, 4, 2, 300, 300, 4)
    pattern = causal() & (sliding_window(70) | sinks(3))
    weight = torch.randn_like(q)
    actual, expected = (attend(q, k, v, pattern=pattern, backend=b) for b in ("folded", "reference"))
    for a, b in zip(
        (actual, *grads(actual, None, inputs, weight, None)),
        (expected, *grads(expected, None, inputs, weight, None)),
        strict=True,
    ):
        close(a, b)


def test_many_scattered_blocks_are_gathered():
    """A layout with more runs than a strip takes, different in every row, as random blocks and selection give."""
    from dataclasses import replace

    base = full().layout(160, 144, block=16)
    keep = torch.rand(base.visited_blocks) > 0.5
    rows = base.query_block[keep]
    start = torch.zeros(11, dtype=torch.long)
    start[1:] = torch.bincount(rows, minlength=10).cumsum(0)
    masks = torch.rand(3, 16, 16) > 0.5
    index = torch.randint(-1, 3, (int(keep.sum()),))
    layout = replace(base, row_start=start, key_block=base.key_block[keep], mask_index=index, masks=masks)
    assert make_plan(layout).gathers
    q, k, v = inputs = tensors(2, 4, 2, 160, 144, 4)
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    results = []
    for backend in ("auto", "reference"):
        out, lse = attend(q, k, v, layout=layout, backend=backend, return_lse=True)
        results.append((out, lse, *grads(out, lse, inputs, weight, lse_weight)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["folded", "sdpa"])
def test_lower_precision_is_near_the_float64_oracle(dtype, backend):
    q, k, v = inputs = tensors(1, 4, 2, 200, 200, 16, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    pattern, weight = causal() & (sliding_window(50) | sinks(2)), torch.randn(1, 4, 200, 16)
    out, expected = (
        attend(q, k, v, pattern=pattern, backend=backend),
        attend(*wide, pattern=pattern, backend="reference"),
    )
    assert out.dtype == dtype
    close(out, expected)
    for actual, wanted in zip(
        torch.autograd.grad((out * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), wide),
        strict=True,
    ):
        assert actual.dtype == dtype
        close(actual, wanted, dtype)


def test_expanded_and_strided_inputs_and_gradients():
    q = torch.randn(1, 4, 200, 8).expand(3, -1, -1, -1)
    k = torch.randn(3, 1, 200, 1).expand(-1, 2, -1, 8)
    v = torch.randn(3, 2, 8, 400).mT[:, :, ::2]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    pattern = causal() & sliding_window(30)
    results = []
    for backend in ("folded", "reference"):
        out = attend(*inputs, pattern=pattern, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))  # sum(): the gradient is expanded too
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_the_output_keeps_the_memory_order_of_the_queries():
    q, k, v = tensors(2, 4, 4, 200, 200, 8, dtype=torch.float32)
    out = attend(q, k, v, pattern=causal() & sliding_window(30), backend="folded")
    assert out.transpose(1, 2).is_contiguous()


def test_autocast_matches_the_reference_in_and_out_of_the_backward():
    q, k, v = inputs = tensors(1, 2, 2, 200, 200, 8, dtype=torch.float32)
    pattern = causal() & sliding_window(30)
    expected = attend(q, k, v, pattern=pattern, backend="reference")
    wanted = torch.autograd.grad(expected.sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, pattern=pattern, backend="folded")
        assert out.dtype == torch.bfloat16
        found = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(out.sum(), inputs)))  # autocast reaches no matmul inside
    close(out, expected)
    for actual, wish in zip(found, wanted, strict=True):
        close(actual, wish, torch.bfloat16)


@pytest.mark.parametrize("backend", ["folded", "reference", "sdpa"])
def test_dropout_keeps_the_mean_and_repeats_with_the_seed(backend):
    q, k, v = (torch.randn(1, 2, 300, 8) for _ in range(3))
    pattern = causal() & sliding_window(40)

    def drop(seed):
        torch.manual_seed(seed)
        return attend(q, k, v, pattern=pattern, dropout=0.3, backend=backend)

    assert torch.equal(drop(1), drop(1))
    assert not torch.equal(drop(1), drop(2))
    mean = torch.stack([drop(seed) for seed in range(300)]).mean(0)
    plain = attend(q, k, v, pattern=pattern, backend=backend)
    assert (mean - plain).abs().mean() < 0.05


def test_dropout_gradient_is_that_of_the_sampled_function():
    inputs = tensors(1, 2, 1, 130, 130, 3)
    pattern = causal() & sliding_window(40)

    def sampled(*inputs):
        torch.manual_seed(3)
        return attend(*inputs, pattern=pattern, dropout=0.4, backend="folded")[:, :, ::43]

    assert torch.autograd.gradcheck(sampled, inputs, fast_mode=True)


def test_no_two_tiles_drop_the_same():
    from sparse_attn.backends.pieces import pieces, tiles_of

    plan = make_plan(parse_pattern("causal() & bigbird(70, 9, 1)").layout(1024))
    assert plan.strips and plan.gathers and plan.late and plan.thin
    drawn = [
        hash((*tile.piece.place, index))
        for batch in range(2)
        for piece in pieces(plan, batch, slice(0, 2), 1, 1 << 21)
        for index, tile in enumerate(tiles_of(piece, 1))
    ]
    assert len(set(drawn)) == len(drawn)


def test_dropout_is_drawn_anew_for_every_batch_head_and_block(monkeypatch):
    from sparse_attn.backends import work

    monkeypatch.setattr(work, "PIECE", 1)  # each head and query block by itself
    zero, values = torch.zeros(2, 2, 320, 4), torch.randn(1, 1, 64, 4).repeat(2, 2, 5, 1)
    pattern = causal() & sliding_window(64)
    alike = (
        attend(zero, zero, values, pattern=pattern, backend="folded")[:, :, 64:].unflatten(2, (-1, 64)).flatten(0, 2)
    )
    close(alike, alike[:1].expand_as(alike))
    out = attend(zero, zero, values, pattern=pattern, backend="folded", dropout=0.5)[:, :, 64:]
    rows = out.unflatten(2, (-1, 64)).flatten(0, 2).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows) == 16


def test_positions_choose_what_is_seen():
    q, k, v = (torch.randn(1, 1, 4, 2, dtype=torch.float64) for _ in range(3))
    pattern = causal() & sliding_window(3)
    where, keys = torch.tensor([10, 11, 12, 13]), torch.tensor([0, 9, 11, 12])
    out = attend(q, k, v, pattern=pattern, query_positions=where, key_positions=keys)
    for i, position in enumerate(where.tolist()):
        seen = [j for j, key in enumerate(keys.tolist()) if 0 <= position - key < 3]
        close(out[0, 0, i], (k[0, 0, seen] @ q[0, 0, i] / 2**0.5).softmax(0) @ v[0, 0, seen])


def test_consecutive_positions_away_from_zero_use_blocks():
    q, k, v = tensors(1, 2, 2, 300, 400, 4)
    pattern, keys = causal() & (sliding_window(50) | sinks(120)), torch.arange(100, 500)
    where = torch.arange(180, 480)
    assert explain_backend(pattern, 300, 400, query_positions=where, key_positions=keys).backend == "folded"
    out, expected = (
        attend(q, k, v, pattern=pattern, query_positions=where, key_positions=keys, backend=name)
        for name in ("folded", "reference")
    )
    close(out, expected)


@pytest.mark.parametrize("text", ["full()", "causal() & multiples(70)", "causal() & last_columns(90, 2)", "~sinks(9)"])
def test_keys_at_negative_positions_are_seen_as_any_others(text):
    q, k, v = tensors(1, 2, 2, 300, 400, 4)
    options = {"query_positions": torch.arange(-50, 250), "key_positions": torch.arange(-150, 250)}
    out, expected = (attend(q, k, v, pattern=parse_pattern(text), backend=b, **options) for b in ("auto", "reference"))
    close(out, expected)
    with pytest.raises(ValueError, match="needs consecutive positions, keys from 0 on"):
        attend(q, k, v, pattern=parse_pattern(text), backend="folded", **options)
    with pytest.raises(ValueError, match="key_offset must be >= 0, got -150"):
        parse_pattern(text).layout(300, 400, key_offset=-150)


def test_the_automatic_choice_is_inspectable():
    window = causal() & sliding_window(256)
    assert explain_backend(window, 4096).backend == "folded"
    assert explain_backend(None, 4096).pairs == "all"
    assert explain_backend(causal(), 4096).pairs == "causal"
    assert explain_backend(window, 256).pairs == "causal"  # no longer than the window
    assert explain_backend(window, 257).pairs == "masked"
    assert explain_backend(causal(), 4096, key_mask=True).backend == "folded"
    assert explain_backend(window, 1, 300).backend == "sdpa"
    assert explain_backend(window, 1, 300, return_lse=True).backend == "reference"
    with pytest.raises(ValueError, match="q_len must be >= 0, got -1"):
        explain_backend(window, -1)
    with pytest.raises(ValueError, match="kv_len must be >= 0, got -2"):
        explain_backend(documents(3), 1, -2)
    assert "scattered" in explain_backend(window, 1, 3, key_positions=torch.tensor([0, 5, 6])).reason


def test_a_query_that_sees_nothing_gives_zeros():
    q, k, v = inputs = tensors(2, 2, 1, 100, 64, 4)  # the first 36 queries precede every key
    key_mask = torch.ones(2, 64, dtype=torch.bool)
    key_mask[1] = False
    for backend in ("folded", "reference", "sdpa"):
        out = attend(q, k, v, pattern=causal(), key_mask=key_mask, backend=backend)
        assert not out[0, :, :36].any() and not out[1].any() and out[0, :, 36:].all()
        grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), inputs)
        assert not grad_q[0, :, :36].any() and not any(g[1].any() for g in (grad_q, grad_k, grad_v))
        assert all(g.isfinite().all() for g in (grad_q, grad_k, grad_v))


def test_padding_that_holds_infinities_stays_unseen_in_scores():
    q, k, v = tensors(1, 1, 1, 70, 70, 4)
    key_mask = torch.arange(70)[None] >= 5
    with torch.no_grad():
        k[:, :, :5] = 1e30
    close(
        attend(q, k, v, pattern=causal(), key_mask=key_mask, backend="folded"),
        attend(q, k, v, pattern=causal(), key_mask=key_mask, backend="reference"),
    )


def bad(message, *, q=(2, 4, 6, 8), k=(2, 2, 6, 8), v=None, **options):
    with pytest.raises(ValueError, match=message):
        unchecked(torch.randn(q), torch.randn(k), torch.randn(v or k), **options)


def test_bad_input_is_a_clear_error():
    bad(r"k must be \[batch, heads, length, head_dim\], got shape \[2, 6, 8\]", k=(2, 6, 8))
    bad(r"v must have the batch, heads and length of k=\[2, 2, 6, 8\], got \[2, 2, 5, 8\]", v=(2, 2, 5, 8))
    bad(r"k must have the batch and head_dim of q=\[2, 4, 6, 8\], got \[2, 2, 6, 7\]", k=(2, 2, 6, 7))
    bad("key heads must divide the 4 query heads, got 3", k=(2, 3, 6, 8))
    bad(r"key_mask must be bool \[2, 6\], got torch.int64", key_mask=torch.ones(2, 6, dtype=torch.long))
    bad(r"key_mask must be bool \[2, 6\], got torch.bool \[2, 5\]", key_mask=torch.ones(2, 5, dtype=torch.bool))
    bad(r"query_positions must be integers \[6\] or \[2, 6\], got torch.int64 \[5\]", query_positions=torch.arange(5))
    bad(r"key_positions must be integers \[6\] or \[2, 6\], got torch.float32", key_positions=torch.arange(6.0))
    bad("backend must be one of .*, got 'flash'", backend="flash")
    bad(r"dropout must be in \[0, 1\), got 1", dropout=1.0)
    for scale in (math.nan, math.inf, -math.inf):
        bad(f"scale must be finite, got {scale}", scale=scale)
    bad("backend='sdpa' gives no log-sum-exp", backend="sdpa", return_lse=True)
    bad("backend='folded' needs consecutive", backend="folded", key_positions=torch.tensor([0, 1, 2, 4, 5, 6]))
    bad("pass layout alone", pattern=causal(), layout=causal().layout(6))
    bad(r"layout must be for lengths \(6, 6\), got \(7, 7\)", layout=causal().layout(7))
    with pytest.raises(ValueError, match="must share one floating dtype"):
        unchecked(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2).double(), torch.randn(1, 1, 2, 2))
