"""Sinkhorn sorting: a learned soft permutation mixes blocks of keys, and queries look at what lands beside them."""

from math import sqrt

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_attn.checking import check_seed, check_shapes
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.record import Selected
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions

# log of a weight that is not there; finite, since -inf - -inf is NaN
ABSENT = -1e30


def balance(
    logits: Float[Tensor, "*batch R R"],
    *,
    iterations: int,
    causal: bool,
    real: Bool[Tensor, "*#batch R"] | None = None,
) -> Float[Tensor, "*batch R R"]:
    """The softmax of each row, scaled towards a doubly stochastic matrix: ``iterations`` times columns, then rows.

    Sinkhorn 1964, in logarithms, as in Tay et al. 2020 (arXiv:2002.11296), section 3.1. Rows come last, so that each
    sums to one. causal: row r keeps the columns c < r only, row 0 nothing; a column is summed down to the row that is
    scaled and no further, so that no entry depends on a later row, and is scaled where that sum exceeds one. To scale
    it up as well, to exactly one, would leave a single solution whatever the logits: every row its own predecessor.
    real: False for rows and columns that are not there: they keep nothing, and count in no sum.
    """
    size = logits.shape[-1]
    kept = torch.ones(size, size, dtype=torch.bool, device=logits.device)
    kept = kept.tril(-1) if causal else kept
    kept = kept if real is None else kept & real[..., :, None] & real[..., None, :]
    scaled = logits.masked_fill(~kept, ABSENT).log_softmax(-1).masked_fill(~kept, ABSENT)
    for _ in range(iterations):
        columns = scaled.logcumsumexp(-2).clamp(min=0) if causal else scaled.logsumexp(-2, keepdim=True)
        scaled = (scaled - columns).masked_fill(~kept, ABSENT).log_softmax(-1).masked_fill(~kept, ABSENT)
    return scaled.exp()


class SinkhornSorting(nn.Module):
    """Attention to the own block and to a soft mix of other blocks, Tay et al. 2020 (arXiv:2002.11296).

    Keys and values are cut into blocks. Block c has the sum s_c of its keys and the sorting logits R_rc = (s_c · W_r +
    b_r + g_rc) / temperature for every place r; P = :func:`balance` of R, and at place r stand the keys Σ_c P_rc K_c
    and values Σ_c P_rc V_c, position by position. A query of block r has one softmax over those and its own block.
    causal: P mixes blocks before r only, all of whose tokens are past, and the own block is seen up to the query. W and
    b belong to each key head and are trained through P, and so are the keys in s.
    gumbel: noise g = -log(-log u) in training, from ``seed`` and the number of :meth:`after_step` calls (the buffer
    ``steps``), alike for all sequences: the recomputation of activation checkpointing draws the same.

    Written here otherwise than in the paper, as far as its text could be checked: the sorting network is one linear
    layer, as in the authors' code of Long Range Arena (the paper has two), reading keys and not layer inputs; the two
    parts share one softmax (that code adds two); in the causal case whole earlier blocks are summed, which are past for
    every place that may receive them (the paper sums up to the first token of a block), and columns are balanced
    from above only (:func:`balance`). iterations = 0 is a softmax over blocks.
    Raises: ValueError for sizes out of range or inputs that do not fit.
    """

    steps: Tensor

    def __init__(
        self,
        head_dim: int,
        num_kv_heads: int,
        *,
        block: int = 64,
        max_blocks: int = 64,
        iterations: int = 8,
        temperature: float = 0.75,
        causal: bool = True,
        gumbel: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "block": block, "max_blocks": max_blocks}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if iterations < 0:
            raise ValueError(f"iterations must be >= 0, got {iterations}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        check_seed(seed)
        self.block, self.max_blocks, self.iterations = block, max_blocks, iterations
        self.temperature, self.causal, self.gumbel, self.seed = temperature, causal, gumbel, seed
        self.weight = nn.Parameter(torch.randn(num_kv_heads, head_dim, max_blocks) / head_dim)
        self.bias = nn.Parameter(torch.zeros(num_kv_heads, max_blocks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

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

        scoring: softcap, ALiBi and dropout. ALiBi's distance of a mixed key, which the paper does not have, is the mean
        Σ_c P_rc |i - j_c| over the keys j_c mixed in it: the bias of a mix is the mix of the biases, and trains P."""
        self._check(q, k)
        check_shapes(q, k, v, key_mask)
        if q.shape[2] == 0:
            return Selected(q.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * q.sum(), {}, None)
        work = torch.promote_types(q.dtype, torch.float32)
        q = without_padding(q, key_mask)
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        with torch.autocast(q.device.type, enabled=False):
            out = self._attend(q.to(work), k.to(work), v.to(work), real, scoring.for_call(q))
        return Selected(out.to(q.dtype), {}, None)

    def sorting(
        self, blocks: Float[Tensor, "B Hkv R n d"], real: Bool[Tensor, "B R"] | None = None
    ) -> Float[Tensor, "B Hkv R R"]:
        """P [place, block] from the keys of the blocks, in which padding is zero. real: False for a block of padding,
        which takes no place among the others (where P is causal, none before it would know)."""
        count = blocks.shape[2]
        logits = torch.einsum("bhcd,hdr->bhrc", blocks.sum(3), self.weight[..., :count].to(blocks.dtype))
        logits = logits + self.bias[:, :count, None].to(blocks.dtype)
        if self.gumbel and self.training:
            logits = logits + self._noise()[:, :count, :count].to(blocks)
        there = None if real is None else real[:, None]
        return balance(logits / self.temperature, iterations=self.iterations, causal=self.causal, real=there)

    def _noise(self) -> Float[Tensor, "Hkv R R"]:
        draws = torch.Generator().manual_seed(self.seed + int(self.steps))
        uniform = torch.rand(self.weight.shape[0], self.max_blocks, self.max_blocks, generator=draws)
        return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()

    @torch.no_grad()
    def after_step(self) -> None:
        """Go on to the next noise. Call it once after each optimiser step."""
        self.steps += 1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, options: ScoreOptions) -> Tensor:
        offset = k.shape[2] - q.shape[2]
        first, skipped = divmod(offset, self.block)
        seen = _blocks(real[:, None, :, None], self.block)
        keys, values = (_blocks(x.masked_fill(~real[:, None, :, None], 0), self.block) for x in (k, v))
        # a causal P does not know of later blocks: padding at the end changes nothing before it
        there = None if self.causal else seen[:, 0, ..., 0].any(-1)
        places = self.sorting(keys, there)[:, :, first:]
        share = torch.einsum("bhrc,bcn->bhrn", places, seen[:, 0, ..., 0].to(k.dtype))
        # padding takes no part in the mix
        whole = share.where(share > 0, 1)[..., None]
        mixed = [torch.einsum("bhrc,bhcnd->bhrnd", places, x) / whole for x in (keys, values)]
        at = torch.arange(self.block, device=q.device)
        own = seen[:, :, first:, None, :, 0] & ((at <= at[:, None]) if self.causal else at[:, None] >= 0)
        mask = torch.cat([(share > 0)[:, :, :, None].expand(-1, -1, -1, self.block, -1),
                          own.expand(-1, k.shape[1], -1, -1, -1)], -1)  # fmt: skip
        rows = _blocks(nn.functional.pad(q, (0, 0, skipped, 0)), self.block).unflatten(1, (k.shape[1], -1))
        both = [torch.cat([m, x[:, :, first:]], 3) for m, x in zip(mixed, (keys, values), strict=True)]
        scores = torch.einsum("bhgrid,bhrjd->bhgrij", rows, both[0]) / sqrt(q.shape[-1])
        if options.softcap is not None:
            scores = options.softcap * (scores / options.softcap).tanh()
        if options.alibi is not None:
            weights = places[..., None] * seen[:, :, None, :, :, 0] / whole[..., None, :, 0]
            scores = scores - options.alibi.to(scores).view(k.shape[1], -1, 1, 1, 1) * _distances(weights, first)
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
        probability = scores.softmax(-1) * mask[:, :, None]
        keep = options.keep(lambda: self._pairs(rows, first), probability)
        probability = probability if keep is None else probability * keep
        out = torch.einsum("bhgrij,bhrjd->bhgrid", probability, both[1])
        return out.flatten(1, 2).flatten(2, 3)[:, :, skipped : skipped + q.shape[2]]

    def _pairs(self, rows: Tensor, first: int) -> Pairs:
        """Of scores [B, Hkv, G, r, i, 2·block]; a mixed key counts as one before position 0."""
        b, kv_head, g, r, i = (torch.arange(size, device=rows.device) for size in rows.shape[:-1])
        head = kv_head[:, None] * len(g) + g
        start = (r + first)[:, None, None] * self.block
        keys = torch.cat([(-1 - i).expand(len(r), 1, -1), start + i], -1)
        return Pairs(b.view(-1, 1, 1, 1, 1, 1), head[..., None, None, None], start + i[:, None], keys)

    def _check(self, q: Tensor, k: Tensor) -> None:
        heads, dim, _ = self.weight.shape
        if k.shape[1] != heads or k.shape[3] != dim:
            raise ValueError(f"k must have {heads} heads of {dim}, got {k.shape[1]} of {k.shape[3]}")
        if q.shape[1] % heads:
            raise ValueError(f"query heads must be a multiple of the {heads} key heads, got {q.shape[1]}")
        if q.shape[2] > k.shape[2]:
            raise ValueError(f"q must not be longer than k={k.shape[2]}, got {q.shape[2]}")
        if k.shape[2] > self.block * self.max_blocks:
            bound = f"max_blocks · block = {self.block * self.max_blocks}"
            raise ValueError(f"the number of keys must be at most {bound}, got {k.shape[2]}")

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        sizes = f"block={self.block}, max_blocks={self.max_blocks}, iterations={self.iterations}"
        return f"{sizes}, temperature={self.temperature}, causal={self.causal}, gumbel={self.gumbel}, seed={self.seed}"


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, h, N, d] as [B, h, ⌈N / block⌉, block, d], the last block filled with zeros."""
    return nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _distances(weights: Float[Tensor, "B h r C n"], first: int) -> Float[Tensor, "B h 1 r n 2*n"]:
    """Distances of the queries of block first + r to its mixed keys, and to its own: weights of the keys in a mix."""
    count, columns, block = weights.shape[2:]
    ahead = torch.arange(first, first + count, device=weights.device)[:, None] - torch.arange(
        columns, device=weights.device
    )
    apart = [torch.einsum("bhrcj,rc->bhrj", weights, x.to(weights.dtype)) for x in (ahead.abs() * block, ahead.sign())]
    same = torch.einsum("bhrcj,rc->bhrj", weights, (ahead == 0).to(weights.dtype))
    at = torch.arange(block, device=weights.device)
    inside = (at[:, None] - at).to(weights.dtype)
    # |(r - c)·block + i - j| has the sign of r - c, and |i - j| where they are equal
    mixed = apart[0][..., None, :] + apart[1][..., None, :] * inside + same[..., None, :] * inside.abs()
    return torch.cat([mixed, inside.abs().expand_as(mixed)], -1)[:, :, None]
