"""Sinkhorn sorting written out: the balancing entry by entry, the attention one query at a time."""

import torch

from tests.sparse_attn.selection.score_oracle import factors


def balance_by_loops(logits, iterations, causal):
    """Entry by entry, in numbers and not logarithms."""
    size = logits.shape[0]
    found = {(r, c): logits[r, c].exp() for r in range(size) for c in range(r if causal else size)}
    for turn in range(iterations + 1):
        if turn:
            last = dict(found)
            for r, c in last:
                total = sum(last[a, c] for a in range(r + 1 if causal else size) if (a, c) in last)
                found[r, c] = last[r, c] / (total.clamp(min=1) if causal else total)
        last = dict(found)
        for r, c in last:
            found[r, c] = last[r, c] / sum(last[r, b] for b in range(size) if (r, b) in last)
    zero = 0 * logits.sum()
    return torch.stack([torch.stack([found.get((r, c), zero) for c in range(size)]) for r in range(size)])


def places_by_loops(module, keys, head):
    """P [place, block] from the keys [N, d] of a key head; zeros where there are none."""
    sums = [part.sum(0) for part in keys.split(module.block)]
    logits = [
        torch.stack([s @ module.weight[head, :, r] + module.bias[head, r] for s in sums]) for r in range(len(sums))
    ]
    return balance_by_loops(torch.stack(logits) / module.temperature, module.iterations, module.causal)


def sinkhorn_written_out(module, q, k, v, key_mask, options, seeds):
    """One query at a time: scores of its mixed and own keys, with a list of distances."""
    (batch, heads, length, _), keys, n = q.shape, k.shape[2], module.block
    count, groups = -(-keys // n), heads // k.shape[1]
    real = torch.ones(batch, keys, dtype=torch.bool) if key_mask is None else key_mask
    room = torch.nn.functional.pad(real, (0, count * n - keys))
    padded = [torch.nn.functional.pad(x * real[:, None, :, None], (0, 0, 0, count * n - keys)) for x in (k, v)]
    assert room.view(batch, count, n).any(-1).all(), "a block of padding takes no place: not written out here"
    places = {(b, kv): places_by_loops(module, padded[0][b, kv], kv) for b in range(batch) for kv in range(k.shape[1])}
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=q.dtype)
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                at = i + keys - length
                place, kv = at // n, h // groups
                score, value, column = [], [], []
                for j in range(n):
                    parts = [c for c in range(count) if room[b, c * n + j] and (c < place or not module.causal)]
                    share = sum(places[b, kv][place, c] for c in parts)
                    if not parts or share == 0:
                        continue
                    mix = [places[b, kv][place, c] / share for c in parts]
                    key, val = (sum(w * x[b, kv, c * n + j] for w, c in zip(mix, parts, strict=True)) for x in padded)
                    away = sum(w * abs(at - c * n - j) for w, c in zip(mix, parts, strict=True))
                    score.append(scored_one(q[b, h, i], key, options, h, away))
                    value.append(val)
                    column.append(-1 - j)
                for j in range(place * n, place * n + n):
                    if room[b, j] and (j <= at or not module.causal):
                        score.append(scored_one(q[b, h, i], padded[0][b, kv, j], options, h, abs(at - j)))
                        value.append(padded[1][b, kv, j])
                        column.append(j)
                if not score:
                    rows.append(out[b, h, i])
                    continue
                keep = factors(seeds[b : b + 1], heads, [at], [column], options.dropout)[0, h, 0]
                rows.append((torch.stack(score).softmax(0) * keep) @ torch.stack(value))
    return torch.stack(rows).view_as(out)


def scored_one(query, key, options, head, away):
    score = query @ key / len(query) ** 0.5
    score = score if options.softcap is None else options.softcap * torch.tanh(score / options.softcap)
    return score if options.alibi is None else score - options.alibi[head].double() * away
