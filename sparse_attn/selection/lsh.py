"""Locality-sensitive hashing: queries look at keys that random rotations send into the same bucket."""

from math import sqrt

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_attn.checking import check_seed, check_shapes
from sparse_attn.selection.buckets import Buckets, attend_buckets
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.record import Selected
from sparse_attn.selection.scoring import PLAIN, ScoreOptions


def hash_buckets(x: Float[Tensor, "B Hx N d"], rotations: Float[Tensor, "Hkv R d half"]) -> Int[Tensor, "B Hx R N"]:
    """h(x) = argmax([x R; -x R]), a bucket in [0, 2 · half) for each of the R rounds.

    Kitaev et al. 2020 (arXiv:2001.04451), section 2. Head h uses the rotations of h // (Hx / Hkv). Computed in float32;
    ties go to the lower bucket, and to the first half.
    """
    rotations = rotations.float().repeat_interleave(x.shape[1] // rotations.shape[0], 0)
    rounds = []
    for turned in (x.float() @ r for r in rotations.unbind(1)):
        high, low = turned.max(-1), turned.min(-1)
        rounds.append(high.indices.where(high.values >= -low.values, low.indices + turned.shape[-1]))
    return torch.stack(rounds, 2)


class LSH(nn.Module):
    """Attention within hash buckets, Kitaev et al. 2020 (Reformer, arXiv:2001.04451).

    Every round hashes queries and keys (:func:`hash_buckets`), sorts them by bucket and position and cuts the sorted
    keys into chunks; a query sees its chunk and the one before it (:class:`Buckets`), and the rounds together are
    attention over the union of what they show (appendix A). As in the paper a query sees itself only if it sees
    nothing else, where queries are keys.
    Chunks are counted from the start of each bucket and stay inside it. The paper cuts the whole sorted sequence, whose
    borders later tokens move: here no choice depends on a later token, and decoding repeats the full forward exactly.
    The number of buckets is fixed for the same reason; the paper takes 2 · length / chunk of them.

    shared_qk: a key is its query at unit length, k_j = q_j / |q_j|. The shared vectors are ``k``, which a cache keeps;
    ``q`` is then not used and gets no gradient, and each query head needs its own key head. False: q and k are hashed
    and multiplied as they are. rotations [Hkv, R, d, num_buckets / 2]: a buffer of normal draws from ``seed``, the same
    in every forward and recomputation; the paper draws anew each time. No gradient reaches the choice.
    Raises: ValueError for sizes out of range or inputs that do not fit.
    """

    rotations: Tensor

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        num_buckets: int = 64,
        rounds: int = 4,
        chunk: int = 64,
        shared_qk: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "rounds": rounds, "chunk": chunk}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if num_buckets < 2 or num_buckets % 2:
            raise ValueError(f"num_buckets must be even and >= 2, got {num_buckets}")
        self.num_buckets, self.rounds, self.chunk, self.shared_qk, self.seed = (
            num_buckets, rounds, chunk, shared_qk, seed,
        )  # fmt: skip
        check_seed(seed)
        draws = torch.Generator().manual_seed(seed)
        shape = (num_kv_heads, rounds, head_dim, num_buckets // 2)
        self.register_buffer("rotations", torch.randn(shape, generator=draws))

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
        scoring: softcap, ALiBi and dropout, in the attention and not in the choice."""
        self._check(q, k)
        check_shapes(q, k, v, key_mask)
        q, k, v = (without_padding(x, key_mask) for x in (q, k, v))
        if self.shared_qk:
            q, k = k[:, :, k.shape[2] - q.shape[2] :], F.normalize(k, dim=-1)
        buckets = self.choose(q, k, key_mask=key_mask)
        out, _ = attend_buckets(q, k, v, buckets, scale=1 / sqrt(q.shape[-1]), scoring=scoring)
        return Selected(out, {}, buckets)

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B H L d"], k: Float[Tensor, "B Hkv S d"], *, key_mask: Bool[Tensor, "B S"] | None = None
    ) -> Buckets:
        """The buckets of queries and keys as they are attended to."""
        keys = hash_buckets(k, self.rotations)
        if key_mask is not None:
            keys = keys.masked_fill(~key_mask[:, None, None], -1)
        # a query that is its own key: hashing it twice could round differently
        queries = keys[..., k.shape[2] - q.shape[2] :] if self.shared_qk else hash_buckets(q, self.rotations)
        return Buckets(queries.clamp(min=0), keys, self.num_buckets, self.chunk, self.shared_qk)

    def _check(self, q: Tensor, k: Tensor) -> None:
        heads, dim = self.rotations.shape[0], self.rotations.shape[2]
        if k.shape[1] != heads or k.shape[3] != dim:
            raise ValueError(f"k must have {heads} heads of {dim}, got {k.shape[1]} of {k.shape[3]}")
        if q.shape[1] % heads or (self.shared_qk and q.shape[1] != heads):
            rule = "equal" if self.shared_qk else "be a multiple of"
            raise ValueError(f"query heads must {rule} the {heads} key heads, got {q.shape[1]}")
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"q must not be longer than k={k.shape[2]}, got {q.shape[2]}")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        sizes = f"num_buckets={self.num_buckets}, rounds={self.rounds}, chunk={self.chunk}"
        return f"{sizes}, shared_qk={self.shared_qk}, seed={self.seed}"
