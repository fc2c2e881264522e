"""Routing attention: queries look at keys that stand nearest to the same centroid."""

from collections.abc import Callable
from math import sqrt
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_attn.checking import check_seed, check_shapes
from sparse_attn.seeding import recomputing
from sparse_attn.selection.buckets import Buckets, attend_buckets
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.record import Selected
from sparse_attn.selection.scoring import PLAIN, ScoreOptions
from sparse_attn.selection.tiles import Tiles, attend_tiles, merge_mean

MEMBERS = ("nearest", "top")


class KMeansRouting(nn.Module):
    """Attention inside k-means clusters, Roy et al. 2020 (Routing Transformer, arXiv:2003.05997).

    q and k are layer-normalised without weights (length √d); the cluster of a vector x is argmax_c x · μ_c. Query heads
    that share a key head share its centroids.
    members "nearest" (the paper's definition, eq. 8): a query sees the keys j ≤ i of its own cluster, the latest
    ``window`` to 2 · ``window`` of them (:class:`Buckets` with chunks of ``window``), and itself if there are none. No
    later token changes the choice.
    members "top" (the paper's algorithm 1): each cluster takes the ``window`` queries and the ``window`` keys of
    largest x · μ_c, and its queries see its keys j ≤ i. A token may be in several clusters, whose outputs are averaged,
    or in none, which gives zeros. Which tokens are taken depends on the whole sequence, later tokens too: such a choice
    cannot be repeated while decoding, and a query shorter than its keys is refused.
    shared_qk: queries are keys, q = k; ``q`` is then not used, and each query head needs its own key head.

    centroids [Hkv, C, d] and mass [Hkv, C]: float32 buffers that no gradient reaches. Once an optimiser step, after it,
    :meth:`after_step` moves them: mass ← λ mass + (1 - λ) n_c, centroid ← (λ mass · centroid + (1 - λ) Σ x) / mass,
    over the n_c queries and keys whose cluster was c in the training forwards since the last call. Evaluation and the
    recomputation of activation checkpointing count for nothing. λ = ``decay``.
    losses["kmeans_commitment"], in training: the mean of (x - μ_c(x))² over entries, of the queries plus of the keys,
    which draws q and k towards their centroids; the authors' code weighs it by 1e-4.
    Raises: ValueError for sizes out of range or inputs that do not fit.
    """

    centroids: Tensor
    mass: Tensor

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        num_clusters: int = 16,
        window: int = 64,
        members: str = "nearest",
        decay: float = 0.999,
        shared_qk: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "num_clusters": num_clusters, "window": window}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if members not in MEMBERS:
            raise ValueError(f"members must be one of {', '.join(MEMBERS)}, got {members!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.num_clusters, self.window, self.members = num_clusters, window, members
        self.decay, self.shared_qk, self.seed = decay, shared_qk, seed
        check_seed(seed)
        seeded, shape = torch.Generator().manual_seed(seed), (num_kv_heads, num_clusters, head_dim)
        draws = torch.randn(shape, generator=seeded, dtype=torch.float32)
        self.register_buffer("centroids", F.layer_norm(draws, (head_dim,)))
        self.register_buffer("mass", torch.ones(num_kv_heads, num_clusters, dtype=torch.float32))
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def forward(
        self,
        q: Float[Tensor, "B H L d"],
        k: Float[Tensor, "B Hkv S d"],
        v: Float[Tensor, "B Hkv S d_v"],
        *,
        hidden: Float[Tensor, "B L dim"] | None = None,
        key_mask: Bool[Tensor, "B S"] | None = None,
        scoring: ScoreOptions = PLAIN,
    ) -> Selected:
        """The last query sits at the last key. key_mask: False marks padding, which none sees. hidden: not used.
        scoring: softcap, ALiBi and dropout, in the attention and not in the choice; with members "top" dropout takes a
        pair from every cluster that holds it."""
        self._check(q, k)
        check_shapes(q, k, v, key_mask)
        q, k, v = (without_padding(x, key_mask) for x in (q, k, v))
        keys = normalized(k)
        queries = keys[:, :, k.shape[2] - q.shape[2] :] if self.shared_qk else normalized(q)
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        near_keys = self.nearest(keys)
        near_queries = near_keys[..., k.shape[2] - q.shape[2] :] if self.shared_qk else self.nearest(queries)
        losses: dict[str, Tensor] = {}
        if self.training:
            parts = [(keys, near_keys, real)]
            if not self.shared_qk:
                parts.append((queries, near_queries, real[:, k.shape[2] - q.shape[2] :]))
            self._count(parts)
            losses = {"kmeans_commitment": torch.stack([self._distance(*part) for part in parts]).sum()}
        if self.members == "top":
            return Selected(self._top(queries, keys, v, real, scoring.for_call(q)).to(q.dtype), losses, None)
        near_keys = near_keys.masked_fill(~real[:, None], -1)
        chosen = Buckets(near_queries[:, :, None], near_keys[:, :, None], self.num_clusters, self.window)
        out, _ = attend_buckets(queries, keys, v, chosen, scale=1 / sqrt(q.shape[-1]), scoring=scoring)
        return Selected(out.to(q.dtype), losses, chosen)

    def _logits(self, x: Tensor) -> Float[Tensor, "B H N C"]:
        return x.detach().float() @ self.centroids.repeat_interleave(x.shape[1] // self.centroids.shape[0], 0).mT

    @torch.no_grad()
    def nearest(self, x: Float[Tensor, "B H N d"]) -> Int[Tensor, "B H N"]:
        """argmax_c x · μ_c of normalised queries or keys; ties go to the lower cluster."""
        return self._logits(x).argmax(-1)

    def _top(self, queries: Tensor, keys: Tensor, v: Tensor, real: Tensor, options: ScoreOptions) -> Tensor:
        """The clusters' own attention, merged by the mean."""
        batch, heads, length, _ = queries.shape
        key_rows = self._members(keys, real).repeat_interleave(heads // keys.shape[1], 1)
        groups = torch.arange(batch * heads, device=v.device).view(batch, heads, 1, 1)
        shared = groups // (heads // keys.shape[1])
        rows = self._members(queries, real)
        tiles = Tiles(
            (groups * length + rows).where(rows >= 0, -1).flatten(0, 2),
            (shared * length + key_rows).where(key_rows >= 0, -1).flatten(0, 2),
            heads, length, length,
        )  # fmt: skip

        def visible(part: slice) -> Tensor:
            return tiles.keys[part][:, None] % length <= tiles.queries[part][:, :, None] % length

        rows_q, rows_k, rows_v = (x.to(queries.dtype).flatten(0, 2) for x in (queries, keys, v))
        scale = 1 / sqrt(queries.shape[-1])
        out, lse = attend_tiles(rows_q, rows_k, rows_v, tiles, visible, scale=scale, options=options)
        return merge_mean(out, lse, tiles.queries, batch * heads * length)[0].view(batch, heads, length, v.shape[-1])

    @torch.no_grad()
    def _members(self, x: Tensor, real: Tensor) -> Int[Tensor, "B H C w"]:
        """The positions of the ``window`` real vectors of largest x · μ_c, ascending; -1 where there are fewer."""
        scores = self._logits(x).mT.masked_fill(~real[:, None, None], -torch.inf)
        best, found = scores.topk(min(self.window, x.shape[2]), dim=-1)
        return found.masked_fill(best == -torch.inf, -1).sort(-1).values

    def _distance(self, x: Tensor, near: Tensor, real: Tensor) -> Float[Tensor, ""]:
        """Mean of (x - μ)² over the entries of real vectors."""
        heads = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // self.centroids.shape[0])
        square = (x - self.centroids[heads[:, None], near]).square().mean(-1) * real[:, None]
        return square.sum() / (real.sum() * x.shape[1]).clamp(min=1)

    @torch.no_grad()
    def _count(self, parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add the real vectors to the sums and counts of their clusters, unless this is a recomputation."""
        if recomputing():
            return
        sums, counts = self.pending()
        for x, near, real in parts:
            groups = x.shape[1] // self.centroids.shape[0]
            one_hot = F.one_hot(near, self.num_clusters).float() * real[:, None, :, None]
            grouped, vectors = one_hot.unflatten(1, (-1, groups)), x.float().unflatten(1, (-1, groups))
            sums = sums + torch.einsum("bhgnc,bhgnd->hcd", grouped, vectors)
            counts = counts + grouped.sum((0, 2, 3))
        self._sums, self._counts = sums, counts

    def pending(self) -> tuple[Float[Tensor, "Hkv C d"], Float[Tensor, "Hkv C"]]:
        """Sum and number of the vectors of each cluster that :meth:`after_step` has not used yet, on this process."""
        if self._sums is None or self._counts is None:
            return torch.zeros_like(self.centroids), torch.zeros_like(self.mass)
        return self._sums.to(self.centroids.device), self._counts.to(self.centroids.device)

    @torch.no_grad()
    def after_step(self, *, group: dist.ProcessGroup | None = None) -> None:
        """Move the centroids to the pending vectors, summed over ``group``, and forget them.

        Call it once after each optimiser step, on every process of the group (default: all, where torch.distributed is
        initialised). Without pending vectors nothing moves; a cluster without any keeps its centroid.
        """
        sums, counts = self.pending()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=group)
            dist.all_reduce(counts, group=group)
        self._sums = self._counts = None
        if not counts.any():
            return
        old = self.decay * self.mass
        total = old + (1 - self.decay) * counts
        moved = (old[..., None] * self.centroids + (1 - self.decay) * sums) / total[..., None]
        # a cluster that stays empty loses all its mass in the end: 0/0
        self.centroids.copy_(moved.where(counts[..., None] > 0, self.centroids))
        self.mass.copy_(total)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As for every module, except that the buffers stay float32: in bf16 a share of 1e-3 is lost beside 1."""
        before = (self.centroids, self.mass)
        super()._apply(fn, recurse)
        if self.centroids.dtype != torch.float32:
            self.centroids, self.mass = (x.to(self.centroids.device) for x in before)
        return self

    def _check(self, q: Tensor, k: Tensor) -> None:
        heads, dim = self.centroids.shape[0], self.centroids.shape[2]
        if k.shape[1] != heads or k.shape[3] != dim:
            raise ValueError(f"k must have {heads} heads of {dim}, got {k.shape[1]} of {k.shape[3]}")
        if q.shape[1] % heads or (self.shared_qk and q.shape[1] != heads):
            rule = "equal" if self.shared_qk else "be a multiple of"
            raise ValueError(f"query heads must {rule} the {heads} key heads, got {q.shape[1]}")
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"q must not be longer than k={k.shape[2]}, got {q.shape[2]}")
        if self.members == "top" and q.shape[2] != k.shape[2]:
            why = "members='top' chooses among the whole sequence and cannot decode"
            raise ValueError(f"q must be as long as k={k.shape[2]}, since {why}; got {q.shape[2]}")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        sizes = f"num_clusters={self.num_clusters}, window={self.window}, members={self.members!r}"
        return f"{sizes}, decay={self.decay}, shared_qk={self.shared_qk}, seed={self.seed}"


def normalized(x: Float[Tensor, "B H N d"]) -> Float[Tensor, "B H N d"]:
    """(x - mean) / deviation of each vector, at least in float32."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])
