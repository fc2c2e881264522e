import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn.selection import tiles
from sparse_attn.selection.buckets import Buckets, attend_buckets
from sparse_attn.selection.lsh import LSH, hash_buckets
from tests.tolerances import close

SHAPES = [
    # B, H, Hkv, L, S, d, d_v, buckets, rounds, chunk
    (2, 2, 2, 23, 23, 4, 4, 4, 3, 3),
    (1, 4, 2, 9, 17, 5, 3, 2, 2, 2),
    (1, 1, 1, 1, 11, 4, 4, 6, 1, 4),
    (1, 2, 1, 8, 8, 3, 3, 2, 4, 1),
    (1, 2, 2, 0, 5, 4, 4, 2, 1, 2),
    (2, 2, 2, 6, 6, 4, 4, 2, 2, 64),
]


def make(shape, *, dtype=torch.float64, seed=0):
    batch, heads, kv_heads, length, keys, d, d_v, *_ = shape
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, length, d), (kv_heads, keys, d), (kv_heads, keys, d_v))
    return [torch.randn(batch, *size, generator=g, dtype=dtype).requires_grad_() for size in sizes]


def visible_by_loops(buckets, b, h, i, padded=()):
    """The keys that query i of one head sees, from the definition, round by round."""
    head, at = h // (buckets.queries.shape[1] // buckets.keys.shape[1]), i + buckets.offset
    union = set()
    for r in range(buckets.queries.shape[2]):
        mine = int(buckets.queries[b, h, r, i])
        fellows = [j for j in range(at + 1) if int(buckets.keys[b, head, r, j]) == mine]
        if fellows:
            whole = (len(fellows) - 1) // buckets.chunk
            union |= set(fellows[max(whole - 1, 0) * buckets.chunk :])
    if buckets.without_self:
        union -= {at}
    return sorted(union) or ([] if (b, at) in padded else [at])


def by_loops(q, k, v, buckets, padded=()):
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                seen = visible_by_loops(buckets, b, h, i, padded)
                scores = k[b, head, seen] @ q[b, h, i] / math.sqrt(q.shape[-1])
                rows.append(scores.softmax(0) @ v[b, head, seen])
    return torch.stack(rows).view(*q.shape[:3], -1) if rows else q.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * q.sum()


def grads(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    found = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("without_self", [False, True])
@pytest.mark.parametrize("elements", [1, 2**21])
def test_outputs_and_gradients_are_those_of_the_loops(shape, without_self, elements, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS", elements)
    batch, heads, kv_heads, length, keys, *_, count, rounds, chunk = shape
    q, k, v = make(shape)
    g = torch.Generator().manual_seed(1)
    buckets = Buckets(
        torch.randint(count, (batch, heads, rounds, length), generator=g),
        torch.randint(count, (batch, kv_heads, rounds, keys), generator=g),
        count,
        chunk,
        without_self,
    )
    (out, _), wanted = attend_buckets(q, k, v, buckets, scale=1 / math.sqrt(q.shape[-1])), by_loops(q, k, v, buckets)
    close(out, wanted)
    for a, e in zip(grads(out, [q, k, v]), grads(wanted, [q, k, v]), strict=True):
        close(a, e)


def hashed_by_loops(x, rotations):
    """The bucket of every vector, as the paper writes it."""
    found = torch.zeros(x.shape[0], x.shape[1], rotations.shape[1], x.shape[2], dtype=torch.int64)
    for b, h, r, i in torch.cartesian_prod(*[torch.arange(n) for n in found.shape]).tolist():
        turned = x[b, h, i].float() @ rotations[h // (x.shape[1] // rotations.shape[0]), r]
        found[b, h, r, i] = torch.cat([turned, -turned]).argmax()
    return found


def test_hash_is_the_argmax_of_both_signs():
    x, module = torch.randn(2, 4, 5, 3), LSH(3, 2, num_buckets=8, rounds=3)
    found = hash_buckets(x, module.rotations)
    close(found, hashed_by_loops(x, module.rotations))
    close(hash_buckets(5 * x, module.rotations), found)
    assert found.min() >= 0 and 4 <= found.max() < 8


def test_of_equal_products_the_lower_bucket_and_the_first_half_win():
    rotations = torch.tensor([[[[1.0, -1, 1, -1]]]])
    x = torch.tensor([[[[2.0], [-2], [0]]]])
    # [x R; -x R] of 2: its highest are at 0, 2, 5 and 7; of -2: at 1, 3, 4 and 6
    assert hash_buckets(x, rotations).tolist() == [[[[0, 1, 0]]]]


@pytest.mark.parametrize("shared", [True, False])
def test_module_is_hashing_then_attention_over_the_union(shared):
    q, k, v = make((2, 4, 4 if shared else 2, 19, 19, 4, 4))
    module = LSH(4, k.shape[1], num_buckets=4, rounds=3, chunk=2, shared_qk=shared)
    queries, keys = (k, k / k.norm(dim=-1, keepdim=True)) if shared else (q, k)
    buckets = Buckets(hashed_by_loops(queries, module.rotations), hashed_by_loops(keys, module.rotations), 4, 2, shared)
    selected, wanted = module(q, k, v), by_loops(queries, keys, v, buckets)
    close(selected.out, wanted)
    assert selected.losses == {}
    for a, e in zip(grads(selected.out, [q, k, v]), grads(wanted, [q, k, v]), strict=True):
        close(a, e)


@pytest.mark.parametrize("shared", [True, False])
@given(st.integers(1, 14), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_no_later_token_changes_an_output(shared, cut, rounds, chunk, seed):
    q, k, v = make((1, 2, 2, 15, 15, 3, 3), seed=seed)
    module = LSH(3, 2, num_buckets=4, rounds=rounds, chunk=chunk, shared_qk=shared)
    later = [x.detach().clone() for x in (q, k, v)]
    for x in later:
        x[:, :, cut:] = torch.randn_like(x[:, :, cut:])
    close(module(*later).out[:, :, :cut], module(q, k, v).out[:, :, :cut])


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_every_key_is_in_one_bucket_and_the_mask_is_what_is_seen(rounds, chunk, shared, seed):
    q, k, _ = make((1, 2, 2, 12, 12, 3, 3), seed=seed)
    module = LSH(3, 2, num_buckets=4, rounds=rounds, chunk=chunk, shared_qk=shared)
    chosen = module.choose(k if shared else q, k)
    one_hot = torch.nn.functional.one_hot(chosen.keys, 4)
    assert (one_hot.sum(-1) == 1).all() and one_hot.sum() == k.shape[1] * rounds * 12
    mask = chosen.to_mask()
    for h in range(2):
        for i in range(12):
            assert mask[0, h, i].nonzero().flatten().tolist() == visible_by_loops(chosen, 0, h, i)
    assert chosen.density() == pytest.approx(float(mask.double().mean()))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_decoding_repeats_the_whole_forward(shared, length):
    q, k, v = make((2, 2, 2, 20, 20, 4, 4))
    module = LSH(4, 2, num_buckets=4, rounds=2, chunk=3, shared_qk=shared)
    whole = module(q, k, v).out
    close(module(q[:, :, -length:], k, v).out, whole[:, :, -length:])
    close(module(q[:, :, :12], k[:, :, :12], v[:, :, :12]).out, whole[:, :, :12])


@pytest.mark.parametrize("shared", [True, False])
def test_padded_keys_are_as_if_they_were_not_there(shared):
    q, k, v = make((2, 2, 2, 10, 10, 4, 4))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :4] = False
    module = LSH(4, 2, num_buckets=4, rounds=2, chunk=2, shared_qk=shared)
    out = module(q, k, v, key_mask=mask).out
    close(out[:1], module(q, k, v).out[:1])
    close(out[1:, :, 4:], module(q[1:, :, 4:], k[1:, :, 4:], v[1:, :, 4:]).out)
    close(out[1, :, :4], torch.zeros(2, 4, 4, dtype=torch.float64))


def test_alone_in_its_bucket_a_query_sees_itself_only():
    q, k, v = make((1, 1, 1, 4, 4, 4, 4))
    ids = torch.arange(4).view(1, 1, 1, 4)
    close(attend_buckets(q, k, v, Buckets(ids, ids, 4, 2, True), scale=1.0)[0], v)


def test_equal_directions_share_a_bucket_where_position_and_length_do_not_matter():
    k = torch.randn(1, 1, 40, 8)
    k[:, :, 33] = 7 * k[:, :, 2]
    mask = LSH(8, 1, num_buckets=32, rounds=2, chunk=4).choose(k, k).to_mask()[0, 0]
    assert mask[33, 2]
    assert mask.sum() < 40 * 8


def test_seed_is_recorded_and_saved():
    q, k, v = make((1, 2, 2, 12, 12, 4, 4))
    first, same, other = (LSH(4, 2, num_buckets=4, chunk=2, seed=seed) for seed in (3, 3, 4))
    close(first(q, k, v).out, same(q, k, v).out)
    assert not torch.equal(first(q, k, v).out, other(q, k, v).out)
    other.load_state_dict(first.state_dict())
    close(other(q, k, v).out, first(q, k, v).out)


def test_half_precision_is_computed_in_float32():
    q, k, v = (x.detach().bfloat16() for x in make(SHAPES[0]))
    module = LSH(4, 2, num_buckets=4, rounds=2, chunk=3)
    assert module(q, k, v).out.dtype == torch.bfloat16
    close(module(q, k, v).out, module(q.float(), k.float(), v.float()).out.bfloat16())


def test_bad_sizes():
    for options, message in (
        ({"num_buckets": 3}, "num_buckets must be even and >= 2, got 3"),
        ({"rounds": 0}, "rounds must be >= 1, got 0"),
        ({"chunk": 0}, "chunk must be >= 1, got 0"),
        ({"seed": 10**30}, r"seed must be in \[-2\*\*63, 2\*\*64\), got 10{30}"),
    ):
        with pytest.raises(ValueError, match=message):
            LSH(4, 2, **options)
    for seed in (-(2**63), 2**64 - 1):
        assert LSH(4, 2, seed=seed).rotations.isfinite().all()
    q, k, v = make((1, 4, 2, 6, 6, 4, 4))
    with pytest.raises(ValueError, match="query heads must equal the 2 key heads, got 4"):
        LSH(4, 2)(q, k, v)
    with pytest.raises(ValueError, match="query heads must be a multiple of the 2 key heads, got 3"):
        LSH(4, 2, shared_qk=False)(q[:, :3], k, v)
    with pytest.raises(ValueError, match="k must have 1 heads of 4, got 2 of 4"):
        LSH(4, 1)(q, k, v)
    with pytest.raises(ValueError, match="q must not be longer than k=3, got 6"):
        LSH(4, 2, shared_qk=False)(q, k[:, :, :3], v[:, :, :3])
