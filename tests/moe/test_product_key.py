"""Product-key memory against a comparison with every one of the n² keys: outputs, every gradient, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import PEER
from moe.memory_stats import memory_stats
from moe.memory_values import MemoryValues, dot_rows, sparse_tables, sum_rows
from moe.pages import advise_huge_pages
from moe.product_key import ProductKeyMemory, ProductKeys, search, top_scores
from tests.tolerances import close
from tests.typecheck import unchecked

NEAR_FLOAT = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def memory(dim=6, n=5, heads=2, k=3, key_dim=8, dtype=torch.float64, **options):
    layer = ProductKeyMemory(dim, num_keys=n, heads=heads, k=k, key_dim=key_dim, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 3)
    return layer.to(dtype)


def normed(query, layer):
    """query [R, H, c], by the formulas of layer and batch normalisation."""
    norm = layer.keys.norm
    if norm is None:
        return query
    over, weight, bias = (2, norm.weight, norm.bias) if layer.keys.query_norm == "layer" else (0, *(
        p.view(query.shape[1:]) for p in (norm.weight, norm.bias)
    ))  # fmt: skip
    centred = query - query.mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt() * weight + bias


def every_key(layer, x):
    """Score all n² keys of every head for every token, sort them, take k."""
    rows, n, keys = x.reshape(-1, layer.dim), layer.keys.num_keys, layer.keys.weight
    heads, half = layer.keys.heads, layer.keys.key_dim // 2
    query = normed(torch.einsum("rd,qd->rq", rows, layer.keys.query.weight).view(len(rows), heads, -1), layer)
    outputs, chosen = [], []
    for r in range(len(rows)):
        y = torch.zeros(layer.values.dim, dtype=rows.dtype)
        for h in range(heads):
            full = [torch.cat([keys[h, 0, i], keys[h, 1, j]]) for i in range(n) for j in range(n)]
            scores = [(torch.cat([query[r, h, :half], query[r, h, half:]]) * key).sum() for key in full]
            best = sorted(range(n * n), key=lambda s: -scores[s].item())[: layer.keys.k]
            total = sum(torch.exp(scores[s]) for s in best)
            for s in best:
                y = y + torch.exp(scores[s]) / total * layer.values.weight[s]
            chosen.append(best)
        if layer.gate is not None:
            g = layer.gate.weight @ rows[r]
            y = layer.output.weight @ (y * g / (1 + torch.exp(-g)))
        outputs.append(y)
    return torch.stack(outputs).view(x.shape), torch.tensor(chosen).view(len(rows), heads, -1)


@pytest.mark.parametrize("options", [
    {}, {"query_norm": "none"}, {"query_norm": "batch"}, {"gated": True}, {"gated": True, "value_dim": 3},
    {"n": 1, "k": 1}, {"n": 2, "k": 2}, {"n": 3, "k": 3, "heads": 1}, {"k": 1}, {"dim": 1, "key_dim": 2},
], ids=str)  # fmt: skip
def test_outputs_choices_and_every_gradient_equal_those_of_all_keys(options):
    layer = memory(**options)
    x = torch.randn(2, 4, layer.dim, dtype=torch.float64, requires_grad=True)
    d_y = torch.randn_like(x)
    y, lookup = layer.read(x)
    expected, chosen = every_key(layer, x)
    close(y, expected)
    assert lookup.slots.equal(chosen)
    close(lookup.weights.sum(-1), torch.ones(8, layer.keys.heads, dtype=torch.float64))
    actual = torch.autograd.grad(y, [x, *layer.parameters()], d_y)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], d_y)
    for got, want in zip(actual, wanted, strict=True):
        close(got.to_dense(), want)
    assert [g.is_sparse for g in actual] == [p is layer.values.weight for p in [x, *layer.parameters()]]


@given(st.integers(1, 7), st.data())
def test_search_finds_the_k_largest_sums(n, data):
    k = data.draw(st.integers(1, n))
    whole = st.lists(st.integers(-3, 3), min_size=n, max_size=n)
    keys = torch.tensor([[data.draw(whole), data.draw(whole)]], dtype=torch.float32)[..., None]
    pairs = torch.tensor([(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]).mT
    slots, scores = search(torch.ones(1, 1, 2), keys, k, pairs=pairs)
    table = [(keys[0, 0, i] + keys[0, 1, j]).item() for i in range(n) for j in range(n)]
    assert scores.flatten().tolist() == sorted(table, reverse=True)[:k]
    assert [table[s] for s in slots.flatten().tolist()] == scores.flatten().tolist()
    assert slots.unique().numel() == k


@pytest.mark.parametrize("dtype", NEAR_FLOAT, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("tokens", "choices"), [(0, 3), (1, 1), (7, 5), (3, 0)])
def test_sums_and_dots_of_rows_in_every_precision(dtype, sparse, tokens, choices):
    table = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    slots = torch.randint(6, (tokens, choices))
    weights = torch.randn(tokens, choices, dtype=dtype, requires_grad=True)
    x = torch.randn(tokens, 4, dtype=dtype, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (table, weights, x)]
    cases = [
        (sum_rows, weights, torch.einsum("tk,tkv->tv", wide[1], wide[0][slots]), wide[1]),
        (dot_rows, x, torch.einsum("tv,tkv->tk", wide[2], wide[0][slots]), wide[2]),
    ]
    for function, given_, expected, leaf in cases:
        got = function(table, slots, given_, sparse=sparse)
        close(got, expected, dtype)
        d = torch.randn_like(got)
        d_table, d_given = torch.autograd.grad(got, [table, given_], d)
        want = torch.autograd.grad(expected, [wide[0], leaf], d.double())
        assert d_table.is_sparse == sparse
        close(d_table.to_dense(), want[0], dtype)
        close(d_given, want[1], dtype)


def test_the_gradient_of_a_table_holds_the_rows_read_once_each():
    table = MemoryValues(1000, 4)
    slots = torch.tensor([[7, 7, 900], [900, 3, 7]])
    table(slots, torch.rand(2, 3)).sum().backward()
    grad = table.weight.grad
    assert grad._indices().tolist() == [[3, 7, 900]]
    assert grad._values().shape == (3, 4)


def test_one_pool_serves_two_layers_of_a_model_and_no_other_model():
    pool = MemoryValues(25, 6)
    layers = torch.nn.ModuleList(memory(values=pool, dtype=torch.float32) for _ in range(2))
    assert list(sparse_tables(layers)) == [pool.weight]
    x = torch.randn(9, 6)
    sum(layer(x).sum() for layer in layers).backward()
    alone = []
    for layer in layers:
        alone.append(torch.autograd.grad(layer(x).sum(), pool.weight)[0].to_dense())
    close(pool.weight.grad.to_dense(), alone[0] + alone[1])
    assert memory().values.weight.data_ptr() != memory().values.weight.data_ptr()


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_padding_reads_nothing_and_changes_nothing(norm):
    layer = memory(query_norm=norm)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y, lookup = layer.read(x, padding_mask=mask)
    close(y[mask], every_key(layer, x[mask])[0])
    assert not y[~mask].any()
    assert lookup.slots.shape == (4, 2, 3)


def test_layer_norm_is_causal_and_batch_norm_is_not_while_training():
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    for norm, causal in (("layer", True), ("none", True), ("batch", False)):
        layer = memory(query_norm=norm)
        assert layer(x)[:, :4].equal(layer(changed)[:, :4]) == causal
        layer.eval()
        assert layer(x)[:, :4].equal(layer(changed)[:, :4])


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("gated", [True, False])
def test_zero_tokens_one_token_and_strided_input(norm, gated):
    layer = memory(query_norm=norm, gated=gated)
    empty = torch.randn(0, 6, dtype=torch.float64, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == (0, 6)
    assert not any(p.grad.to_dense().any() for p in layer.parameters() if p.grad is not None)
    layer.eval()
    x = torch.randn(3, 6, 2, dtype=torch.float64).transpose(1, 2)
    y = layer(x)
    close(layer(x[1, 1]), y[1, 1])
    close(layer(x[:1, :1].expand(2, 2, 6))[1, 1], y[0, 0])


def test_autocast_searches_in_float32_and_answers_in_bfloat16():
    layer = memory(dtype=torch.float32, gated=True)
    x = torch.randn(7, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, lookup = layer.read(x)
    assert y.dtype == torch.bfloat16
    assert lookup.weights.dtype == torch.float32
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_half_precision_modules(dtype, norm):
    layer = memory(dtype=dtype, query_norm=norm)
    y = layer(torch.randn(7, 6, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad.to_dense().isfinite().all() for p in layer.parameters())


def test_saves_and_loads():
    layer, other = memory(gated=True), memory(gated=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    assert layer(x).equal(other(x))


def test_bad_input_is_refused_by_name_bound_and_value():
    with unchecked():
        for options, message in (
            ({"k": 6}, r"memory: k must be in \[1, num_keys=5\], got 6"),
            ({"k": 0}, r"k must be in \[1, num_keys=5\], got 0"),
            ({"n": 0}, r"num_keys must be >= 1, got 0"),
            ({"heads": 0}, r"heads must be >= 1, got 0"),
            ({"dim": 0}, r"dim must be >= 1, got 0"),
            ({"key_dim": 7}, r"key_dim must be even and >= 2, for two halves, got 7"),
            ({"value_dim": 0}, r"dim must be >= 1, got 0"),
            ({"value_dim": 4}, r"value_dim must be dim=6 unless gated, got 4"),
            ({"query_norm": "rms"}, r"query_norm must be 'layer', 'batch' or 'none', got 'rms'"),
            ({"values": MemoryValues(24, 6)}, r"values must have num_keys²=25 slots, got 24"),
            ({"values": MemoryValues(25, 6), "value_dim": 3}, r"value_dim must be the width of values, 6, got 3"),
        ):
            with pytest.raises(ValueError, match=message):
                memory(**options)
        layer = memory(query_norm="batch", name="layers.3")
        with pytest.raises(ValueError, match=r"layers.3: x must have width dim=6, got 5"):
            layer(torch.randn(2, 5).double())
        with pytest.raises(ValueError, match=r"layers.3: padding_mask must be bool of shape \[2\].*got torch.int64"):
            layer(torch.randn(2, 6).double(), padding_mask=torch.ones(2).long())
        with pytest.raises(ValueError, match=r"padding_mask must be bool of shape \[2\].*of shape \[3\]"):
            layer(torch.randn(2, 6).double(), padding_mask=torch.ones(3).bool())
        with pytest.raises(ValueError, match=r"layers.3: query_norm='batch' must see >= 2 real tokens"):
            layer(torch.randn(1, 6).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_non_finite_tokens_are_refused_by_the_layers_name(bad, norm):
    x = torch.randn(4, 6, dtype=torch.float64)
    x[2, 1] = bad
    layer = memory(query_norm=norm, name="layers.3")
    with pytest.raises(FloatingPointError, match=r"layers.3: .* finite, got NaN or infinity for 1 of 4 tokens"):
        layer(x)
    layer(x, padding_mask=torch.tensor([True, True, False, True]))


def test_stats_by_hand():
    layer = memory(n=2, k=2, heads=1)
    _, lookup = layer.read(torch.randn(3, 6, dtype=torch.float64))
    made = type(lookup)(torch.tensor([[[0, 1]], [[0, 3]]]), torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]]), 4)
    stats = memory_stats([made])
    assert stats.used == pytest.approx(3 / 4)
    assert stats.kl == pytest.approx(math.log(4) + 0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    z = [1.25 / 2, 0.25 / 2, 0.5 / 2]
    assert stats.weighted_kl == pytest.approx(math.log(4) + sum(p * math.log(p) for p in z))
    # mean absolute difference over all pairs, over twice the mean, of the weights 1.25, 0.25, 0, 0.5
    w = [1.25, 0.25, 0.0, 0.5]
    assert stats.gini == pytest.approx(sum(abs(a - b) for a in w for b in w) / (2 * 4 * sum(w)))
    twice = memory_stats([made, made])
    assert (twice.used, twice.gini) == (pytest.approx(stats.used), pytest.approx(stats.gini))


def test_stats_of_even_and_of_single_use_and_of_nothing():
    lookup = memory(n=2, k=2, heads=1).read(torch.randn(3, 6, dtype=torch.float64))[1]
    even = type(lookup)(torch.arange(4).view(2, 1, 2), torch.full((2, 1, 2), 0.5), 4)
    stats = memory_stats([even])
    assert (stats.used, stats.kl, stats.weighted_kl, stats.gini) == pytest.approx((1.0, 0.0, 0.0, 0.0), abs=1e-6)
    one = type(lookup)(torch.zeros(2, 1, 1, dtype=torch.long), torch.ones(2, 1, 1), 4)
    stats = memory_stats([one])
    assert (stats.used, stats.kl, stats.gini) == pytest.approx((0.25, math.log(4), 0.75))
    nothing = type(lookup)(torch.zeros(0, 1, 1, dtype=torch.long), torch.ones(0, 1, 1), 4)
    stats = memory_stats([nothing])
    assert (stats.used, stats.kl, stats.weighted_kl, stats.gini) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least one lookup"):
        memory_stats([])
    with pytest.raises(ValueError, match=r"num_slots must be 4 in every lookup, got 9"):
        memory_stats([one, type(lookup)(one.slots, one.weights, 9)])


@pytest.mark.parametrize("draw", ["made", "reset"])
def test_fresh_values_have_the_deviation_of_their_width_and_not_of_their_number(draw):
    values = MemoryValues(2500, 16)
    if draw == "reset":
        with torch.no_grad():
            values.weight.zero_()
        values.reset_parameters()
    assert values.weight.std().item() == pytest.approx(16**-0.5, rel=0.03)
    assert abs(values.weight.mean().item()) < 0.01


@given(st.integers(1, 40), st.data())
def test_top_scores_are_those_of_a_sort_with_ties_and_infinities(n, data):
    k = data.draw(st.integers(1, n))
    number = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 1.0, 2.0, math.inf])
    rows = data.draw(st.lists(st.lists(number, min_size=n, max_size=n), max_size=3))
    scores = torch.tensor(rows).reshape(-1, n)
    values, places = top_scores(scores, k)
    assert values.tolist() == [sorted(row, reverse=True)[:k] for row in scores.tolist()]
    assert scores.gather(1, places).equal(values)
    assert all(row.unique().numel() == k for row in places)


@pytest.mark.parametrize(("n", "k"), [(64, 2), (128, 32), (96, 4), (63, 3)])
def test_top_scores_of_many_in_groups(n, k):
    scores = torch.randn(3, 2, n)
    values, places = top_scores(scores, k)
    expected = torch.tensor([sorted(range(n), key=lambda i: -row[i]) for row in scores.flatten(0, 1).tolist()])
    assert places.flatten(0, 1).equal(expected[:, :k])
    assert values.equal(scores.gather(2, places))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_scores_rank_nan_of_either_sign_first_as_topk_does(dtype):
    nan = torch.tensor(math.nan, dtype=dtype)
    ordinary = torch.tensor([math.inf, 1.0, 0.0, -1.0, -math.inf, 5e-324, -5e-324], dtype=dtype)
    for bad in (nan, nan.copysign(torch.tensor(-1.0))):
        for scores in (torch.cat([ordinary, bad[None]]), torch.cat([bad[None], ordinary]).repeat(16)):
            assert top_scores(scores, 1)[0].isnan().all()
    assert top_scores(ordinary, 3)[0].tolist() == ordinary.sort(descending=True).values[:3].tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_the_search_are_those_of_all_scores_gathered(shared):
    heads, n, k, half = 3, 7, 5, 4
    query = torch.randn(11, heads, 2 * half, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(1 if shared else heads, 2, n, half, dtype=torch.float64, requires_grad=True)
    every = torch.tensor([(i, j) for i in range(k) for j in range(k)]).mT
    slots, scores = search(query, keys, k, pairs=every)
    d_scores = torch.randn_like(scores)
    found = torch.autograd.grad(scores, [query, keys], d_scores)
    wide = keys.expand(heads, -1, -1, -1)
    first = torch.einsum("rhc,hnc->rhn", query[..., :half], wide[:, 0])
    second = torch.einsum("rhc,hnc->rhn", query[..., half:], wide[:, 1])
    both = (first[..., :, None] + second[..., None, :]).flatten(2)
    expected = both.gather(2, slots)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores, both.topk(k).values)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [query, keys], d_scores))
    assert torch.autograd.gradgradcheck(lambda q, w: search(q, w, k, pairs=every)[1], (query, keys))


def test_keys_under_torch_func_and_forward_mode():
    keys = ProductKeys(8, num_keys=8, heads=2, k=4, key_dim=6).double()
    x, direction = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()

    def loss(x):
        return keys(x).weights.square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    slope = (expected * direction).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (direction,))[1], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slope)


def test_huge_pages_are_asked_for_large_tables_alone_and_change_no_value():
    assert not advise_huge_pages(torch.empty(1000))
    assert not advise_huge_pages(torch.empty(1 << 22, device="meta"))
    table = torch.arange(1 << 21, dtype=torch.float32)
    assert isinstance(advise_huge_pages(table), bool)
    assert table.equal(torch.arange(1 << 21, dtype=torch.float32))


@pytest.mark.parametrize("slot", [-1, 12])
def test_a_slot_outside_the_table_is_an_error_not_what_lies_there_in_memory(slot):
    with pytest.raises(IndexError, match=rf"slots must be in \[0, 12\), got {slot}"):
        dot_rows(torch.ones(12, 4), torch.tensor([[0, slot]]), torch.ones(1, 4))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2000.0), (torch.float32, 1e20), (torch.bfloat16, 1e30)])
@pytest.mark.parametrize("build", [ProductKeyMemory, PEER])
def test_a_variance_beyond_its_type_is_refused_before_it_is_taken_in(build, dtype, size):
    layer = build(16, num_keys=8, heads=1, k=4, key_dim=8, query_norm="batch").to(dtype)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    layer(x.to(dtype))
    before = layer.keys.norm.running_var.clone()
    with pytest.raises(FloatingPointError, match="the variance of queries must be at most .* for query_norm='batch'"):
        layer((x * size).to(dtype))
    assert layer.keys.norm.running_var.equal(before) and before.isfinite().all()
    layer.eval()(x.to(dtype))


def test_sub_keys_are_drawn_from_within_the_root_of_their_width():
    keys = ProductKeys(6, num_keys=64, heads=2, k=2, key_dim=8)
    assert 0.49 < keys.weight.max() <= 0.5 and -0.5 <= keys.weight.min() < -0.49
