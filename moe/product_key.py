"""Product-key memory: a table of n² values of which each token reads a few, found in 2·n comparisons."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from moe.checks import at_least, within
from moe.memory_values import MemoryValues, table_gradient, weighted_rows
from moe.recomputation import in_backward
from moe.transforms import transformed

QueryNorm = Literal["layer", "batch", "none"]


@dataclass(frozen=True)
class Lookup:
    """What the R real tokens of a batch read.

    slots: in [0, num_slots), best first; weights: float32, summing to 1 over the k choices of a head.
    """

    slots: Int[Tensor, "R H k"]
    weights: Float[Tensor, "R H k"]
    num_slots: int

    def flat(self) -> tuple[Int[Tensor, "R c"], Float[Tensor, "R c"]]:
        """Slots and weights of all heads side by side: a slot that two heads chose is there twice."""
        return self.slots.flatten(1), self.weights.flatten(1)


class ProductKeys(nn.Module):
    """Finds for each head the k of n² keys with the largest inner product with its query, exactly.

    Key i·n + j is the concatenation of sub-key i of the first half and sub-key j of the second (Lample et al. 2019,
    arXiv:1907.05242), so that its score is a sum of one score from each half. The k best keys are among the k × k
    sums of the halves' k best sub-keys; of those, pair (i, j) of the ranked lists can only be among the k best where
    (i + 1)(j + 1) ≤ k, because that many pairs score at least as much.

    query_norm: over the key_dim of each head ("layer"), over the tokens of the batch ("batch", as in the paper: it
    lets tokens see each other, the future included, in training) or "none". The running statistics of "batch" move once
    a batch, the recomputation of activation checkpointing being none (a checkpoint of one's own around a compiled
    layer must say so: :func:`moe.recomputation.recomputing`). shared: one set of sub-keys for all heads, as in
    PEER, rather than each head its own. Scores and softmax are float32 whatever autocast says.
    ``weight`` [heads or 1, 2, num_keys, half] is a stack of matrices [num_keys, half], one for each half of a query:
    ``matrix_stacks`` says so to what prunes matrices.
    Raises: ValueError for a size below 1, k > num_keys, or an odd key_dim.
    """

    matrix_stacks = ("weight",)

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int,
        heads: int,
        k: int,
        key_dim: int,
        query_norm: QueryNorm = "layer",
        shared: bool = False,
        name: str = "keys",
    ) -> None:
        super().__init__()
        for what, size in (("dim", dim), ("num_keys", num_keys), ("heads", heads)):
            at_least(f"{name}: {what}", size, 1)
        within(f"{name}: k", k, 1, num_keys, most_name="num_keys")
        at_least(f"{name}: key_dim", key_dim, 2)
        if key_dim % 2:
            raise ValueError(f"{name}: key_dim must be even and >= 2, for two halves, got {key_dim}")
        self.dim, self.num_keys, self.heads, self.k = dim, num_keys, heads, k
        self.key_dim, self.query_norm, self.name = key_dim, query_norm, name
        self.query = nn.Linear(dim, heads * key_dim, bias=False)
        self.norm = _query_norm(query_norm, heads, key_dim)
        self.pairs: Tensor
        self.weight = nn.Parameter(torch.empty(1 if shared else heads, 2, num_keys, key_dim // 2))
        pairs = [(i, j) for i in range(k) for j in range(k) if (i + 1) * (j + 1) <= k]
        self.register_buffer("pairs", torch.tensor(pairs).mT.contiguous())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sub-keys from U(±half^-1/2), half = key_dim / 2: a normed query gets scores of unit order."""
        bound = (self.key_dim // 2) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "R D"]) -> Lookup:
        """The k best keys of each head, weighted by the softmax of their scores.

        Raises: ValueError for a wrong width or dtype, or one token in a training batch with query_norm="batch";
        FloatingPointError where a score is NaN or infinite.
        """
        if x.shape[1] != self.dim:
            raise ValueError(f"{self.name}: x must have width dim={self.dim}, got {x.shape[1]}")
        keys = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        slots, scores = search(self._queries(x), keys, self.k, pairs=self.pairs)
        _require_finite(scores, self.name)
        return Lookup(slots, scores.softmax(-1), self.num_keys**2)

    def matrix_inputs(self, x: Float[Tensor, "R D"]) -> dict[tuple[int, int], Float[Tensor, "rows half"]]:
        """(head, half) → the halves of queries that this matrix of ``weight`` multiplies; of a shared one, all heads'.

        As in evaluation: with query_norm="batch" call it in evaluation mode, or it counts the rows as seen."""
        halves = self._queries(x).unflatten(2, (2, -1))
        if len(self.weight) == self.heads:
            return {(head, half): halves[:, head, half] for head in range(self.heads) for half in (0, 1)}
        return {(0, half): halves[:, :, half].flatten(0, 1) for half in (0, 1)}

    def _queries(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R H c"]:
        self._require_dtype(x)
        query = self.query(x)
        dtype = torch.promote_types(query.dtype, torch.float32)
        norm, split = self.norm, (self.heads, self.key_dim)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(norm, nn.BatchNorm1d):
                return self._over_batch(norm, query).to(dtype).unflatten(1, split)
            query = query.to(dtype).unflatten(1, split)
            if norm is None:
                return query
            return F.layer_norm(query, (self.key_dim,), norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)

    def _require_dtype(self, x: Tensor) -> None:
        wanted = next(self.query.parameters(), self.weight).dtype
        lowered = torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
        if x.dtype != wanted and not lowered:
            raise ValueError(
                f"{self.name}: x must have the dtype of the query's weight, {wanted}, outside autocast, got {x.dtype}"
            )

    def _over_batch(self, norm: nn.BatchNorm1d, query: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        if self.training and len(query) == 1:
            raise ValueError(f"{self.name}: query_norm='batch' must see >= 2 real tokens while training, got 1")
        if len(query) == 0:
            return query
        query = query.to(norm.weight.dtype)
        if self.training and norm.running_var is not None:
            _require_variance(query.detach(), norm.running_var.dtype, self.name)
        if not in_backward():
            return norm(query)
        # its first run has moved the running statistics: the recomputation of a checkpoint moves copies
        return functional_call(norm, {name: buffer.clone() for name, buffer in norm.named_buffers()}, (query,))

    def extra_repr(self) -> str:
        sizes = f"dim={self.dim}, num_keys={self.num_keys}, heads={self.heads}, k={self.k}, key_dim={self.key_dim}"
        return f"{sizes}, query_norm={self.query_norm!r}, shared={len(self.weight) < self.heads}"


def search(
    query: Float[Tensor, "R H c"], keys: Float[Tensor, "G 2 n half"], k: int, *, pairs: Int[Tensor, "2 p"]
) -> tuple[Int[Tensor, "R H k"], Float[Tensor, "R H k"]]:
    """Slots i·n + j and scores ⟨query₁, keys₁ᵢ⟩ + ⟨query₂, keys₂ⱼ⟩ of the k best, best first; G: H, or 1 for all heads.

    pairs: the ranks (i, j) whose sums are compared, (i + 1)(j + 1) ≤ k. Gradients flow through the chosen scores.
    """
    n = keys.shape[2]
    halved = query.unflatten(2, (2, -1))
    lean = query.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed())
    with torch.autocast(query.device.type, enabled=False), torch.set_grad_enabled(torch.is_grad_enabled() and not lean):
        halves = torch.einsum("rhsc,hsnc->rhsn", halved, keys.expand(query.shape[1], -1, -1, -1))
    with torch.no_grad():
        best, index = top_scores(halves, k)
        sums = best[:, :, 0].index_select(2, pairs[0]) + best[:, :, 1].index_select(2, pairs[1])
        ranks = pairs[:, top_scores(sums, k)[1]]
        chosen = torch.stack([index[:, :, half].gather(2, ranks[half]) for half in (0, 1)], dim=2)
    # gathered once more from all scores: the gradient meets no index of the comparison above
    scores = halves.gather(3, chosen)
    if lean:
        scores = _ChosenScores.apply(halved, keys, chosen, scores)
    return chosen[:, :, 0] * n + chosen[:, :, 1], scores.sum(2)


class _ChosenScores(torch.autograd.Function):
    """Scores of the chosen sub-keys, known from the search, with a gradient for these alone: k / n of the work."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, keys: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(query, keys, chosen)
        return scores.clone()

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        query, keys, chosen = ctx.saved_tensors
        first = torch.arange(0, keys[..., 0].numel(), keys.shape[2]).view(-1, 2, 1)
        slots, d_scores = (chosen + first).flatten(0, 2), d_scores.flatten(0, 2).contiguous()
        table, d_query, d_keys = keys.flatten(0, 2), None, None
        if ctx.needs_input_grad[0]:
            d_query = weighted_rows(table, slots, d_scores).view(query.shape)
        if ctx.needs_input_grad[1]:
            d_keys = table_gradient(table, slots, d_scores, query.flatten(0, 2), sparse=False).view(keys.shape)
        return d_query, d_keys, None, None


def top_scores(scores: Float[Tensor, "*batch n"], k: int) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Values and places of the k largest, as ``scores.topk(k)``, in less time: ties may fall otherwise.

    The n scores are n / s groups of s; a score among the k largest is in one of the k groups of largest maximum, so
    that topk looks at n / s maxima and then at k·s scores. s is the power of two up to √(n / k), where it divides n.
    """
    n = scores.shape[-1]
    size = 1 << (math.isqrt(n // k).bit_length() - 1)
    if size == 1 or n % size:
        return _topk(scores, k)
    groups = n // size
    chosen = _topk(scores.unflatten(-1, (size, groups)).amax(-2), k, ranked=False)[1]
    places = (chosen[..., None, :] + torch.arange(0, n, groups, device=chosen.device)[:, None]).flatten(-2)
    values, best = _topk(scores.gather(-1, places), k)
    return values, places.gather(-1, best)


def _topk(scores: Tensor, k: int, *, ranked: bool = True) -> tuple[Tensor, Tensor]:
    """``scores.topk(k)``, NaN first; on CPU of the bits as integers, which torch compares in two thirds of the time."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(scores.dtype)
    if whole is None or scores.device.type != "cpu" or torch.compiler.is_compiling():
        best = scores.topk(k, dim=-1, sorted=ranked)
        return best.values, best.indices
    last = torch.iinfo(whole).max
    nans = last - int(torch.tensor(math.inf, dtype=scores.dtype).view(whole))
    bits = scores.contiguous().view(whole)
    best = _turned(bits).sub_(nans).topk(k, dim=-1, sorted=ranked)
    return _turned(best.values.add_(nans)).view(scores.dtype), best.indices


def _turned(bits: Int[Tensor, "*batch n"]) -> Int[Tensor, "*batch n"]:
    """Bits of floats as integers of the same order, and back: below 0 all bits but the sign are turned."""
    info = torch.iinfo(bits.dtype)
    return (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)


class ProductKeyMemory(nn.Module):
    """y = Σ_heads Σ_{i in the head's k best keys} softmax(scores)_i · values_i. Lample et al. 2019, arXiv:1907.05242.

    num_keys n gives n² slots. gated: Memory+, W₂(y ⊙ silu(W₁ x)) (Berges et al. 2024, arXiv:2412.09764). values: a
    pool to share with other layers of the same model; None makes one of width value_dim (default dim; without gate
    it must be dim). The table's gradient is sparse by default (:class:`moe.memory_values.MemoryValues`), and wants an
    optimiser of its own with a higher rate and no weight decay; everything else has dense gradients. query_norm,
    key_dim: of :class:`ProductKeys`. name: says in errors which layer it was.

    >>> memory = ProductKeyMemory(8, num_keys=4, heads=2, k=3, key_dim=6)
    >>> y, lookup = memory.read(torch.randn(2, 5, 8))
    >>> y.shape, lookup.slots.shape, lookup.num_slots
    (torch.Size([2, 5, 8]), torch.Size([10, 2, 3]), 16)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_keys: int,
        heads: int = 4,
        k: int = 32,
        key_dim: int = 128,
        value_dim: int | None = None,
        query_norm: QueryNorm = "layer",
        gated: bool = False,
        values: MemoryValues | None = None,
        name: str = "memory",
    ) -> None:
        super().__init__()
        self.keys = ProductKeys(
            dim, num_keys=num_keys, heads=heads, k=k, key_dim=key_dim, query_norm=query_norm, name=name
        )
        width = dim if value_dim is None else value_dim
        self.values = MemoryValues(num_keys**2, width) if values is None else values
        _check_values(self.values, num_keys, value_dim, name)
        if not gated and self.values.dim != dim:
            raise ValueError(f"{name}: value_dim must be dim={dim} unless gated, got {self.values.dim}")
        self.dim, self.name = dim, name
        self.gate = nn.Linear(dim, self.values.dim, bias=False) if gated else None
        self.output = nn.Linear(self.values.dim, dim, bias=False) if gated else None

    def forward(
        self, x: Float[Tensor, "*batch D"], *, padding_mask: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch D"]:
        """What the tokens read; zeros for padding. See :meth:`read`."""
        return self.read(x, padding_mask=padding_mask)[0]

    def read(
        self, x: Float[Tensor, "*batch D"], *, padding_mask: Bool[Tensor, "*batch"] | None = None
    ) -> tuple[Float[Tensor, "*batch D"], Lookup]:
        """y, and the slots and weights that made it, for :func:`moe.memory_stats.memory_stats`.

        padding_mask: True for real tokens; padding reads nothing, gets zeros, and is not seen by query_norm="batch".
        Raises: ValueError for a wrong width, dtype or mask; FloatingPointError, with the layer's name, for NaN or inf.
        """
        rows = real_rows(x, padding_mask, self.dim, self.name)
        lookup = self.keys(rows)
        y = self.values(*lookup.flat())
        if self.gate is not None and self.output is not None:
            y = self.output(y * F.silu(self.gate(rows)))
        return restore_rows(y, x, padding_mask), lookup


def real_rows(
    x: Float[Tensor, "*batch D"], padding_mask: Bool[Tensor, "*batch"] | None, dim: int, name: str
) -> Float[Tensor, "R D"]:
    """The real tokens of x, in order. Raises: ValueError for a wrong width, or a mask of another shape or dtype."""
    if x.shape[-1] != dim:
        raise ValueError(f"{name}: x must have width dim={dim}, got {x.shape[-1]}")
    if padding_mask is None:
        return x.reshape(-1, dim)
    if padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{name}: padding_mask must be bool of shape {list(x.shape[:-1])}, True for real tokens, "
            f"got {padding_mask.dtype} of shape {list(padding_mask.shape)}"
        )
    return x[padding_mask]


def restore_rows(
    y: Float[Tensor, "R D"], x: Float[Tensor, "*batch D"], padding_mask: Bool[Tensor, "*batch"] | None
) -> Float[Tensor, "*batch D"]:
    """y in the shape of x, zeros for padding; in the dtype of x, or in autocast's."""
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    y = y.to(torch.get_autocast_dtype(device) if lower else x.dtype)
    if padding_mask is None:
        return y.reshape(x.shape)
    return y.new_zeros(x.shape).masked_scatter(padding_mask[..., None].expand(x.shape), y)


def _query_norm(kind: QueryNorm, heads: int, key_dim: int) -> nn.LayerNorm | nn.BatchNorm1d | None:
    if kind not in ("layer", "batch", "none"):
        raise ValueError(f"query_norm must be 'layer', 'batch' or 'none', got {kind!r}")
    if kind == "none":
        return None
    return nn.LayerNorm(key_dim) if kind == "layer" else nn.BatchNorm1d(heads * key_dim)


def _check_values(values: MemoryValues, num_keys: int, value_dim: int | None, name: str) -> None:
    if values.num_slots != num_keys**2:
        raise ValueError(f"{name}: values must have num_keys²={num_keys**2} slots, got {values.num_slots}")
    if value_dim not in (None, values.dim):
        raise ValueError(f"{name}: value_dim must be the width of values, {values.dim}, got {value_dim}")


def _require_variance(query: Float[Tensor, "R C"], dtype: torch.dtype, name: str) -> None:
    """Of the batch, which the running variance takes in: infinity there would make every later query 0."""
    most = query.float().var(0).amax()
    if torch.compiler.is_compiling():
        torch._assert_async(~(most > torch.finfo(dtype).max), "the variance of queries must be within their type")
    elif most > torch.finfo(dtype).max:
        raise FloatingPointError(
            f"{name}: the variance of queries must be at most {torch.finfo(dtype).max:.3g} for query_norm='batch' in "
            f"{dtype}, got {most.item():.3g}"
        )


def _require_finite(scores: Float[Tensor, "R H k"], name: str) -> None:
    # topk ranks NaN and infinity first, so that the chosen scores show them
    finite = scores.detach().isfinite().all(-1).all(-1)
    if torch.compiler.is_compiling():
        torch._assert_async(finite.all(), "product-key scores must be finite, got NaN or infinity")
    elif not finite.all():
        bad = int((~finite).sum())
        raise FloatingPointError(
            f"{name}: product-key scores must be finite, got NaN or infinity for {bad} of {len(finite)} tokens"
        )
