import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sparse_attn.selection.kmeans import KMeansRouting
from sparse_attn.selection.lsh import LSH
from tests.tolerances import close


def make(heads=2, kv_heads=2, length=14, keys=None, d=4, *, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    sizes = ((heads, length), (kv_heads, keys or length), (kv_heads, keys or length))
    return [torch.randn(2, *size, d, generator=g, dtype=dtype).requires_grad_() for size in sizes]


def normal(x):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def nearest(x, centroids):
    """The cluster of one normalised vector, by the definition."""
    return int((centroids.double() @ x.detach().double()).argmax())


def one_row(q, keys, values):
    scores = torch.stack(keys) @ q / math.sqrt(q.shape[0])
    return scores.softmax(0) @ torch.stack(values)


def by_loops_nearest(module, q, k, v):
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            keys = [normal(x) for x in k[b, head]]
            queries = keys[k.shape[2] - q.shape[2] :] if module.shared_qk else [normal(x) for x in q[b, h]]
            clusters = [nearest(x, module.centroids[head]) for x in keys]
            for i, query in enumerate(queries):
                at = i + k.shape[2] - q.shape[2]
                fellows = [j for j in range(at + 1) if clusters[j] == nearest(query, module.centroids[head])]
                whole = max(len(fellows) - 1, 0) // module.window
                seen = fellows[max(whole - 1, 0) * module.window :] or [at]
                rows.append(one_row(query, [keys[j] for j in seen], [v[b, head, j] for j in seen]))
    return torch.stack(rows).view(*q.shape[:3], -1)


def by_loops_top(module, q, k, v):
    out = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = h // (q.shape[1] // k.shape[1])
            keys = [normal(x) for x in k[b, head]]
            queries = keys if module.shared_qk else [normal(x) for x in q[b, h]]
            found = [[] for _ in queries]
            for centroid in module.centroids[head].double():
                mine, theirs = (
                    sorted(range(len(rows)), key=lambda i: -float(rows[i].detach() @ centroid))[: module.window]
                    for rows in (queries, keys)
                )
                for i in mine:
                    seen = sorted(j for j in theirs if j <= i)
                    if seen:
                        found[i].append(one_row(queries[i], [keys[j] for j in seen], [v[b, head, j] for j in seen]))
            out += [torch.stack(x).mean(0) if x else 0 * v[b, head, 0] for x in found]
    return torch.stack(out).view(*q.shape[:3], -1)


def grads(out, inputs):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    found = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("members", ["nearest", "top"])
@pytest.mark.parametrize(("heads", "kv_heads", "shared"), [(2, 2, False), (4, 2, False), (2, 2, True)])
def test_outputs_and_gradients_are_those_of_the_loops(members, heads, kv_heads, shared):
    q, k, v = make(heads, kv_heads)
    module = KMeansRouting(4, kv_heads, num_clusters=3, window=3, members=members, shared_qk=shared)
    wanted = (by_loops_top if members == "top" else by_loops_nearest)(module, q, k, v)
    out = module(q, k, v).out
    close(out, wanted)
    for a, e in zip(grads(out, [q, k, v]), grads(wanted, [q, k, v]), strict=True):
        close(a, e)


@pytest.mark.parametrize(("length", "keys"), [(1, 14), (5, 14), (1, 1)])
def test_decoding_repeats_the_whole_forward(length, keys):
    q, k, v = make(length=keys)
    module = KMeansRouting(4, 2, num_clusters=3, window=2)
    whole = module(q, k, v).out
    close(module(q[:, :, -length:], k, v).out, whole[:, :, -length:])
    close(by_loops_nearest(module, q[:, :, -length:], k, v), whole[:, :, -length:])


@given(st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_no_later_token_changes_an_output(cut, window, shared, seed):
    q, k, v = make(length=13, seed=seed)
    module = KMeansRouting(4, 2, num_clusters=3, window=window, shared_qk=shared)
    later = [x.detach().clone() for x in (q, k, v)]
    for x in later:
        x[:, :, cut:] = torch.randn_like(x[:, :, cut:])
    close(module(*later).out[:, :, :cut], module(q, k, v).out[:, :, :cut])


def test_top_members_see_no_value_of_the_future_though_the_choice_depends_on_it():
    q, k, v = make()
    module = KMeansRouting(4, 2, num_clusters=2, window=5, members="top")
    later = v.detach().clone()
    later[:, :, 8:] = 1e3
    close(module(q, k, later).out[:, :, :8], module(q, k, v).out[:, :, :8])
    other = k.detach().clone()
    other[:, :, 8:] = torch.randn_like(other[:, :, 8:])
    assert not torch.allclose(module(q, other, v).out[:, :, :8], module(q, k, v).out[:, :, :8])


@pytest.mark.parametrize("members", ["nearest", "top"])
def test_padded_tokens_are_as_if_they_were_not_there(members):
    q, k, v = make()
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, :5] = False
    module = KMeansRouting(4, 2, num_clusters=3, window=3, members=members).train()
    selected = module(q, k, v, key_mask=mask)
    alone = [module(*(x[row : row + 1, :, start:] for x in (q, k, v))) for row, start in ((0, 0), (1, 5))]
    close(selected.out[:1], alone[0].out)
    close(selected.out[1:, :, 5:], alone[1].out)
    losses = [x.losses["kmeans_commitment"] for x in (selected, *alone)]
    close(losses[0], (14 * losses[1] + 9 * losses[2]) / 23)


def test_commitment_draws_to_the_centroid_of_its_cluster():
    q, k, v = make(4, 2)
    module = KMeansRouting(4, 2, num_clusters=3, window=3)
    wanted = 0
    for x, groups in ((q, 2), (k, 1)):
        rows = [(normal(row), h // groups) for b in range(2) for h in range(x.shape[1]) for row in x[b, h]]
        each = [(r - module.centroids[h, nearest(r, module.centroids[h])]).square().mean() for r, h in rows]
        wanted = wanted + torch.stack(each).mean()
    loss = module(q, k, v).losses["kmeans_commitment"]
    close(loss, wanted, torch.float32)
    for a, e in zip(torch.autograd.grad(loss, [q, k]), torch.autograd.grad(wanted, [q, k]), strict=True):
        close(a, e, torch.float32)
    assert module.eval()(q, k, v).losses == {}


def test_centroids_move_after_the_step_by_the_average_of_their_members():
    q, k, v = make(4, 2)
    module = KMeansRouting(4, 2, num_clusters=3, window=3, decay=0.9)
    before, mass = module.centroids.clone(), module.mass.clone()
    module(q, k, v)
    close(module.centroids, before)
    module.eval()(q, k, v)
    module.after_step()
    for h in range(2):
        members = [[] for _ in range(3)]
        for b in range(2):
            for row in [normal(x) for g in range(2) for x in q[b, 2 * h + g]] + [normal(x) for x in k[b, h]]:
                members[nearest(row, before[h])].append(row.detach().float())
        for c in range(3):
            total = 0.9 * mass[h, c] + 0.1 * len(members[c])
            close(module.mass[h, c], total)
            if members[c]:
                close(module.centroids[h, c], (0.9 * mass[h, c] * before[h, c] + 0.1 * sum(members[c])) / total)
            else:
                close(module.centroids[h, c], before[h, c])
    moved = module.centroids.clone()
    module.after_step()
    close(module.centroids, moved)


def test_a_cluster_of_one_vector_moves():
    module = KMeansRouting(4, 1, num_clusters=2, window=3, decay=0.9)
    one = torch.tensor([1.0, -1, 1, -1])
    module.centroids.copy_(0.5 * torch.stack([one, -one]))
    module.mass.fill_(1)
    q, k = one.view(1, 1, 1, 4), -one.view(1, 1, 1, 4)
    module(q, k, k)
    module.after_step()
    # 0.9 · 0.5 + 0.1 · 1 of the vector, of mass 1
    close(module.centroids, 0.55 * torch.stack([one, -one])[None])


def test_recomputation_counts_for_nothing():
    q, k, v = make()
    plain, again = (KMeansRouting(4, 2, num_clusters=3, window=3) for _ in range(2))
    plain(q, k, v).out.sum().backward()
    out = checkpoint(lambda *x: again(*x).out, q, k, v, use_reentrant=False)
    out.sum().backward()
    for a, e in zip(again.pending(), plain.pending(), strict=True):
        close(a, e)


def test_an_empty_cluster_keeps_its_centroid_for_ever():
    module = KMeansRouting(4, 1, num_clusters=2, window=3, decay=0.0)
    module.centroids.copy_(torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 0]]))
    k = torch.tensor([1.0, -1, 1, -1]).expand(1, 1, 6, 4)
    for _ in range(3):
        module(k, k, k)
        module.after_step()
    close(module.centroids[0, 1], torch.zeros(4))
    assert module.centroids.isfinite().all()


def test_state_is_saved_and_stays_float32():
    q, k, v = make(dtype=torch.float32)
    module, other = KMeansRouting(4, 2, num_clusters=3), KMeansRouting(4, 2, num_clusters=3, seed=5)
    module(q, k, v)
    module.after_step()
    other.load_state_dict(module.state_dict())
    close(other.centroids, module.centroids)
    close(other.mass, module.mass)
    half = module.bfloat16()
    assert half.centroids.dtype == half.mass.dtype == torch.float32
    assert half(q.bfloat16(), k.bfloat16(), v.bfloat16()).out.dtype == torch.bfloat16


def test_it_chooses_otherwise_than_hashing():
    q, k, v = make(length=40, dtype=torch.float32)
    routed = KMeansRouting(4, 2, num_clusters=4, window=4)(q, k, v).chosen
    hashed = LSH(4, 2, num_buckets=4, rounds=1, chunk=4, shared_qk=False)(q, k, v).chosen
    assert not torch.equal(routed.to_mask(), hashed.to_mask())


def test_bad_sizes():
    for options, message in (
        ({"num_clusters": 0}, "num_clusters must be >= 1, got 0"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"members": "all"}, "members must be one of nearest, top, got 'all'"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"seed": -(10**30)}, r"seed must be in \[-2\*\*63, 2\*\*64\), got -10{30}"),
    ):
        with pytest.raises(ValueError, match=message):
            KMeansRouting(4, 2, **options)
    q, k, v = make(4, 2)
    with pytest.raises(ValueError, match="query heads must equal the 2 key heads, got 4"):
        KMeansRouting(4, 2, shared_qk=True)(q, k, v)
    with pytest.raises(ValueError, match="query heads must be a multiple of the 2 key heads, got 3"):
        KMeansRouting(4, 2)(q[:, :3], k, v)
    with pytest.raises(ValueError, match="k must have 2 heads of 6, got 2 of 4"):
        KMeansRouting(6, 2)(q, k, v)
    with pytest.raises(ValueError, match="q must be as long as k=14, since members='top' .* cannot decode; got 1"):
        KMeansRouting(4, 2, members="top")(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match="q must not be longer than k=3, got 14"):
        KMeansRouting(4, 2)(q, k[:, :, :3], v[:, :, :3])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_buffers_are_float32_whatever_the_default_type(default):
    plain = KMeansRouting(4, 2, num_clusters=3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        module = KMeansRouting(4, 2, num_clusters=3)
    finally:
        torch.set_default_dtype(before)
    assert module.centroids.equal(plain.centroids) and module.centroids.dtype == torch.float32
    assert module.mass.equal(plain.mass) and module.mass.dtype == torch.float32
    q, k, v = make(dtype=torch.float32)
    close(module(q, k, v).out, plain(q, k, v).out)
