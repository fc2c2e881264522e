import math

import pytest
import torch

from sparse_attn.selection import NSA
from sparse_attn.selection.compressed import Geometry, attend_compressed
from tests.tolerances import close
from tests.typecheck import unchecked

SMALL = {"compress": 4, "stride": 2, "block": 4, "top_n": 3, "initial": 1, "local": 1, "window": 5}
SHAPES = [(2, 4, 2, 21), (1, 2, 2, 3), (1, 2, 1, 0), (1, 3, 1, 18)]


def softmax_over(query, keys, values):
    """Attention of one query over lists; zeros over none."""
    if not keys:
        return 0 * query
    weights = (torch.stack(keys) @ query / math.sqrt(len(query))).softmax(0)
    return weights @ torch.stack(values)


def phi(module, rows):
    """One stretch, row by row."""
    hidden = module.into.bias.clone()
    for i, row in enumerate(rows):
        columns = module.into.weight[:, i * len(row) : (i + 1) * len(row)]
        hidden = hidden + columns @ (row + module.position[i])
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return module.out.weight @ hidden + (0 if module.out.bias is None else module.out.bias)


def paper_scores(p, blocks, block, compress, stride):
    """Eq. 9 with indices that count from one."""
    scores = []
    for j in range(1, blocks + 1):
        total = 0.0
        for m in range(block // stride):
            for n in range(compress // stride):
                index = block // stride * j - m - n
                total += p[index - 1] if 1 <= index <= len(p) else 0.0
        scores.append(total)
    return scores


def by_loops(module, q, k, v, hidden, sizes, key_mask=None):
    """Outputs, and for each key head and query the set of chosen blocks."""
    batch, heads, length, width = q.shape
    keys, groups, offset = k.shape[2], heads // k.shape[1], k.shape[2] - length
    compress, stride, block = sizes["compress"], sizes["stride"], sizes["block"]
    out, chosen = torch.zeros(batch, heads, length, width, dtype=q.dtype), {}
    rows = [[[None] * length for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        real = [True] * keys if key_mask is None else key_mask[b].tolist()
        for g in range(k.shape[1]):
            starts = range(0, keys - compress + 1, stride)
            ck = [phi(module.compress_key, k[b, g, s : s + compress]) for s in starts]
            cv = [phi(module.compress_value, v[b, g, s : s + compress]) for s in starts]
            for i in range(length):
                at = i + offset
                seen = [c for c, s in enumerate(starts) if s + compress - 1 <= at and all(real[s : s + compress])]
                own = at // block
                scores = [0.0] * (own + 1)
                for h in range(g * groups, (g + 1) * groups):
                    weights = [float((q[b, h, i] @ ck[c]).detach()) / math.sqrt(width) for c in seen]
                    p = torch.tensor(weights, dtype=torch.float64).softmax(0).tolist()
                    for j, score in enumerate(paper_scores(p, own + 1, block, compress, stride)):
                        scores[j] += score
                forced = [j for j in range(own + 1) if j < sizes["initial"] or j > own - sizes["local"]]
                rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: -scores[j])
                chosen[b, g, i] = {*forced, *rest[: sizes["top_n"] - len(forced)]}
                near = [j for j in range(at + 1) if j // block in chosen[b, g, i] and real[j]]
                window = [j for j in range(max(0, at - sizes["window"] + 1), at + 1) if real[j]]
                gates = torch.sigmoid(module.gate.weight @ hidden[b, i] + module.gate.bias)
                for h in range(g * groups, (g + 1) * groups):
                    query = q[b, h, i]
                    rows[b][h][i] = (
                        gates[h] * softmax_over(query, [ck[c] for c in seen], [cv[c] for c in seen])
                        + gates[heads + h] * softmax_over(query, [k[b, g, j] for j in near], [v[b, g, j] for j in near])
                        + gates[2 * heads + h]
                        * softmax_over(query, [k[b, g, j] for j in window], [v[b, g, j] for j in window])
                    )
    if length:
        out = torch.stack([torch.stack([torch.stack(head) for head in sequence]) for sequence in rows])
    return out, chosen


def make(shape, *, more=0, dtype=torch.float64, **changed):
    batch, heads, kv_heads, length = shape
    torch.manual_seed(length)
    module = NSA(6, heads, kv_heads, 4, mlp_hidden=5, **{**SMALL, **changed}).to(dtype)
    tensors = [
        torch.randn(batch, n, size, 4, dtype=dtype, requires_grad=True)
        for n, size in ((heads, length), (kv_heads, length + more), (kv_heads, length + more))
    ]
    return module, *tensors, torch.randn(batch, length, 6, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("shape, more", [*((shape, 0) for shape in SHAPES), ((1, 2, 1, 3), 14)])
def test_outputs_choice_and_all_gradients_are_those_of_the_loops(shape, more):
    module, q, k, v, hidden = make(shape, more=more)
    wanted, chosen = by_loops(module, q, k, v, hidden, SMALL)
    selected = module(q, k, v, hidden=hidden)
    close(selected.out, wanted)
    for place, blocks in chosen.items():
        assert set(selected.chosen.blocks[place].tolist()) - {-1} == blocks
    if not shape[3]:
        return
    inputs = [q, k, v, hidden, *module.parameters()]
    d_out = torch.randn_like(wanted)
    expected = torch.autograd.grad((wanted * d_out).sum(), inputs, materialize_grads=True)
    actual = torch.autograd.grad((selected.out * d_out).sum(), inputs, materialize_grads=True)
    for a, e in zip(actual, expected, strict=True):
        close(a, e)


def test_padding_leaves_every_branch_and_every_compressed_key_that_stands_for_it():
    everything = {**SMALL, "top_n": 6}  # no choice, so no ties between blocks of padding
    module, q, k, v, hidden = make((2, 4, 2, 21), **everything)
    key_mask = torch.ones(2, 21, dtype=torch.bool)
    key_mask[0, :5] = key_mask[1, 18:] = False
    wanted, _ = by_loops(module, q, k, v, hidden, everything, key_mask)
    out = module(q, k, v, hidden=hidden, key_mask=key_mask).out
    # what a padded query gives is nobody's business
    close(out.transpose(1, 2)[key_mask], wanted.transpose(1, 2)[key_mask])


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_a_padded_batch_shorter_than_a_compressed_key(length):
    sizes = {**SMALL, "compress": 8, "stride": 4, "block": 8}
    module, q, k, v, hidden = make((2, 4, 2, length), **sizes)
    key_mask = torch.ones(2, length, dtype=torch.bool)
    key_mask[0, :1] = key_mask[1, 4:] = False
    wanted, _ = by_loops(module, q, k, v, hidden, sizes, key_mask)
    out = module(q, k, v, hidden=hidden, key_mask=key_mask).out
    actual, expected = (x.transpose(1, 2)[key_mask] for x in (out, wanted))
    close(actual, expected)
    if not length:
        return
    inputs = [q, k, v, hidden, *module.parameters()]
    d_out = torch.randn_like(expected)
    both = [torch.autograd.grad((x * d_out).sum(), inputs, materialize_grads=True) for x in (actual, expected)]
    for a, e in zip(*both, strict=True):
        close(a, e)


def test_compress_trains_through_its_output_and_the_choice_has_no_gradient():
    module, q, k, v, hidden = make((1, 2, 1, 21))
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias[:2] = -1e9  # nothing of the compressed branch in the output
    module(q, k, v, hidden=hidden).out.sum().backward()
    assert not module.compress_key.into.weight.grad.any() and k.grad.any()


def test_the_overlap_is_equation_9():
    geometry = Geometry(compress=6, stride=2, block=8, top_n=3)
    p = torch.rand(geometry.compressed(29), dtype=torch.float64)
    scores = p @ geometry.overlap(29, p)
    close(scores, torch.tensor(paper_scores(p.tolist(), 4, 8, 6, 2), dtype=torch.float64))


def test_the_same_in_small_stretches(monkeypatch):
    from sparse_attn.selection import compressed

    module, q, k, v, hidden = make((2, 4, 2, 21))
    wanted = module(q, k, v, hidden=hidden)
    monkeypatch.setattr(compressed, "PIECE", 200)
    again = module(q, k, v, hidden=hidden)
    close(again.out, wanted.out)
    for a, e in zip(*(torch.autograd.grad(x.out.square().sum(), [q, k, v]) for x in (again, wanted)), strict=True):
        close(a, e)


def test_the_last_queries_alone_are_the_last_rows_of_the_whole():
    module, q, k, v, hidden = make((2, 4, 2, 21))
    whole = module(q, k, v, hidden=hidden).out
    for count in (1, 6):
        close(module(q[:, :, -count:], k, v, hidden=hidden[:, -count:]).out, whole[:, :, -count:])


def test_the_future_is_not_seen():
    module, q, k, v, hidden = make((1, 2, 1, 21))
    later = [torch.where(torch.arange(21)[:, None] > 11, 50.0, x) for x in (k, v)]
    close(module(q, *later, hidden=hidden).out[:, :, :12], module(q, k, v, hidden=hidden).out[:, :, :12])


def test_padding_is_not_read():
    module, q, k, v, hidden = make((2, 4, 2, 21))
    key_mask = torch.ones(2, 21, dtype=torch.bool)
    key_mask[0, :6] = False
    key_mask[1, 17:] = False
    wanted = module(q, k, v, hidden=hidden, key_mask=key_mask).out
    other = [torch.where(key_mask[:, None, :, None], x, 9.0) for x in (k, v)]
    close(module(q, *other, hidden=hidden, key_mask=key_mask).out, wanted)
    assert wanted.isfinite().all()
    # padding behind the sequence changes nothing before it
    close(wanted[1, :, :17], module(q, k, v, hidden=hidden).out[1, :, :17])


def test_half_precision():
    module, q, k, v, hidden = make((1, 4, 2, 21), dtype=torch.float32)
    wanted = module(q, k, v, hidden=hidden).out
    with torch.autocast("cpu", torch.bfloat16):
        half = module(*(x.bfloat16() for x in (q, k, v)), hidden=hidden)
    assert half.out.dtype == torch.bfloat16 and half.out.isfinite().all()
    # rounding may choose another block for a query or two: the bulk agrees
    assert (half.out.float() - wanted).abs().median() < 0.02


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"compress": 0}, "compress must be >= 1, got 0"),
        ({"stride": 3}, "stride must divide compress=4, got 3"),
        ({"block": 2}, "compress must be <= block=2, got 4"),
        ({"top_n": 1}, "top_n must be >= initial \\+ local = 2, got 1"),
        ({"initial": -1}, "initial must be >= 0, got -1"),
        ({"window": 0}, "window must be >= 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        make((1, 2, 1, 4), **changed)


def test_bad_input():
    module, q, k, v, hidden = make((1, 2, 1, 4))
    with pytest.raises(ValueError, match="hidden must be given: the gates of NSA read it, got None"):
        module(q, k, v)
    with pytest.raises(ValueError, match=r"query and key heads must be \[2, 1\], got \[1, 1\]"):
        module(q[:, :1], k, v, hidden=hidden)
    with unchecked(), pytest.raises(ValueError, match="q must not be longer than k=3, got 4"):
        module(q, k[:, :, 1:], v[:, :, 1:], hidden=hidden)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads=3, got 2"):
        NSA(4, 3, 2, 4)


def test_a_query_before_the_first_compressed_key_gets_zeros():
    q, k = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 1, 4)
    out, _ = attend_compressed(q, k, k, keys=5, geometry=Geometry(4, 2, 4, 3), scale=1.0)
    assert not out[:, :, :3].any() and out[:, :, 3:].any(-1).all()
