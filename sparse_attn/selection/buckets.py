"""Tokens sorted into buckets: each query looks at the latest keys of its bucket, in chunks."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.backends.scoring import Scoring
from sparse_attn.checking import check_dimensions, check_least, check_shapes, check_within
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions
from sparse_attn.selection.tiles import Tiles, attend_tiles, merge_union

# a chunk that no key has
NOWHERE = -2


@dataclass(frozen=True, eq=False)
class Buckets:
    """Which bucket each query and key fell into, round by round, and what follows for who sees whom.

    queries [B, H, R, L] and keys [B, Hkv, R, S]: bucket in [0, num_buckets), for keys -1 where they are padding, which
    they are in every round or in none. Every other key is in exactly one bucket a round. The keys of a bucket, in their
    order, form chunks of ``chunk``; a query at i stands in the chunk of the last key j ≤ i of its bucket, and sees that
    chunk and the one before it, never a key behind it, in any of the rounds. Counting chunks from the start of each
    bucket, no later token can move their borders. without_self: a query does not see its own position. A query that
    then sees nothing sees itself.
    """

    queries: Int[Tensor, "B H R L"]
    keys: Int[Tensor, "B Hkv R S"]
    num_buckets: int
    chunk: int
    without_self: bool = False

    @property
    def offset(self) -> int:
        """Position of query 0, key 0 being at 0: the last query sits at the last key."""
        # sums over a slice: attend reads this before it checks that there are 4 dimensions
        return sum(self.keys.shape[3:4]) - sum(self.queries.shape[3:4])

    def to_mask(self) -> Bool[Tensor, "B H L S"]:
        """The truth for every pair, dense: for pictures and small tests. A padded key is seen by none."""
        at = torch.arange(self.queries.shape[3], device=self.keys.device)[:, None] + self.offset
        position = torch.arange(self.keys.shape[3], device=self.keys.device)
        keys = self.keys.repeat_interleave(self.queries.shape[1] // self.keys.shape[1], 1)
        member = (self.queries[..., None] == keys[..., None, :]) & (position <= at)
        rank = member.cumsum(-1) - 1
        own = (member.sum(-1, keepdim=True) - 1) // self.chunk
        mask = (member & (rank // self.chunk >= own - 1)).any(2)
        itself = (position == at) & (keys[:, :, 0] >= 0)[:, :, None]
        if self.without_self:
            mask = mask & ~itself
        return mask | (itself & ~mask.any(-1, keepdim=True))

    def check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, once: bool = True) -> None:
        """Raises: ValueError for other sizes, more queries than keys, buckets that are not there, and a masked key that
        is in a bucket. once: a key has one bucket a round, none twice."""
        check_shapes(q, k, v, key_mask)
        self._check_buckets()
        queries, keys = self.queries.shape, self.keys.shape
        wanted, got = [*q.shape[:3], *k.shape[:3]], [*queries[:2], queries[3], *keys[:2], keys[3]]
        if wanted != got:
            raise ValueError(f"buckets must be for [B, H, L] and [B, Hkv, S] = {wanted}, got {got}")
        if self.offset < 0:
            raise ValueError(f"buckets must have at most as many queries as keys, {keys[3]}, got {queries[3]}")
        if key_mask is not None and bool((self.keys >= 0).any(2).any(1)[~key_mask].any()):
            raise ValueError("key_mask must hide no key that is in a bucket: choose with the same key_mask")

    def _check_buckets(self) -> None:
        """What the tensors must be whatever they are for: a wrong bucket would lie in another head's."""
        check_least("num_buckets", self.num_buckets, 1)
        check_least("chunk", self.chunk, 1)
        for name, buckets, least in (("queries", self.queries, 0), ("keys", self.keys, -1)):
            check_dimensions(f"buckets of {name}", buckets)
            check_within(f"buckets of {name}", buckets, least, self.num_buckets)
        rounds = self.keys.shape[2]
        if self.queries.shape[2] != rounds:
            raise ValueError(f"queries must have as many rounds as keys, {rounds}, got {self.queries.shape[2]}")
        check_least("rounds of buckets", rounds, 1)
        mixed = ((self.keys < 0) != (self.keys[:, :, :1] < 0)).any(2)
        if bool(mixed.any()):
            row, head, key = mixed.nonzero()[0].tolist()
            raise ValueError(
                f"a key must be -1 in every round or in none, got both at key {key} of head {head} of sequence {row}"
            )

    def visit(
        self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, dropout: float, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over the chunks of the buckets, and its log-sum-exp: see :func:`attend_buckets`."""
        options = ScoreOptions(scoring.softcap, scoring.slopes, dropout)
        return attend_buckets(q, k, v, self, scale=scoring.scale, scoring=options)

    def density(self) -> float:
        """Share of all pairs that is visited; 0 without pairs. Dense, as :meth:`to_mask`."""
        mask = self.to_mask()
        return float(mask.float().mean()) if mask.numel() else 0.0


def attend_buckets(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    buckets: Buckets,
    *,
    scale: float,
    scoring: ScoreOptions = PLAIN,
) -> tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """softmax(scale · q kᵀ over the visible keys) v, and log Σ exp(score), -inf where nothing is seen.

    Query head h reads key head h // (H / Hkv). scoring: softcap, ALiBi and dropout.
    Rounds are computed apart and merged by their log-sum-exp; a pair met in an earlier round is masked, so that the
    result is attention over the union. Costs O((L + S) · R · chunk · d). Half precision is computed in float32.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    plan, options = _plan(buckets), scoring.for_call(q)
    queries, keys, values = (x.to(work).flatten(0, 2) for x in (q, k, v))
    out, lse = attend_tiles(queries, keys, values, plan.tiles, plan.visible, scale=scale, options=options)
    merged, total = merge_union(out, lse, plan.tiles.queries, queries.shape[0])
    merged, seen = merged.view(*q.shape[:3], v.shape[-1]), (total > -torch.inf).view(*q.shape[:3], 1)
    padding = buckets.keys[:, :, 0, buckets.offset :, None] < 0
    own_keys, alone = (x.to(work)[:, :, buckets.offset :].masked_fill(padding, 0) for x in (k, v))
    own_keys, alone = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (own_keys, alone))
    keep = options.keep(lambda: _selves(buckets), alone)
    # at distance 0 there is no bias
    own = (q.to(work) * own_keys).sum(-1) * scale
    own = own if options.softcap is None else (own / options.softcap).tanh() * options.softcap
    own = own.masked_fill(padding.repeat_interleave(q.shape[1] // k.shape[1], 1)[..., 0], -torch.inf)
    lse = total.view(*q.shape[:3]).where(seen[..., 0], own)
    return merged.where(seen, alone if keep is None else alone * keep).to(q.dtype), lse


def _selves(buckets: Buckets) -> Pairs:
    """Every query and the key at its position: [B, H, L, 1]."""
    batch, heads, _, length = buckets.queries.shape
    b, h, i = (torch.arange(size, device=buckets.keys.device) for size in (batch, heads, length))
    at = (i + buckets.offset)[:, None]
    return Pairs(b[:, None, None, None], h[:, None, None], at, at)


@dataclass(frozen=True, eq=False)
class _Plan:
    """tiles and the round of each [N]; own, before [R, B·H·L]: the two chunks that a query sees; chunk_of as below."""

    buckets: Buckets
    tiles: Tiles
    rounds: Tensor
    own: Tensor
    before: Tensor
    chunk_of: Tensor

    def visible(self, part: slice) -> Tensor:
        """No key behind the query, and no pair that an earlier round has met."""
        rows, listed = self.tiles.queries[part].clamp(min=0), self.tiles.keys[part].clamp(min=0)
        at = rows % self.buckets.queries.shape[3] + self.buckets.offset
        distance = at[:, :, None] - (listed % self.buckets.keys.shape[3])[:, None]
        seen = distance >= (1 if self.buckets.without_self else 0)
        for earlier in range(self.chunk_of.shape[0] - 1):
            where = self.chunk_of[earlier][listed][:, None]
            again = where == self.own[earlier][rows][:, :, None]
            again |= where == self.before[earlier][rows][:, :, None]
            seen &= ~(again & (self.rounds[part] > earlier)[:, None, None])
        return seen


@dataclass(frozen=True, eq=False)
class _Sorted:
    """All keys of all heads and rounds in one list, by bucket and then by position.

    first, own, stop [B, H, R, L]: where in the list a query's bucket starts, its chunk starts and its bucket ends;
    own is NOWHERE without a key. row [M]: the key's row in [B·Hkv·S]; chunk_of [R, B·Hkv·S]: where its chunk starts.
    """

    row: Tensor
    chunk_of: Tensor
    first: Tensor
    own: Tensor
    stop: Tensor


def _sorted(buckets: Buckets) -> _Sorted:
    batch, heads, rounds, length = buckets.keys.shape
    device = buckets.keys.device
    # each head and round numbers its buckets apart
    base = torch.arange(batch * heads * rounds, device=device).view(batch, heads, rounds, 1) * buckets.num_buckets
    codes = (base + buckets.keys) * length + torch.arange(length, device=device)
    codes = codes[buckets.keys >= 0].sort().values
    number, position = codes // length, codes % length
    row = number // (buckets.num_buckets * rounds) * length + position
    start = torch.searchsorted(codes, number * length)
    place = torch.arange(codes.shape[0], device=device)
    chunk_of = torch.full((rounds, batch * heads * length), -1, device=device)
    in_round = number // buckets.num_buckets % rounds
    chunk_of[in_round, row] = start + (place - start) // buckets.chunk * buckets.chunk
    wanted = (base.repeat_interleave(buckets.queries.shape[1] // heads, 1) + buckets.queries) * length
    at = torch.arange(buckets.queries.shape[3], device=device) + buckets.offset
    first, stop = torch.searchsorted(codes, wanted), torch.searchsorted(codes, wanted + length)
    rank = torch.searchsorted(codes, wanted + at, right=True) - first - 1
    own = (first + rank // buckets.chunk * buckets.chunk).where(rank >= 0, NOWHERE)
    return _Sorted(row, chunk_of, first, own, stop)


def _plan(buckets: Buckets) -> _Plan:
    """Queries of one chunk, those of all the heads that share its keys, cut into tiles."""
    heads, rounds, length = buckets.queries.shape[1:]
    found, chunk = _sorted(buckets), buckets.chunk
    own, order = found.own.flatten().sort(stable=True)
    own, order = own[own != NOWHERE], order[own != NOWHERE]
    rank = torch.arange(own.shape[0], device=own.device) - torch.searchsorted(own, own)
    width = chunk * (heads // buckets.keys.shape[1])
    starts = rank % width == 0
    queries = torch.full((int(starts.sum()), width), -1, device=own.device)
    queries[starts.cumsum(0) - 1, rank % width] = order // (rounds * length) * length + order % length
    leading = order[starts]
    listed = own[starts][:, None] + torch.arange(-chunk, chunk, device=own.device)
    inside = listed >= found.first.flatten()[leading][:, None]
    inside &= listed < found.stop.flatten()[leading][:, None]
    keys = found.row[listed.clamp(0, max(found.row.shape[0] - 1, 0))].where(inside, -1)
    chunks, first = (x.permute(2, 0, 1, 3).flatten(1) for x in (found.own, found.first))
    before = (chunks - chunk).where(chunks > first, NOWHERE)
    tiles = Tiles(queries, keys, heads, length, buckets.keys.shape[3])
    return _Plan(buckets, tiles, leading // length % rounds, chunks, before, found.chunk_of)
