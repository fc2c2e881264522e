"""Softcap, ALiBi and dropout written out, with SplitMix64 in Python's whole numbers."""

import math

import torch

from sparse_attn.selection import BlockSelection, TokenSelection

GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix(x):
    """The finaliser of SplitMix64."""
    x &= WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def factors(seeds, heads, queries, keys, rate, branch=0):
    """[B, H, L, n]: 0 or 1 / (1 - rate); queries: L positions; keys: n positions of every query."""
    out = torch.ones(len(seeds), heads, len(queries), len(keys[0]) if len(keys) else 0, dtype=torch.float64)
    if not rate:
        return out
    for b, seed in enumerate(seeds.tolist()):
        sequence = splitmix(seed + (branch + 1) * GOLDEN)
        for h in range(heads):
            head = splitmix(sequence + h * GOLDEN)
            for i, at in enumerate(queries):
                row = splitmix(head + at * GOLDEN)
                for j, key in enumerate(keys[i]):
                    drawn = splitmix(row + (key + 1) * GOLDEN)
                    signed = drawn - 2**64 if drawn >= 2**63 else drawn
                    out[b, h, i, j] = 0.0 if signed < int(rate * 2**64) - 2**63 else 1 / (1 - rate)
    return out


def scored(q, k, options, distance):
    """[B, H, L, n] of q [B, H, L, d] and k [B, Hkv, n, d]; distance: broadcasts to it."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ keys.mT / math.sqrt(q.shape[-1])
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi is not None:
        scores = scores - options.alibi.to(scores)[:, None, None] * distance
    return scores


def written_out(q, k, v, mask, options, distance, keep):
    """[B, H, L, d_v]: attention over the pairs of ``mask``, all in full; zeros where a query sees nothing."""
    scores = scored(q, k, options, distance)
    weight = (scores - scores.detach().amax(-1, keepdim=True)).exp() * mask
    probability = weight / weight.sum(-1, keepdim=True).where(mask.any(-1, keepdim=True), 1)
    return (probability * keep) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def pairs_of(chosen, heads):
    """The pairs of a choice, one at a time: bool [B, heads, L, S]."""
    if isinstance(chosen, TokenSelection):
        table, keys, seen = chosen.tokens, chosen.kv_len, lambda token, at: [token]
    elif isinstance(chosen, BlockSelection):
        table, keys, n = chosen.blocks, chosen.kv_len, chosen.block
        seen = lambda block, at: [j for j in range(block * n, min(block * n + n, keys)) if j <= at]  # noqa: E731
    else:
        return _pairs_of_buckets(chosen, heads)
    batch, lists, length, _ = table.shape
    mask = torch.zeros(batch, heads, length, keys, dtype=torch.bool)
    first = chosen.offset if isinstance(chosen, BlockSelection) else 0
    for b in range(batch):
        for h in range(heads):
            for i, row in enumerate(table[b, h // (heads // lists)].tolist()):
                for entry in row:
                    for j in seen(entry, first + i) if entry >= 0 else []:
                        mask[b, h, i, j] = True
    return mask


def _pairs_of_buckets(chosen, heads):
    batch, _, rounds, length = chosen.queries.shape
    keys, groups = chosen.keys.shape[3], heads // chosen.keys.shape[1]
    mask = torch.zeros(batch, heads, length, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                at = i + keys - length
                for r in range(rounds):
                    buckets, own = chosen.keys[b, h // groups, r].tolist(), int(chosen.queries[b, h, r, i])
                    fellows = [j for j in range(at + 1) if buckets[j] == own]
                    chunks = [fellows[n : n + chosen.chunk] for n in range(0, len(fellows), chosen.chunk)]
                    for j in [j for part in chunks[-2:] for j in part]:
                        mask[b, h, i, j] = j != at or not chosen.without_self
                if not mask[b, h, i].any() and int(chosen.keys[b, h // groups, 0, at]) >= 0:
                    mask[b, h, i, at] = True
    return mask


def best_blocks(share, at, last, geometry):
    """Key blocks [B, Hkv, L, n] of NSA, -1 where there are fewer, from the probabilities [B, Hkv, L, Nc] of compressed
    keys that end at ``last``, summed over the query heads of a key head. at: positions of the queries."""
    keys, n = at[-1] + 1, geometry.block
    found = torch.full((*share.shape[:3], min(geometry.top_n, -(-keys // n))), -1)
    for place in torch.cartesian_prod(*map(torch.arange, share.shape[:3])).tolist():
        own, score = at[place[2]] // n, {}
        for block in range(own + 1):
            covered = set(range(block * n, block * n + n))
            strides = [
                len(covered & set(range(end - geometry.compress + 1, end + 1))) // geometry.stride for end in last
            ]
            score[block] = sum(p * x for p, x in zip(share[tuple(place)].tolist(), strides, strict=True))
            if block < geometry.initial or block > own - geometry.local:
                score[block] = math.inf
        best = sorted(score, key=lambda block: -score[block])[: geometry.top_n]
        found[tuple(place)][: len(best)] = torch.tensor(best)
    return found


def members(module, x, heads):
    """Whether each of x [B, h, N, d] is among the ``window`` nearest of a cluster: bool [B, heads, C, N]."""
    centroids = module.centroids.double()
    inside = torch.zeros(len(x), heads, centroids.shape[1], x.shape[2], dtype=torch.bool)
    for b in range(len(x)):
        for h in range(heads):
            rows = x[b, h // (heads // x.shape[1])].detach()
            for c, centre in enumerate(centroids[h // (heads // len(centroids))]):
                near = sorted(range(len(rows)), key=lambda i: -float(rows[i] @ centre))
                inside[b, h, c, near[: module.window]] = True
    return inside
