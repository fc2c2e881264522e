"""Softcap, ALiBi and dropout beside every selection, against attention written out over what was chosen."""

import dataclasses

import pytest
import torch

from sparse_attn.selection import (
    DSA,
    LSH,
    NSA,
    BlockSelection,
    KMeansRouting,
    MoBA,
    ScoreOptions,
    SinkhornSorting,
    TokenSelection,
    TopKKeys,
    attend_selected,
    attend_tokens,
    dsa,
    top_k_keys,
)
from sparse_attn.selection.compressed import Geometry, attend_compressed
from sparse_attn.selection.dsa import indexer_kl
from sparse_attn.selection.kmeans import normalized
from sparse_attn.selection.scoring import dropped
from sparse_attn.selection.tiles import Pairs
from tests.sparse_attn.selection.score_oracle import best_blocks, factors, members, pairs_of, scored, written_out
from tests.sparse_attn.selection.sinkhorn_oracle import sinkhorn_written_out
from tests.tolerances import close
from tests.typecheck import unchecked

SEEDS = torch.tensor([3, 2**52 + 11])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])
OPTIONS = {
    "softcap": ScoreOptions(softcap=0.8),
    "alibi": ScoreOptions(alibi=SLOPES),
    "dropout": ScoreOptions(dropout=0.4, seeds=SEEDS),
    "all": ScoreOptions(0.8, SLOPES, 0.4, SEEDS),
}
MODULES = {
    "moba": lambda: MoBA(block=4, top_k=2),
    "top_k": lambda: TopKKeys(4),
    "dsa": lambda: DSA(6, top_k=4, heads=2, head_dim=4, key_width=16),
    "dsa warm": lambda: DSA(6, top_k=4, heads=2, head_dim=4, key_width=16, warm_up=True),
    "lsh": lambda: LSH(8, 2, num_buckets=4, rounds=3, chunk=2, shared_qk=False),
    "lsh shared": lambda: LSH(8, 4, num_buckets=4, rounds=2, chunk=2),
    "kmeans": lambda: KMeansRouting(8, 2, num_clusters=3, window=3),
    "kmeans shared": lambda: KMeansRouting(8, 4, num_clusters=3, window=3, shared_qk=True),
}
# option, (queries, keys), whether there is padding: all of it together, and each by itself once
CASES = [("all", shape, masked) for shape in ((17, 17), (5, 17), (1, 9)) for masked in (False, True)]
CASES += [(name, (5, 17), True) for name in ("softcap", "alibi", "dropout")]


def make(length, keys, kv_heads=2, *, dtype=torch.float64, d_v=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((4, length, 8), (kv_heads, keys, 8), (kv_heads, keys, d_v), (length, 6))
    q, k, v = (2 * torch.randn(2, *size, generator=g, dtype=dtype).requires_grad_() for size in sizes[:3])
    return q, k, v, torch.randn(2, *sizes[3], generator=g, dtype=dtype)


def padding(keys, masked):
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, 4:7] = mask[1, :2] = not masked
    return mask if masked else None


def same(found, expected, leaves, dtype=None):
    """Outputs, and every gradient of a fixed weighting of them."""
    close(found, expected, dtype)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).to(found)
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True, materialize_grads=True)
        for x in (found, expected)
    )
    for a, e in zip(ours, theirs, strict=True):
        close(a, e, dtype)


def seen_by(q, k, key_mask, chosen):
    """The pairs of a choice [B, H, L, S]."""
    if chosen is None:  # DSA in its warm-up
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mask = mask if key_mask is None else mask & key_mask[:, None, None]
        return mask.expand(*q.shape[:3], k.shape[2])
    mask = pairs_of(chosen, q.shape[1])
    return mask if key_mask is None else mask & key_mask[:, None, None]


@pytest.mark.parametrize(("name", "shape", "masked"), CASES)
@pytest.mark.parametrize("kind", MODULES)
def test_outputs_and_gradients_are_those_of_attention_over_the_chosen_keys(kind, name, shape, masked):
    options, module, (length, keys) = OPTIONS[name], MODULES[kind]().double().eval(), shape
    q, k, v, hidden = make(length, keys, 4 if "shared" in kind else 2)
    key_mask = padding(keys, masked)
    if kind == "dsa warm":  # its dense attention drops by torch's generator: see below
        options = dataclasses.replace(options, dropout=0.0)
    found = module(q, k, v, hidden=hidden, key_mask=key_mask, scoring=options)
    mask = seen_by(q, k, key_mask, found.chosen)
    rows, read = q, k
    if "shared" in kind:
        rows = k[:, :, keys - length :]
        read = torch.nn.functional.normalize(k, dim=-1) if kind == "lsh shared" else k
    if "kmeans" in kind:
        rows, read = normalized(rows), normalized(read)
    at = range(keys - length, keys)
    distance = (torch.tensor(at)[:, None] - torch.arange(keys)).abs()
    keep = factors(SEEDS, 4, at, [range(keys)] * length, options.dropout)
    expected = written_out(rows, read, v, mask, options, distance, keep)
    # what stands in the rows of padding is nobody's
    real = torch.ones(2, 1, length, 1) if key_mask is None else key_mask[:, None, keys - length :, None]
    same(found.out * real, expected * real, [q, k, v])


def test_the_options_change_each_result_and_plain_ones_none():
    for kind, build in MODULES.items():
        module, (q, k, v, hidden) = build().double().eval(), make(17, 17, 4 if "shared" in kind else 2)
        plain = module(q, k, v, hidden=hidden).out
        assert module(q, k, v, hidden=hidden, scoring=ScoreOptions()).out.equal(plain)
        for options in OPTIONS.values():
            assert (module(q, k, v, hidden=hidden, scoring=options).out - plain).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dsa warm", "nsa"])
def test_branches_over_a_pattern_drop_by_the_seed_of_their_sequence(kind):
    nsa = NSA(6, 4, 2, 8, compress=4, stride=2, block=4, top_n=3, initial=1, local=1, window=5)
    module = (MODULES[kind]() if kind == "dsa warm" else nsa).double().eval()
    q, k, v, hidden = (x.detach() for x in make(17, 17))
    torch.manual_seed(1)
    found = module(q, k, v, hidden=hidden, scoring=OPTIONS["dropout"]).out
    torch.manual_seed(2)
    close(module(q, k, v, hidden=hidden, scoring=OPTIONS["dropout"]).out, found)
    alone = dataclasses.replace(OPTIONS["dropout"], seeds=SEEDS[1:])
    close(module(*(x[1:] for x in (q, k, v)), hidden=hidden[1:], scoring=alone).out, found[1:])
    other = dataclasses.replace(OPTIONS["dropout"], seeds=SEEDS + 1)
    assert (module(q, k, v, hidden=hidden, scoring=other).out - found).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "shape", "masked"), CASES)
def test_compressed_keys_stand_where_their_last_key_does(name, shape, masked):
    options, (length, keys), geometry = OPTIONS[name], shape, Geometry(4, 2, 4, 3, 1, 1)
    count = (keys - 4) // 2 + 1
    q, k, v, _ = make(length, count)
    real = torch.ones(2, count, dtype=torch.bool)
    real[0, 1] = real[1, 0] = not masked
    out, blocks = attend_compressed(
        q, k, v, keys=keys, geometry=geometry, scale=8**-0.5, real=real if masked else None, options=options
    )
    at, last = range(keys - length, keys), [2 * c + 3 for c in range(count)]
    distance = torch.tensor(at)[:, None] - torch.tensor(last)
    mask = (distance >= 0) & real[:, None, None]
    keep = factors(SEEDS, 4, at, [last] * length, options.dropout, branch=1)
    same(out, written_out(q, k, v, mask.expand(2, 4, -1, -1), options, distance, keep), [q, k, v])
    scores = scored(q, k, options, distance).masked_fill(~mask, -torch.inf)
    share = scores.softmax(-1).masked_fill(~mask, 0).view(2, 2, 2, length, count).sum(2)
    assert blocks.sort(-1).values.equal(best_blocks(share, at, last, geometry).sort(-1).values)
    # nothing is dropped in the choice
    plain = dataclasses.replace(options, dropout=0.0)
    again = attend_compressed(q, k, v, keys=keys, geometry=geometry, scale=8**-0.5,
                              real=real if masked else None, options=plain)[1]  # fmt: skip
    assert again.equal(blocks)


@pytest.mark.parametrize("name", OPTIONS)
def test_nsa_has_the_options_in_each_branch(name):
    options = OPTIONS[name]
    module = NSA(6, 4, 2, 8, compress=4, stride=2, block=4, top_n=3, initial=1, local=1, window=5).double()
    with torch.no_grad():
        if options.dropout:  # the window drops by torch's generator: its gate is closed
            module.gate.weight[8:], module.gate.bias[8:] = 0, -1e9
    q, k, v, hidden = make(17, 17)
    found = module(q, k, v, hidden=hidden, scoring=options)
    ck, cv = module.compress_key(k), module.compress_value(v)
    at, last = torch.arange(17), 2 * torch.arange(7) + 3
    distance = at[:, None] - at
    chosen = pairs_of(found.chosen, 4)
    near = ((distance >= 0) & (distance < 5)).expand(2, 4, -1, -1)
    behind = (at[:, None] >= last).expand(2, 4, -1, -1)
    gates = torch.sigmoid(hidden @ module.gate.weight.T + module.gate.bias).view(2, 17, 3, 4).permute(2, 0, 3, 1)
    keep = [factors(SEEDS, 4, range(17), [keys] * 17, options.dropout, branch)
            for branch, keys in ((1, last.tolist()), (0, range(17)))]  # fmt: skip
    branches = [
        written_out(q, ck, cv, behind, options, at[:, None] - last, keep[0]),
        written_out(q, k, v, chosen, options, distance.abs(), keep[1]),
    ]
    branches.append(written_out(q, k, v, near, options, distance.abs(), torch.ones(())))
    expected = sum(gate[..., None] * branch for gate, branch in zip(gates, branches, strict=True))
    same(found.out, expected, [q, k, v, *module.parameters()])


@pytest.mark.parametrize(("name", "shape", "masked"), CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_score_of_a_mixed_key_is_as_far_away_as_what_is_mixed(name, causal, shape, masked):
    options, (length, keys), block = OPTIONS[name], shape, 3
    module = SinkhornSorting(8, 2, block=block, max_blocks=6, iterations=3, causal=causal).double().eval()
    q, k, v, _ = make(length, keys)
    key_mask = padding(keys, masked)
    found = module(q, k, v, key_mask=key_mask, scoring=options).out
    expected = sinkhorn_written_out(module, q, k, v, key_mask, options, SEEDS)
    real = torch.ones(2, 1, length, 1) if key_mask is None else key_mask[:, None, keys - length :, None]
    same(found * real, expected * real, [q, k, v, module.weight, module.bias])


@pytest.mark.parametrize("name", OPTIONS)
def test_clusters_that_take_their_members_have_the_options_too(name):
    options, length = OPTIONS[name], 13
    module = KMeansRouting(8, 2, num_clusters=3, window=4, members="top").double().eval()
    q, k, v, _ = make(length, length)
    found = module(q, k, v, scoring=options).out
    rows, read = normalized(q), normalized(k)
    at = torch.arange(length)
    keep = factors(SEEDS, 4, range(length), [range(length)] * length, options.dropout)
    inside = [members(module, x, 4) for x in (rows, read)]
    total, count = torch.zeros_like(found), torch.zeros(2, 4, length, 1, dtype=torch.float64)
    for cluster in range(3):
        mine, theirs = (x[:, :, cluster] for x in inside)
        mask = mine[..., None] & theirs[:, :, None] & (at <= at[:, None])
        total = total + written_out(rows, read, v, mask, options, (at[:, None] - at).abs(), keep)
        count += mask.any(-1, keepdim=True)
    same(found, total / count.clamp(min=1), [q, k, v])


@pytest.mark.parametrize("name", ["softcap", "alibi", "all"])
def test_the_highest_scores_are_those_with_the_bias(name):
    options = OPTIONS[name]
    q, k, _, _ = make(9, 17)
    tokens = top_k_keys(q, k, top_k=4, scoring=options).tokens
    at = torch.arange(8, 17)[:, None]
    scores = scored(q, k, options, (at - torch.arange(17)).abs()).masked_fill(torch.arange(17) > at, -torch.inf)
    assert tokens.sort(-1).values.equal(scores.topk(4, -1).indices.sort(-1).values)
    assert not tokens.equal(top_k_keys(q, k, top_k=4).tokens) or name == "softcap"


@pytest.mark.parametrize("name", ["softcap", "alibi", "all"])
@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("elements", [1, 2**22])  # each query a stretch of its own, or all in one
def test_the_indexer_learns_the_probabilities_with_the_options(name, warm_up, elements, monkeypatch):
    monkeypatch.setattr(dsa, "ELEMENTS", elements)
    options = OPTIONS[name]
    q, k, _, _ = make(6, 11)
    g = torch.Generator().manual_seed(4)
    index = [torch.randn(2, *size, generator=g).double().requires_grad_() for size in ((6, 3, 5), (11, 5), (6, 3))]
    seen = torch.ones(2, 6, 11, dtype=torch.bool).tril(5)
    selection = None
    if not warm_up:
        selection = DSA(4, top_k=4, heads=3, head_dim=5).choose(*index)
        seen = pairs_of(selection, 1)[:, 0]
    distance = (torch.arange(5, 11)[:, None] - torch.arange(11)).abs()
    scores = scored(q.detach(), k.detach(), options, distance).masked_fill(~seen[:, None], -torch.inf)
    target = scores.softmax(-1).mean(1)
    made = (torch.einsum("bljc,bsc->blsj", index[0], index[1]).relu() * index[2][:, :, None]).sum(-1)
    learned = made.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0)
    wanted = (torch.xlogy(target, target) - target * learned).sum(-1).mean()
    found = indexer_kl(q, k, *index, selection, scoring=options)
    same(found, wanted, index)


def test_dropout_is_even_and_independent_of_its_neighbours():
    seeds = torch.arange(4)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (4, 4, 128, 128)), indexing="ij")
    for rate in (0.1, 0.5):
        taken = dropped(seeds, Pairs(b, h, i, j), rate).double()
        spread = (rate * (1 - rate) / taken.numel()) ** 0.5
        assert abs(taken.mean() - rate) < 4 * spread
        for axis in range(4):  # pairs of neighbours along each axis
            size = taken.shape[axis]
            both = (taken.narrow(axis, 0, size - 1) * taken.narrow(axis, 1, size - 1)).mean()
            assert abs(both - rate * rate) < 8 * rate * spread + 4 * spread * rate
    assert not dropped(seeds, Pairs(b, h, i, j), 0.5, 1).equal(dropped(seeds, Pairs(b, h, i, j), 0.5))


def test_without_seeds_torch_draws_one_for_each_sequence():
    module, (q, k, v, _) = MoBA(block=4, top_k=2), (x[:1].expand(2, *x.shape[1:]) for x in make(17, 17))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(module(q, k, v, scoring=ScoreOptions(dropout=0.4)).out)
    assert outs[0].equal(outs[1]) and not outs[0].equal(outs[2])
    # two sequences that are alike drop otherwise
    assert not torch.allclose(outs[0][0], outs[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MODULES)
def test_half_precision(kind, dtype):
    module, shape = MODULES[kind]().eval(), (17, 17, 4 if "shared" in kind else 2)
    options = dataclasses.replace(OPTIONS["all"], dropout=0.0)
    half = [x.detach().to(dtype) for x in make(*shape, dtype=torch.float32)]
    wide = [x.float() for x in half]
    if "dsa" in kind:
        # its indexer would round, and choose otherwise
        half[3], module.warm_up = wide[3], True
        module.index = lambda *args: (torch.zeros(2, 17, 2, 4), torch.zeros(2, 17, 4), torch.zeros(2, 17, 2))
    found = module(*half[:3], hidden=half[3], scoring=options).out
    assert found.dtype == dtype
    close(found, module(*wide[:3], hidden=wide[3], scoring=options).out)


def test_large_pieces_are_cut_and_the_result_is_the_same(monkeypatch):
    from sparse_attn.selection import compressed, selected, tiles, tokens

    options, found = OPTIONS["all"], {}
    nsa = NSA(6, 4, 2, 8, compress=4, stride=2, block=4, top_n=3, initial=1, local=1, window=5).double()
    for size in (1 << 20, 64):
        for module, name in ((compressed, "PIECE"), (selected, "PIECE"), (selected, "PARTS"),
                             (tiles, "ELEMENTS"), (tokens, "ELEMENTS")):  # fmt: skip
            monkeypatch.setattr(module, name, size)
        for kind in ("moba", "top_k", "lsh", "nsa"):
            torch.manual_seed(0)
            module = nsa if kind == "nsa" else MODULES[kind]().double()
            q, k, v, hidden = make(17, 17)
            out = module(q, k, v, hidden=hidden, scoring=options).out
            found.setdefault(kind, []).append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    for pair in found.values():
        for a, e in zip(*pair, strict=True):
            close(a, e)


def test_log_sum_exp_is_of_the_scores_and_not_of_what_is_kept():
    q, k, v, _ = make(5, 17)
    tokens = torch.stack([torch.randperm(17, generator=torch.Generator().manual_seed(n))[:3] for n in range(10)])
    blocks = BlockSelection(torch.tensor([0, 3, -1]).expand(2, 2, 5, 3), 4, 17, 12)
    for attend, chosen in ((attend_tokens, TokenSelection(tokens.view(2, 1, 5, 3), 17)), (attend_selected, blocks)):
        mask = pairs_of(chosen, 4)
        distance = (torch.arange(12, 17)[:, None] - torch.arange(17)).abs()
        lse = attend(q, k, v, chosen, scoring=OPTIONS["all"], return_lse=True)[1]
        scores = scored(q, k, OPTIONS["all"], distance).masked_fill(~mask, -torch.inf)
        same(lse, scores.logsumexp(-1), [q, k])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be finite and > 0, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be finite and > 0, got inf"),
        ({"alibi": torch.ones(3)}, r"alibi must be floating slopes \[4\], got torch.float32 \[3\]"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": 0.1, "seeds": torch.zeros(3, dtype=torch.int64)}, r"seeds must be int64 \[2\], got torch.int64"),
        ({"dropout": 0.1, "seeds": torch.zeros(2)}, r"seeds must be int64 \[2\], got torch.float32 \[2\]"),
    ],
)
@pytest.mark.parametrize("kind", [*MODULES, "sinkhorn"])
def test_bad_options_are_named(kind, options, message):
    module = SinkhornSorting(8, 2, block=3).double() if kind == "sinkhorn" else MODULES[kind]().double()
    q, k, v, hidden = make(9, 9, 4 if "shared" in kind else 2)
    with unchecked(), pytest.raises(ValueError, match=message):
        module(q, k, v, hidden=hidden, scoring=ScoreOptions(**options))


@pytest.mark.parametrize("kind", [*MODULES, "sinkhorn"])
def test_whole_numbers_are_refused(kind):
    module = SinkhornSorting(8, 2, block=3) if kind == "sinkhorn" else MODULES[kind]()
    q, k, v, hidden = make(9, 9, 4 if "shared" in kind else 2, dtype=torch.float32)
    with unchecked(), pytest.raises(ValueError, match="v must be floating, got torch.int64"):
        module(q, k, v.long(), hidden=hidden)
