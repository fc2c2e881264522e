import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn.selection import tokens as module
from sparse_attn.selection.tokens import TokenSelection, attend_tokens
from tests.tolerances import close
from tests.typecheck import unchecked

SHAPES = [
    # B, H, Hkv, Hs, L, S, d, d_v, n
    (2, 4, 2, 2, 13, 13, 8, 8, 5),
    (2, 4, 2, 1, 7, 9, 4, 6, 3),
    (1, 2, 1, 1, 1, 9, 4, 6, 3),
    (1, 3, 3, 3, 7, 20, 5, 5, 1),
    (1, 2, 2, 2, 0, 6, 4, 4, 2),
    (1, 2, 2, 2, 3, 6, 4, 4, 0),
    (1, 2, 2, 2, 3, 0, 4, 4, 0),
]


def make(shape, *, dtype=torch.float64, seed=0):
    batch, heads, kv_heads, choices, length, keys, d, d_v, n = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, d, generator=g, dtype=dtype).requires_grad_()
    k = torch.randn(batch, kv_heads, keys, d, generator=g, dtype=dtype).requires_grad_()
    v = torch.randn(batch, kv_heads, keys, d_v, generator=g, dtype=dtype).requires_grad_()
    draws = torch.rand(batch, choices, length, keys, generator=g).argsort(-1)[..., :n]
    # of two lengths, and a query in nine without any key
    kept = torch.rand(draws.shape, generator=g) > 0.3
    kept &= (torch.arange(length) % 9 != 4)[:, None]
    return q, k, v, TokenSelection(draws.where(kept, -1), keys)


def by_loops(q, k, v, selection, scale=None):
    """One query at a time, over the keys of its list."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs, sums = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -math.inf).to(q.dtype)
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                listed = selection.tokens[b, head if selection.tokens.shape[1] > 1 else 0, i].tolist()
                seen = [j for j in listed if j >= 0]
                if not seen:
                    rows.append((outs[b, h, i] + 0 * q[b, h, i].sum(), sums[b, h, i]))
                    continue
                scores = k[b, head, seen] @ q[b, h, i] * scale
                rows.append((scores.softmax(0) @ v[b, head, seen], scores.logsumexp(0)))
    if not rows:
        return outs + 0 * q.sum(), sums
    return torch.stack([r[0] for r in rows]).view_as(outs), torch.stack([r[1] for r in rows]).view_as(sums)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("elements", [1, 200, 2**21])
def test_outputs_and_gradients_are_those_of_the_loops(shape, elements, monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", elements)
    q, k, v, selection = make(shape)
    wanted, wanted_lse = by_loops(q, k, v, selection)
    out, lse = attend_tokens(q, k, v, selection, return_lse=True)
    close(out, wanted)
    close(lse, wanted_lse)
    d_out, d_lse = torch.randn(out.shape, dtype=out.dtype), torch.randn(lse.shape, dtype=out.dtype)

    def loss(out, lse):
        return (out * d_out).sum() + (lse.where(lse > -math.inf, 0) * d_lse).sum()

    expected = torch.autograd.grad(loss(wanted, wanted_lse), [q, k, v], allow_unused=True)
    actual = torch.autograd.grad(loss(out, lse), [q, k, v])
    for a, e in zip(actual, expected, strict=True):
        close(a, torch.zeros_like(a) if e is None else e)


def test_scale_and_strided_inputs():
    q, k, v, selection = make(SHAPES[0])
    strided = [x.detach().mT.contiguous().mT for x in (q, k, v)]
    close(attend_tokens(*strided, selection, scale=0.3), by_loops(q, k, v, selection, 0.3)[0])


def test_half_precision_is_computed_in_float32():
    q, k, v, selection = make(SHAPES[0], dtype=torch.float32)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    out = attend_tokens(*half, selection)
    assert out.dtype == torch.bfloat16
    close(out, by_loops(*[x.float() for x in half], selection)[0].bfloat16())


@given(st.integers(0, 6), st.integers(1, 8), st.integers(0, 5), st.integers(0, 99))
def test_the_mask_is_what_is_seen_and_density_its_mean(length, keys, n, seed):
    _, _, v, selection = make((2, 2, 1, 1, length, keys, 3, 3, n), dtype=torch.float32, seed=seed)
    mask = selection.to_mask()
    assert mask.shape == (2, 1, length, keys)
    assert selection.density() == pytest.approx(float(mask.float().mean()) if mask.numel() else 0.0)
    zeros = torch.zeros(2, 1, length, 3)
    uniform = mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)
    close(attend_tokens(zeros, torch.zeros_like(v), v, selection), uniform @ v)


def test_sizes_that_do_not_belong_together():
    q, k, v, selection = make(SHAPES[0])
    with unchecked(), pytest.raises(ValueError, match=r"q must be \[batch, heads, .*, got shape \[4, 13, 8\]"):
        attend_tokens(q[0], k, v, selection)
    with pytest.raises(ValueError, match=r"selection must be for \[B, L, S\] = \[2, 12, 13\], got \[2, 13, 13\]"):
        attend_tokens(q[:, :, 1:], k, v, selection)
    with pytest.raises(ValueError, match="key heads must divide the 3 query heads, got 2"):
        attend_tokens(q[:, :3], k, v, selection)
    with pytest.raises(ValueError, match="selection heads must be 1, the 1 key or 4 query heads, got 2"):
        attend_tokens(q, k[:, :1], v[:, :1], selection)
    message = r"v must have the batch, heads and length of k=\[2, 2, 13, 8\], got \[2, 2, 12, 8\]"
    with unchecked(), pytest.raises(ValueError, match=message):
        attend_tokens(q, k, v[:, :, 1:], selection)
    for tokens, value in ((selection.tokens + 13, 25), (selection.tokens - 5, -6)):
        with pytest.raises(ValueError, match=rf"selected tokens must be in \[-1, 13\), got {value}"):
            attend_tokens(q, k, v, TokenSelection(tokens, 13))
