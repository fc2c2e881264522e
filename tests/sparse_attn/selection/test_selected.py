import math

import pytest
import torch

from sparse_attn.selection import BlockSelection, attend_selected
from tests.tolerances import close

SHAPES = [
    # B, H, Hkv, L, S, d, d_v, block, n
    (2, 4, 2, 13, 13, 8, 8, 4, 2),
    (1, 2, 1, 1, 9, 4, 6, 4, 3),
    (1, 3, 3, 7, 20, 5, 5, 8, 1),
    (1, 2, 2, 6, 6, 4, 4, 16, 1),
    (1, 2, 2, 0, 6, 4, 4, 2, 2),
]


def make(shape, *, dtype=torch.float64, causal=True, seed=0):
    batch, heads, kv_heads, length, keys, d, d_v, block, n = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, d, generator=g, dtype=dtype).requires_grad_()
    k = torch.randn(batch, kv_heads, keys, d, generator=g, dtype=dtype).requires_grad_()
    v = torch.randn(batch, kv_heads, keys, d_v, generator=g, dtype=dtype).requires_grad_()
    columns = -(-keys // block)
    draws = torch.rand(batch, kv_heads, length, columns, generator=g).argsort(-1)[..., :n]
    blocks = draws.where(torch.rand(draws.shape, generator=g) > 0.3, -1)
    return q, k, v, BlockSelection(blocks, block, keys, keys - length, causal)


def by_loops(q, k, v, selection, key_mask=None):
    """One query at a time, over the keys of its blocks."""
    outs, sums = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -math.inf).to(q.dtype)
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                chosen = [c for c in selection.blocks[b, head, i].tolist() if c >= 0]
                seen = [j for c in chosen for j in range(c * selection.block, (c + 1) * selection.block)]
                seen = [j for j in seen if j < k.shape[2] and (not selection.causal or j <= i + selection.offset)]
                seen = [j for j in seen if key_mask is None or key_mask[b, j]]
                if not seen:
                    rows.append((outs[b, h, i] + 0 * q[b, h, i].sum(), sums[b, h, i]))
                    continue
                scores = k[b, head, seen] @ q[b, h, i] / math.sqrt(q.shape[-1])
                rows.append((scores.softmax(0) @ v[b, head, seen], scores.logsumexp(0)))
    if not rows:
        return outs + 0 * q.sum(), sums
    return torch.stack([r[0] for r in rows]).view_as(outs), torch.stack([r[1] for r in rows]).view_as(sums)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_the_loops(shape, causal):
    q, k, v, selection = make(shape, causal=causal)
    wanted, wanted_lse = by_loops(q, k, v, selection)
    out, lse = attend_selected(q, k, v, selection, return_lse=True)
    close(out, wanted)
    close(lse, wanted_lse)
    d_out = torch.randn(out.shape, dtype=out.dtype)
    d_lse = torch.randn(lse.shape, dtype=out.dtype)

    def loss(out, lse):
        return (out * d_out).sum() + (lse.where(lse > -math.inf, 0) * d_lse).sum()

    expected = torch.autograd.grad(loss(wanted, wanted_lse), [q, k, v], allow_unused=True)
    actual = torch.autograd.grad(loss(out, lse), [q, k, v])
    for a, e in zip(actual, expected, strict=True):
        close(a, torch.zeros_like(a) if e is None else e)


def gradients(out, lse, inputs):
    """Of a fixed random weighting of output and log-sum-exp."""
    g = torch.Generator().manual_seed(5)
    d_out, d_lse = (torch.randn(x.shape, dtype=x.dtype, generator=g) for x in (out, lse))
    loss = (out * d_out).sum() + (lse.where(lse > -math.inf, 0) * d_lse).sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def same_as_loops(q, k, v, selection, key_mask=None):
    wanted = by_loops(q, k, v, selection, key_mask)
    actual = attend_selected(q, k, v, selection, key_mask=key_mask, return_lse=True)
    for a, e in zip(actual, wanted, strict=True):
        close(a, e)
    for a, e in zip(gradients(*actual, [q, k, v]), gradients(*wanted, [q, k, v]), strict=True):
        close(a, e)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_seen_by_nobody(shape, causal):
    q, k, v, selection = make(shape, causal=causal)
    key_mask = torch.rand(k.shape[0], k.shape[2]) > 0.4
    key_mask[0, : k.shape[2] // 2] = False
    same_as_loops(q, k, v, selection, key_mask)


@pytest.mark.parametrize("piece, parts, rows", [(1, 1, 2), (40, 200, 3), (1 << 18, 1, 64)])
def test_the_same_in_small_pieces(monkeypatch, piece, parts, rows):
    from sparse_attn.selection import selected, visits

    monkeypatch.setattr(selected, "PIECE", piece)
    monkeypatch.setattr(selected, "PARTS", parts)
    monkeypatch.setattr(visits, "ROWS", rows)
    same_as_loops(*make((2, 4, 2, 13, 13, 8, 8, 4, 3), seed=1))


def test_scores_of_hundreds_do_not_overflow():
    q, k, v, selection = make(SHAPES[0])
    same_as_loops((q * 200).detach().requires_grad_(), k, v, selection)


def test_non_contiguous_and_expanded_inputs():
    q, k, v, selection = make((2, 4, 2, 13, 13, 8, 8, 4, 2))
    q = q.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    k = k.detach()[:1].expand(2, -1, -1, -1).requires_grad_()
    same_as_loops(q, k, v.detach().flip(2).requires_grad_(), selection)


def test_half_precision_is_computed_in_float32():
    q, k, v, selection = make(SHAPES[0], dtype=torch.float32)
    half = [x.detach().bfloat16() for x in (q, k, v)]
    wanted = by_loops(*[x.float() for x in half], selection)[0]
    out = attend_selected(*half, selection)
    assert out.dtype == torch.bfloat16
    close(out, wanted.bfloat16())


def test_the_mask_of_a_selection_is_what_is_seen():
    q, k, v, selection = make(SHAPES[0])
    mask = selection.to_mask().repeat_interleave(2, 1)
    scores = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(~mask, -1e300)
    dense = scores.softmax(-1) @ v.repeat_interleave(2, 1) * mask.any(-1, keepdim=True)
    close(attend_selected(q, k, v, selection), dense)


def test_sizes_that_do_not_belong_together():
    q, k, v, selection = make(SHAPES[0])
    with pytest.raises(ValueError, match=r"selection must be for \[B, Hkv, L\] and S = \[2, 2, 12, 13\]"):
        attend_selected(q[:, :, 1:], k, v, selection)
    wrong = BlockSelection(selection.blocks + 5, 4, 13)
    with pytest.raises(ValueError, match="selected blocks must be in .-1, 4., got"):
        attend_selected(q, k, v, wrong)
