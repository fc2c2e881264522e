"""DeepSeek sparse attention: a small indexer scores every earlier token, and each query sees the best of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_attn.checking import check_shapes
from sparse_attn.once import applied, differentiable_once
from sparse_attn.patterns import Pattern, causal
from sparse_attn.selection.padding import without_padding
from sparse_attn.selection.ranking import coarse
from sparse_attn.selection.record import Selected
from sparse_attn.selection.scoring import PLAIN, Pairs, ScoreOptions, attend_pattern
from sparse_attn.selection.tokens import TokenSelection, attend_tokens
from sparse_attn.selection.within import allowed, check_within

# index scores of single heads that are held at once
ELEMENTS = 2**22


def index_scores(
    q: Float[Tensor, "B L J c"], k: Float[Tensor, "B S c"], weight: Float[Tensor, "B L J"]
) -> Float[Tensor, "B L S"]:
    """I_ts = Σ_j w_tj · ReLU(q_tj · k_s) over the J heads of the indexer. DeepSeek-V3.2, eq. 1."""
    return torch.einsum("bljs,blj->bls", torch.einsum("bljc,bsc->bljs", q, k).relu(), weight)


def best_tokens(scores: Float[Tensor, "B L S"], top_k: int) -> Int[Tensor, "B L n"]:
    """The ``top_k`` tokens of highest score above -inf, in ascending order, -1 where there are fewer.

    Of equal scores (:func:`coarse`) the later tokens win: ReLU makes exact zeros, and a choice among them must not
    depend on the shape.
    """
    scores = coarse(scores)
    width = min(top_k, scores.shape[2])
    if width == 0:
        return torch.full((*scores.shape[:2], 0), -1, device=scores.device)
    least = scores.topk(width, dim=-1).values[..., -1:]
    above, equal = scores > least, (scores == least) & (scores > -torch.inf)
    room = width - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.flip(-1).cumsum(-1).flip(-1) <= room))
    place = keep.cumsum(-1) - 1
    tokens = torch.full((*scores.shape[:2], width), -1, device=scores.device)
    row, query, token = keep.nonzero(as_tuple=True)
    tokens[row, query, place[keep]] = token
    return tokens


class DSA(nn.Module):
    """Attention over the ``top_k`` tokens of highest index score, DeepSeek-V3.2 (2025), eq. 1–4.

    I_ts = Σ_j w_tj ReLU(q_tj · k_s): q = W_q h and w = W_w h · J^-1/2 c^-1/2 of the query's layer input, k =
    LayerNorm(W_k h) of the earlier token's, one key for all J ``heads`` of width c = ``head_dim``; the first
    ``rope_dim`` channels of q and k turn with their position. All attention heads share the choice, of at least float32
    scores.
    The indexer learns from its own loss alone, ``losses["indexer_kl"]``, in training: the mean over queries (the paper
    sums) of KL(p_t ‖ softmax I_t), p_t the attention probabilities averaged over heads. Its inputs and p are detached,
    and the choice passes no gradient: this loss trains nothing else, and no other loss trains the indexer.
    warm_up (attribute, may be changed): dense attention, and the loss over all earlier tokens, with the rest of the
    model frozen by the caller. After it, sparse attention and the loss over the chosen tokens only.

    ``hidden`` must then cover all S keys. key_width: the index keys are made from ``k`` instead, all its heads side by
    side (key_width = heads · width), so that decoding needs a cache of keys only. This is not in the paper, which has
    a cache of index keys. The paper's Hadamard rotation is left out: it changes no product, only their rounding in FP8.
    within: the pattern that shows the keys to choose among, and in the warm-up those to attend to; None: all earlier
    ones and the query's own.
    Raises: ValueError for sizes out of range, inputs that do not fit, or a within of each head.
    """

    def __init__(
        self,
        dim: int,
        *,
        top_k: int,
        heads: int = 4,
        head_dim: int = 32,
        rope_dim: int = 0,
        rope_theta: float = 10000.0,
        key_width: int | None = None,
        warm_up: bool = False,
        within: Pattern | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("top_k", top_k), ("heads", heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if rope_dim % 2 or not 0 <= rope_dim <= head_dim:
            raise ValueError(f"rope_dim must be even and in [0, head_dim={head_dim}], got {rope_dim}")
        if key_width is not None and key_width < 1:
            raise ValueError(f"key_width must be None or >= 1, got {key_width}")
        check_within(within, per_head=False)
        self.dim, self.top_k, self.heads, self.head_dim, self.within = dim, top_k, heads, head_dim, within
        self.rope_dim, self.rope_theta, self.key_width, self.warm_up = rope_dim, rope_theta, key_width, warm_up
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key = nn.Linear(key_width or dim, head_dim, bias=False)
        self.key_norm = nn.LayerNorm(head_dim)
        self.weight = nn.Linear(dim, heads, bias=False)

    def forward(
        self,
        q: Float[Tensor, "B H L d"],
        k: Float[Tensor, "B Hkv S d"],
        v: Float[Tensor, "B Hkv S d_v"],
        *,
        hidden: Float[Tensor, "B N dim"] | None = None,
        key_mask: Bool[Tensor, "B S"] | None = None,
        scoring: ScoreOptions = PLAIN,
    ) -> Selected:
        """The last query sits at the last key. hidden: the layer's input for the queries, or for all S keys.

        key_mask: False marks padding, which no query sees and whose queries have no loss. scoring: softcap, ALiBi and
        dropout of the attention; p_t has the first two.
        """
        check_shapes(q, k, v, key_mask)
        q, k, v = (without_padding(x, key_mask) for x in (q, k, v))
        indexer = self.index(q, k, hidden if hidden is None else without_padding(hidden, key_mask))
        selection = None if self.warm_up else self.choose(*indexer, key_mask=key_mask)
        options = scoring.for_call(q)
        if selection is None:
            shown = causal() if self.within is None else causal() & self.within
            out = attend_pattern(q, k, v, shown, options, key_mask)
        else:
            out = attend_tokens(q, k, v, selection, scoring=options)
        losses: dict[str, Tensor] = {}
        if self.training:
            losses["indexer_kl"] = indexer_kl(
                q, k, *indexer, selection, key_mask=key_mask, within=self.within, scoring=options
            )
        return Selected(out, losses, selection)

    def index(
        self, q: Float[Tensor, "B H L d"], k: Float[Tensor, "B Hkv S d"], hidden: Float[Tensor, "B N dim"] | None
    ) -> tuple[Float[Tensor, "B L J c"], Float[Tensor, "B S c"], Float[Tensor, "B L J"]]:
        """The indexer's queries, keys and head weights, at least float32. No gradient reaches q, k or hidden."""
        length, keys = q.shape[2], k.shape[2]
        hidden = self._checked(q, k, hidden).detach()
        source = hidden if self.key_width is None else k.detach().transpose(1, 2).flatten(2)
        rows = hidden[:, hidden.shape[1] - length :]
        queries = _wide(self.query(rows)).unflatten(-1, (self.heads, self.head_dim))
        positions = torch.arange(keys, device=k.device)
        turned = self._turned(queries, positions[keys - length :, None])
        weight = _wide(self.weight(rows)) / sqrt(self.heads * self.head_dim)
        return turned, self._turned(_wide(self.key_norm(self.key(source))), positions), weight

    @torch.no_grad()
    def choose(
        self,
        q: Float[Tensor, "B L J c"],
        k: Float[Tensor, "B S c"],
        weight: Float[Tensor, "B L J"],
        *,
        key_mask: Bool[Tensor, "B S"] | None = None,
    ) -> TokenSelection:
        """The best tokens of every query, for what :meth:`index` gives; memory is bounded by ELEMENTS."""
        width = min(self.top_k, k.shape[1])
        tokens = torch.full((*q.shape[:2], width), -1, device=q.device)
        for part in _stretches(q, k.shape[1]):
            scores = index_scores(q[:, part], k, weight[:, part])
            seen = _visible(part, q.shape[1], k.shape[1], key_mask, self.within, q.device)
            tokens[:, part] = best_tokens(scores.masked_fill(~seen, -torch.inf), self.top_k)
        return TokenSelection(tokens[:, None], k.shape[1])

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first rope_dim channels, pairs (i, i + rope_dim/2), turned by position · theta^(-2i/rope_dim)."""
        half = self.rope_dim // 2
        if half == 0:
            return x
        steps = self.rope_theta ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angle = positions[..., None] * steps
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def _checked(self, q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
        length, keys = q.shape[2], k.shape[2]
        if hidden is None:
            raise ValueError("hidden must be given: the indexer reads the layer's input, got None")
        if hidden.dim() != 3 or hidden.shape[0] != q.shape[0] or hidden.shape[2] != self.dim:
            raise ValueError(f"hidden must be [B, N, dim] = [{q.shape[0]}, N, {self.dim}], got {list(hidden.shape)}")
        if length > keys:
            raise ValueError(f"q must not be longer than k={keys}, got {length}")
        if self.key_width is None and hidden.shape[1] != keys:
            why = "the index keys are made from it unless key_width is set"
            raise ValueError(f"hidden must cover all {keys} keys, since {why}; got {hidden.shape[1]}")
        if hidden.shape[1] not in (length, keys):
            raise ValueError(f"hidden must cover the {length} queries or all {keys} keys, got {hidden.shape[1]}")
        if self.key_width not in (None, k.shape[1] * k.shape[3]):
            raise ValueError(f"key_width must be {k.shape[1]} heads · {k.shape[3]}, got {self.key_width}")
        return hidden

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        sizes = f"dim={self.dim}, top_k={self.top_k}, heads={self.heads}, head_dim={self.head_dim}"
        rest = f"rope_dim={self.rope_dim}, key_width={self.key_width}, warm_up={self.warm_up}, within={self.within}"
        return f"{sizes}, {rest}"


def indexer_kl(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    index_q: Float[Tensor, "B L J c"],
    index_k: Float[Tensor, "B S c"],
    weight: Float[Tensor, "B L J"],
    selection: TokenSelection | None,
    *,
    key_mask: Bool[Tensor, "B S"] | None = None,
    within: Pattern | None = None,
    scoring: ScoreOptions = PLAIN,
) -> Float[Tensor, ""]:
    """Mean over real queries of KL(p_t ‖ softmax I_t), over the selected tokens, or without selection over all
    earlier ones, of those that ``within`` shows. A query that sees nothing has none.

    p_t: softmax(q kᵀ / √d) over the same tokens, summed over heads and divided by its sum. DeepSeek-V3.2, eq. 3 and 4.
    scoring: softcap and ALiBi of these scores; nothing of p_t is dropped.
    Gradients reach the indexer's three tensors alone; they are computed with the loss, a stretch of queries at a time,
    so that no L×S tensor is kept. 0 without queries.
    """
    length, keys = index_q.shape[1], index_k.shape[1]
    options, first = replace(scoring, dropout=0.0).for_call(q), keys - length
    real = index_q.new_ones(q.shape[0], length) if key_mask is None else key_mask[:, keys - length :].to(index_q.dtype)

    def part_loss(part: slice, index_q: Tensor, index_k: Tensor, weight: Tensor) -> Tensor:
        rows, at = q[:, :, part].detach(), first + part.start
        if selection is None:
            seen = _visible(part, length, keys, key_mask, within, q.device)
            scores = index_scores(index_q, index_k, weight)
            target = _head_mean(rows, k.detach(), seen, at, options)
        else:
            tokens = selection.tokens[:, 0, part]
            seen = tokens >= 0
            scores = torch.einsum("bljn,blj->bln", _at(index_q, index_k, tokens).relu(), weight)
            target = _head_mean_at(rows, k.detach(), tokens, at, options)
        return (_divergence(target, scores, seen) * real[:, part]).sum() / real.sum().clamp(min=1)

    # the target has a score for every attention head, and gathered keys where tokens are listed
    share = -(-q.shape[1] // index_q.shape[2])
    width = keys * share if selection is None else selection.tokens.shape[3] * (share + q.shape[3])
    loss: Tensor = applied(_InParts, index_q, index_k, weight, part_loss, list(_stretches(index_q, width)))
    return loss


def _divergence(target: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
    """KL(target ‖ softmax of the seen scores) of each query [B, l]."""
    found = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
    return (torch.xlogy(target, target) - target * found).sum(-1)


class _InParts(torch.autograd.Function):
    """A sum of losses over stretches of queries, whose gradients are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, weight: Tensor, part_loss: Callable[..., Tensor], parts: list[slice]
    ) -> Tensor:
        total, d_q, d_k, d_weight = q.new_zeros(()), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(weight)
        for part in parts:
            leaves = [x.detach().requires_grad_() for x in (q[:, part], k, weight[:, part])]
            with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                loss = part_loss(part, *leaves)
            d_q[:, part], grad, d_weight[:, part] = torch.autograd.grad(loss, leaves)
            d_k += grad
            total += loss.detach()
        ctx.save_for_backward(d_q, d_k, d_weight)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * x for x in ctx.saved_tensors), None, None


def _stretches(q: Tensor, width: int) -> Iterator[slice]:
    """Stretches of queries whose scores with ``width`` tokens fit ELEMENTS, for all heads of the indexer."""
    step = max(1, ELEMENTS // max(1, q.shape[0] * q.shape[2] * width))
    for first in range(0, q.shape[1], step):
        yield slice(first, min(first + step, q.shape[1]))


def _visible(
    part: slice, length: int, keys: int, key_mask: Tensor | None, within: Pattern | None, device: torch.device
) -> Tensor:
    """[1 or B, queries of the part, S]: real keys up to the query, of those that ``within`` shows."""
    seen = allowed(within, part.start + keys - length, part.stop - part.start, keys, device)
    return seen if key_mask is None else seen & key_mask[:, None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at(q: Tensor, k: Tensor, tokens: Tensor) -> Tensor:
    """q [B, l, J, c] times the listed rows of k [B, S, c]: [B, l, J, n]."""
    batch = torch.arange(k.shape[0], device=k.device)[:, None, None]
    return q @ k[batch, tokens.clamp(min=0)].mT


@torch.no_grad()
def _head_mean(q: Tensor, k: Tensor, seen: Tensor, first: int, options: ScoreOptions) -> Tensor:
    """[B, l, S]: attention probabilities over the seen keys, averaged over heads; zeros where a query sees nothing.
    first: position of the first of these queries."""
    grouped = _wide(q).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bhgld,bhsd->bhgls", grouped, _wide(k)) / sqrt(q.shape[-1])
    _score(scores, first, torch.arange(k.shape[2], device=k.device), options)
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1).mean((1, 2)) * seen


@torch.no_grad()
def _head_mean_at(q: Tensor, k: Tensor, tokens: Tensor, first: int, options: ScoreOptions) -> Tensor:
    """[B, l, n]: the same over the listed tokens, one key head at a time."""
    groups, shares = q.shape[1] // k.shape[1], []
    for head in range(k.shape[1]):
        own = slice(head * groups, (head + 1) * groups)
        scores = _at(_wide(q[:, own]).transpose(1, 2), _wide(k[:, head]), tokens) / sqrt(q.shape[-1])
        mine = options if options.alibi is None else replace(options, alibi=options.alibi[own])
        _score(scores.transpose(1, 2), first, tokens[:, None], mine)
        masked = scores.masked_fill((tokens < 0)[:, :, None], torch.finfo(scores.dtype).min)
        shares.append(masked.softmax(-1).sum(2))
    return torch.stack(shares).sum(0) * (tokens >= 0) / q.shape[1]


def _score(scores: Tensor, first: int, keys: Tensor, options: ScoreOptions) -> None:
    """Cap scores [B, H, l, n] or [B, Hkv, G, l, n] and add the bias, in place; keys: positions, which broadcast."""

    def pairs() -> Pairs:
        heads = scores.shape[1:-2]
        head = torch.arange(heads.numel(), device=scores.device).view(*heads, 1, 1)
        # a score has no term of its sequence
        return Pairs(head[:0], head, torch.arange(scores.shape[-2], device=scores.device)[:, None] + first, keys)

    options.score_(scores, pairs)
