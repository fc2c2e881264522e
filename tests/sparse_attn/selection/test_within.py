"""Top-k keys and DSA that choose among the keys of a pattern, against a choice made one pair at a time."""

import dataclasses

import pytest
import torch

from sparse_attn import documents, per_head, random_blocks, sinks, sliding_window
from sparse_attn.selection import DSA, ScoreOptions, TopKKeys, dsa, top_k, top_k_keys
from sparse_attn.selection.dsa import indexer_kl
from tests.sparse_attn.selection.score_oracle import factors, pairs_of, scored, written_out
from tests.tolerances import close
from tests.typecheck import unchecked

SEEDS = torch.tensor([3, 2**52 + 11])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0])
OPTIONS = {"plain": ScoreOptions(), "all": ScoreOptions(0.8, SLOPES, 0.4, SEEDS)}
WITHIN = {
    "window": (sliding_window(6), lambda i, j, h: i - j < 6),
    "window and sinks": (sliding_window(2) | sinks(3), lambda i, j, h: i - j < 2 or j < 3),
    "far": (~sliding_window(4), lambda i, j, h: i - j >= 4),  # the first queries see nothing
    "documents": (documents([4, 7, 6]), lambda i, j, h: (i >= 4) + (i >= 11) == (j >= 4) + (j >= 11)),
    "heads": (
        per_head(sliding_window(3), sinks(2), ~sliding_window(4), sliding_window(17)),
        lambda i, j, h: (i - j < 3, j < 2, i - j >= 4, True)[h],
    ),
}
SHAPES = [(17, 17), (5, 17), (1, 9), (0, 3)]
CASES = [(name, shape, shape == (5, 17)) for name in WITHIN for shape in SHAPES]
SHARED = [case for case in CASES if case[0] != "heads"]


def make(length, keys):
    g = torch.Generator().manual_seed(0)
    sizes = ((4, length, 8), (2, keys, 8), (2, keys, 6), (length, 6))
    q, k, v, hidden = (2 * torch.randn(2, *size, generator=g, dtype=torch.float64) for size in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), hidden


def index_of(length, keys):
    g = torch.Generator().manual_seed(4)
    sizes = ((length, 3, 5), (keys, 5), (length, 3))
    return [torch.randn(2, *size, generator=g, dtype=torch.float64).requires_grad_() for size in sizes]


def padding(keys, masked):
    mask = torch.ones(2, keys, dtype=torch.bool)
    mask[0, 4:7] = mask[1, :2] = not masked
    return mask if masked else None


def shown(rule, heads, length, keys, key_mask):
    """[B, heads, L, S]: real keys up to the query that the rule shows."""
    mask = torch.zeros(2, heads, length, keys, dtype=torch.bool)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        at = i + keys - length
        mask[b, h, i, j] = j <= at and rule(at, j, h) and (key_mask is None or bool(key_mask[b, j]))
    return mask


def best(scores, seen, count):
    """The pairs of highest score of each query among the seen."""
    mask = torch.zeros_like(seen)
    for place in torch.cartesian_prod(*map(torch.arange, seen.shape[:-1])).tolist():
        row = scores[tuple(place)].tolist()
        among = [j for j, there in enumerate(seen[tuple(place)].tolist()) if there]
        mask[tuple(place)][sorted(among, key=lambda j: -row[j])[:count]] = True
    return mask


def same(found, expected, leaves):
    close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((x * weight).sum(), leaves, materialize_grads=True, allow_unused=True, retain_graph=True)
        for x in (found, expected)
    )
    for a, e in zip(ours, theirs, strict=True):
        close(a, e)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("kind", "shape", "masked"), CASES)
def test_top_k_keys_are_the_best_of_those_that_the_pattern_shows(kind, shape, masked, name):
    (within, rule), (length, keys), options = WITHIN[kind], shape, OPTIONS[name]
    q, k, v, _ = make(length, keys)
    key_mask, at = padding(keys, masked), range(keys - length, keys)
    distance = (torch.tensor(at, dtype=torch.long)[:, None] - torch.arange(keys)).abs()
    mask = best(scored(q, k, options, distance), shown(rule, 4, length, keys, key_mask), 4)
    found = TopKKeys(4, within=within)(q, k, v, key_mask=key_mask, scoring=options)
    assert pairs_of(found.chosen, 4).equal(mask)
    keep = factors(SEEDS, 4, at, [range(keys)] * length, options.dropout) if length else torch.ones(())
    real = torch.ones(2, 1, length, 1) if key_mask is None else key_mask[:, None, keys - length :, None]
    expected = written_out(q, k, v, mask, options, distance, keep)
    same(found.out * real, expected * real, [q, k, v])
    blind = ~mask.any(-1)
    assert (found.out[blind] == 0).all() and (kind != "far" or shape != (17, 17) or blind.any())


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize(("kind", "shape", "masked"), SHARED)
def test_dsa_attends_and_learns_within_the_pattern(kind, shape, masked, warm_up):
    (within, rule), (length, keys) = WITHIN[kind], shape
    q, k, v, hidden = make(length, keys)
    key_mask, index = padding(keys, masked), index_of(length, keys)
    module = DSA(6, top_k=4, heads=3, head_dim=5, key_width=16, warm_up=warm_up, within=within).double()
    module.index = lambda *args: index
    options = dataclasses.replace(OPTIONS["all"], dropout=0.0)
    found = module(q, k, v, hidden=hidden, key_mask=key_mask, scoring=options)
    made = (torch.einsum("bljc,bsc->blsj", index[0], index[1]).relu() * index[2][:, :, None]).sum(-1)
    seen = shown(rule, 1, length, keys, key_mask)
    # of equal index scores the later token wins
    mask = seen if warm_up else best(made[:, None].flip(-1), seen.flip(-1), 4).flip(-1)
    if not warm_up:
        assert pairs_of(found.chosen, 1).equal(mask)
    distance = (torch.arange(keys - length, keys)[:, None] - torch.arange(keys)).abs()
    real = torch.ones(2, length) if key_mask is None else key_mask[:, keys - length :].double()
    expected = written_out(q, k, v, mask.expand(2, 4, -1, -1), options, distance, torch.ones(()))
    same(found.out * real[:, None, :, None], expected * real[:, None, :, None], [q, k, v])
    scores = scored(q.detach(), k.detach(), options, distance).masked_fill(~mask, -1e300)
    target = (scores.softmax(-1) * mask).mean(1)
    learned = made.masked_fill(~mask[:, 0], -1e300).log_softmax(-1).masked_fill(~mask[:, 0], 0)
    each = (torch.xlogy(target, target) - target * learned).sum(-1) * real
    same(found.losses["indexer_kl"], each.sum() / real.sum().clamp(min=1), index)


def test_pieces_choose_alike(monkeypatch):
    q, k, _, _ = make(17, 17)
    index = index_of(17, 17)
    for kind in ("window and sinks", "far"):
        within = WITHIN[kind][0]
        found = []
        for size in (1 << 22, 40):
            monkeypatch.setattr(top_k, "SCORES", size)
            monkeypatch.setattr(dsa, "ELEMENTS", size)
            module = DSA(6, top_k=4, heads=3, head_dim=5, within=within)
            loss = indexer_kl(q, k, *index, None, within=within)
            found.append((top_k_keys(q, k, top_k=4, within=within).tokens, module.choose(*index).tokens, loss))
        assert found[0][0].equal(found[1][0]) and found[0][1].equal(found[1][1])
        close(found[1][2], found[0][2])


def test_blocks_at_random_bound_a_choice_too():
    q, k, v, _ = make(17, 17)
    within, at = random_blocks(1, 3, 5), torch.arange(17)
    mask = pairs_of(TopKKeys(2, within=within)(q, k, v).chosen, 4)
    assert mask.any() and not (mask & ~within.visible(at[:, None], at)).any()
    close(TopKKeys(17, within=sliding_window(17))(q, k, v).out, TopKKeys(17)(q, k, v).out)


def test_what_is_refused():
    q, k, _, _ = make(5, 5)
    with pytest.raises(ValueError, match="within must be one pattern, since all heads share the choice, got per_head"):
        DSA(6, top_k=2, within=WITHIN["heads"][0])
    with pytest.raises(ValueError, match="within must hold a pattern for each of 4 query heads, got 2"):
        top_k_keys(q, k, top_k=2, within=per_head(sinks(1), sinks(2)))
    with unchecked(), pytest.raises(ValueError, match="within must be None or a Pattern, got 'causal"):
        TopKKeys(2, within="causal()")
