"""Softcap, ALiBi, a pattern for each head, merging of branches and packing, against loops and against each other."""

import inspect
import itertools
from collections import Counter
from importlib import import_module
from math import tanh

import numpy as np
import pytest
import torch

from sparse_attn import (
    alibi_slopes,
    attend,
    axial,
    bigbird,
    block_sparse,
    causal,
    dilated,
    documents,
    explain_backend,
    fixed,
    full,
    global_tokens,
    last_columns,
    merge,
    multiples,
    pack,
    parse_pattern,
    per_head,
    prefix_lm,
    random_blocks,
    same_row,
    sinks,
    sliding_window,
    strided,
    unpack,
)
from tests.sparse_attn.test_attend import grads, tensors
from tests.tolerances import close

unchecked = inspect.unwrap(attend)
WINDOW = causal() & (sliding_window(70) | sinks(4))


def looped(q, k, v, truth, softcap=None, slopes=None):
    """One query and head at a time; truth(head, i, j)."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        position = i + k.shape[2] - q.shape[2]
        scores = []
        for j in (j for j in range(k.shape[2]) if truth(h, position, j)):
            score = (q[b, h, i] * k[b, h // group, j]).sum() / q.shape[3] ** 0.5
            score = score if softcap is None else softcap * (score / softcap).tanh()
            scores.append((j, score if slopes is None else score - slopes[h] * abs(position - j)))
        if scores:
            share = torch.stack([score for _, score in scores]).softmax(0)
            rows.append(share @ v[b, h // group, [j for j, _ in scores]])
        else:
            rows.append(v.new_zeros(v.shape[3]))
    return torch.stack(rows).view(*q.shape[:3], v.shape[3])


def same(results):
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("scale", [0.0, -1.0])
@pytest.mark.parametrize("text", ["causal()", "causal() & sliding_window(512)", "causal() & documents(90, 110)"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "folded"])
def test_any_finite_scale(backend, text, scale):
    """torch's causal kernel scales the -inf of a hidden key with the rest."""
    inputs, pattern = tensors(1, 4, 2, 200, 200, 8), parse_pattern(text)
    outs = [attend(*inputs, pattern=pattern, scale=scale, backend=name) for name in (backend, "reference")]
    same([[out, *torch.autograd.grad(out.square().sum(), inputs)] for out in outs])


@pytest.mark.parametrize("backend", ["reference", "folded", "sdpa"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("pattern", ["causal() & sliding_window(4)", "full()"])
def test_softcap_and_alibi_equal_the_loop(backend, softcap, alibi, pattern):
    if backend == "sdpa" and softcap:
        pytest.skip("sdpa has no softcap")
    q, k, v = inputs = tensors(2, 4, 2, 7, 9, 3)
    seen, slopes = parse_pattern(pattern), alibi_slopes(4) if alibi else None
    weight = torch.randn_like(q)
    actual = attend(q, k, v, pattern=seen, softcap=softcap, alibi=slopes, backend=backend)
    expected = looped(q, k, v, lambda h, i, j: bool(seen.visible(torch.tensor(i), torch.tensor(j))), softcap, slopes)
    same([(out, *grads(out, None, inputs, weight, None)) for out in (actual, expected)])


@pytest.mark.parametrize("text", ["causal() & bigbird(70, 9, 1)", "causal() & (sliding_window(70) | sinks(4))"])
def test_softcap_and_alibi_over_many_blocks(text):
    q, _, _ = inputs = tensors(1, 4, 2, 384, 448, 4)
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    results = []
    for backend in ("folded", "reference"):
        out, lse = attend(
            *inputs, pattern=parse_pattern(text), softcap=2.0, alibi=alibi_slopes(4), backend=backend, return_lse=True
        )
        results.append((out, lse, *grads(out, lse, inputs, weight, lse_weight)))
    same(results)


def test_softcap_bounds_the_score():
    q = torch.full((1, 1, 1, 1), 100.0)
    k = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)
    _, lse = attend(q, k, k, softcap=5.0, return_lse=True)
    close(lse, torch.tensor([5 * tanh(20), -5 * tanh(20)]).logsumexp(0).view(1, 1, 1))


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    close(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert len(alibi_slopes(1)) == 1 and len(alibi_slopes(7)) == 7
    with pytest.raises(ValueError, match="num_heads must be >= 1, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize(
    ("heads", "kinds"), [((4, 4), "aabb"), ((4, 4), "abab"), ((4, 2), "aaab"), ((4, 1), "abba"), ((6, 3), "abccab")]
)
@pytest.mark.parametrize("backend", ["auto", "folded"])
def test_each_head_has_its_pattern(heads, kinds, backend):
    of = {"a": causal(), "b": WINDOW, "c": causal() & strided(64)}
    q, k, v = inputs = tensors(2, *heads, 200, 200, 4)
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    slopes = alibi_slopes(heads[0])
    out, lse = attend(q, k, v, pattern=[of[kind] for kind in kinds], alibi=slopes, backend=backend, return_lse=True)
    alone = [attend(q, k, v, pattern=of[kind], alibi=slopes, backend="reference", return_lse=True) for kind in kinds]
    wanted = torch.stack([alone[h][0][:, h] for h in range(len(kinds))], 1)
    wanted_lse = torch.stack([alone[h][1][:, h] for h in range(len(kinds))], 1)
    same([(a, b, *grads(a, b, inputs, weight, lse_weight)) for a, b in ((out, lse), (wanted, wanted_lse))])


def test_neighbouring_heads_of_equal_pattern_copy_no_keys(monkeypatch):
    from sparse_attn import heads

    q, k, v = tensors(1, 4, 2, 130, 130, 4)
    seen = []
    queries = (causal(), causal(), WINDOW, full())
    heads.over_heads(lambda pattern, some, a, b, c: seen.append(b) or [a], q, k, v, queries)
    assert all(keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() for keys in seen)
    assert [keys.shape[1] for keys in seen] == [1, 1, 1]


def test_per_head_reads_combines_and_refuses():
    text = "per_head(causal() & sliding_window(64), causal() & sinks(4))"
    assert str(causal() & per_head(sliding_window(64), sinks(4))) == text
    assert parse_pattern(text) == causal() & per_head(sliding_window(64), sinks(4)) and parse_pattern(text).is_causal
    assert (~per_head(causal(), full())).heads == (~causal(), ~full())
    for bad, message in (
        ("per_head()", "one pattern for each query head, got none"),
        ("per_head(per_head(causal()))", "not per head themselves"),
        ("per_head(causal()) & per_head(causal(), full())", "equally many heads, got 1 and 2"),
        ("per_head(3)", "a pattern may hold calls"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_pattern(bad)
    q, k, v = tensors(1, 2, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="a pattern for each of 2 query heads, got 1"):
        unchecked(q, k, v, pattern=per_head(causal()))


def test_merged_branches_equal_attention_over_all_keys():
    q, k, v = inputs = tensors(2, 4, 2, 150, 120, 4)
    key_mask = torch.ones(2, 120, dtype=torch.bool)
    key_mask[1, :40] = False
    weight, lse_weight = torch.randn_like(q), torch.randn(q.shape[:3], dtype=q.dtype)
    near, far = causal() & sliding_window(30), causal() & ~sliding_window(30)
    branches = [attend(q, k, v, pattern=p, key_mask=key_mask, return_lse=True) for p in (near, far)]
    merged = merge([out for out, _ in branches], [lse for _, lse in branches])
    whole = attend(q, k, v, pattern=causal(), key_mask=key_mask, return_lse=True, backend="reference")
    results = [(out, lse, *grads(out, lse, inputs, weight, lse_weight)) for out, lse in (merged, whole)]
    same(results)
    assert all(x.isfinite().all() for x in results[0][2:]) and not merged[0][0, :, :30].any()


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    close(merge([out], [lse])[0], out)
    with pytest.raises(ValueError, match="equally many, at least one, got 0 and 0"):
        merge([], [])
    with pytest.raises(ValueError, match=r"each branch must be \[1, 2, 3, 4\]"):
        inspect.unwrap(merge)([out, out[:, :1]], [lse, lse[:, :1]])


def test_packed_sequences_get_what_they_get_alone():
    sequences = [torch.randn(length, 2, 4, dtype=torch.float64) for length in (90, 1, 65, 130)]
    row, apart = pack(sequences)
    assert apart == documents(90, 1, 65, 130)
    x = row.transpose(1, 2)
    out = attend(x, x, x, pattern=causal() & apart, backend="folded").transpose(1, 2)
    for sequence, packed in zip(sequences, unpack(out, [90, 1, 65, 130]), strict=True):
        alone = sequence.transpose(0, 1)[None]
        close(packed, attend(alone, alone, alone, pattern=causal())[0].transpose(0, 1))
    assert [len(part) for part in inspect.unwrap(unpack)(row, list(np.array([90, 196])))] == [90, 196]
    with pytest.raises(ValueError, match=r"sum\(lengths\)=3, got \[1, 286\]"):
        unpack(row, [1, 2])
    with pytest.raises(ValueError, match="lengths must be >= 0, got -1"):
        unpack(row[:, :4], [5, -1])
    with pytest.raises(ValueError, match=r"sequences must have the shape of the first, \[3\], .* got \[4\]"):
        inspect.unwrap(pack)([torch.randn(2, 3), torch.randn(2, 4)])
    with pytest.raises(ValueError, match="lengths must be >= 1, got 0"):
        pack([torch.randn(0, 3)])


@pytest.mark.parametrize("backend", ["folded", "reference", "sdpa"])
def test_half_precision_and_odd_head_sizes(backend):
    for dtype, width in ((torch.float16, 5), (torch.bfloat16, 1), (torch.float32, 96)):
        q, k, v = tensors(1, 2, 1, 131, 131, width, dtype=dtype)
        out = attend(q, k, v, pattern=causal() & bigbird(40, 2, 1), alibi=alibi_slopes(2), backend=backend)
        wide = [x.detach().double() for x in (q, k, v)]
        close(out, attend(*wide, pattern=causal() & bigbird(40, 2, 1), alibi=alibi_slopes(2), backend="reference"))


def test_bad_options():
    q, k, v = torch.randn(3, 1, 2, 4, 4)
    for message, options in (
        ("softcap must be finite and > 0, got 0", {"softcap": 0}),
        (r"alibi must be floating slopes \[2\], got torch.float32 \[3\]", {"alibi": torch.ones(3)}),
        ("alibi must be fixed slopes", {"alibi": torch.ones(2, requires_grad=True)}),
        ("'sdpa' has no softcap", {"softcap": 1.0, "backend": "sdpa"}),
    ):
        with pytest.raises(ValueError, match=message):
            unchecked(q, k, v, **options)


@pytest.mark.parametrize("inside", [None, causal(), causal() & sliding_window(40), causal() & sinks(2)], ids=str)
def test_documents_that_attend_apart_are_those_of_the_reference(inside):
    """Long documents are a call each, where what they see inside depends on distances alone."""
    pattern = documents(90, 1, 165) if inside is None else inside & documents(90, 1, 165)
    draws = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 330, 8, generator=draws).requires_grad_() for heads in (4, 2, 2)]
    grad = torch.randn(2, 4, 330, 8, generator=draws)
    options = {"softcap": 3.0, "alibi": alibi_slopes(4)}
    for chosen in ({}, options):
        results = []
        for backend in ("auto", "reference"):
            out = attend(*inputs, pattern=pattern, backend=backend, **chosen)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
        for actual, expected in zip(*results, strict=True):
            close(actual, expected)
    relative = inside is None or inside.is_relative
    assert (explain_backend(pattern, 330).pairs == "documents") == relative


def test_many_short_documents_are_walked_by_blocks():
    assert explain_backend(causal() & documents([8] * 50), 400).backend == "folded"
    assert explain_backend(causal() & documents(100, 300), 400, key_mask=True).pairs == "masked"


def test_the_choice_for_each_head_is_what_attend_runs_on_it(monkeypatch):
    ran: Counter[str] = Counter()

    def counted(name: str, backend: str):
        module = import_module("sparse_attn.attend")
        wrapped = getattr(module, name)

        def run(q, *rest, **options):
            ran[backend] += q.shape[1] * q.shape[2]
            return wrapped(q, *rest, **options)

        monkeypatch.setattr(module, name, run)

    for name, backend in (("folded", "folded"), ("reference", "reference"), ("sdpa_masked", "sdpa masked"),
                          ("sdpa_unmasked", "sdpa unmasked")):  # fmt: skip
        counted(name, backend)
    window, apart = causal() & sliding_window(9), causal() & documents(200, 100)
    heads = [causal(), window, apart, window, full(), causal()]
    unmasked = ("all", "causal", "documents")
    for length, options in ((300, {}), (60, {}), (300, {"return_lse": True}), (60, {"return_lse": True})):
        q, k, v = tensors(2, 6, 3, length, length, 8)
        ran.clear()
        attend(q, k, v, pattern=heads, **options)
        found = explain_backend(heads, length, **options)
        assert (found.backend, found.pairs) == ("auto", "heads") and len(found.heads) == 6
        assert found == explain_backend(per_head(*heads), length, **options)
        assert found.heads == tuple(explain_backend(head, length, **options) for head in heads)
        sdpa = (("sdpa unmasked" if c.pairs in unmasked else "sdpa masked") for c in found.heads)
        wanted = Counter(
            c.backend if c.backend in ("folded", "reference") else name
            for c, name in zip(found.heads, sdpa, strict=True)
        )
        assert ran == {name: count * length for name, count in wanted.items()}
    found = explain_backend(per_head(causal(), window), 300)
    assert found.reason == (
        "heads of equal pattern attend together: causal() by sdpa, exactly the keys j <= i are visible; "
        "causal() & sliding_window(9) by folded, only the visited blocks are computed"
    )
    with pytest.raises(ValueError, match="q_len must be >= 0, got -1"):
        explain_backend(per_head(causal()), -1)


EMPTY = [
    *(causal(), full(), sliding_window(3), sinks(2), strided(4), dilated(3, 2), fixed(8, 2), axial(4), multiples(3)),
    *(same_row(4), last_columns(8, 2), global_tokens([0, 3]), random_blocks(2, 4), bigbird(5, 3, 1, 4), prefix_lm(3)),
    *(block_sparse([[0], [0, 1]], 4), documents(3), ~documents(3), causal() & documents(3, 4)),
    per_head(causal() & documents(3, 4), documents(3)),
]


@pytest.mark.parametrize("pattern", EMPTY, ids=str)
def test_no_queries_and_no_keys_give_an_empty_output(pattern):
    inputs = [torch.randn(1, heads, 0, 4, requires_grad=True) for heads in (2, 1, 1)]
    out = attend(*inputs, pattern=pattern)
    assert out.shape == (1, 2, 0, 4)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]
    for head in getattr(pattern, "heads", [pattern]):
        assert explain_backend(head, 0).pairs != "documents"
