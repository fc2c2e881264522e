"""q, k, v and a pattern → the output, by a backend that the caller names or that ``explain_backend`` explains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.backends.flex import flex_attend
from sparse_attn.backends.folded import folded
from sparse_attn.backends.plan import Plan, make_plan
from sparse_attn.backends.reference import reference
from sparse_attn.backends.scoring import Scoring
from sparse_attn.backends.sdpa import sdpa_masked, sdpa_unmasked
from sparse_attn.backends.triton import triton_attend
from sparse_attn.checking import check_least, check_options, check_pattern, check_tensor, check_tensors
from sparse_attn.choice import Choice, attend_choice
from sparse_attn.heads import over_heads, side_by_side
from sparse_attn.layout import BlockLayout
from sparse_attn.patterns import Pattern, PerHead, causal, full, per_head
from sparse_attn.patterns.documents import split_documents

# Side of a block of the folded backend.
BLOCK = 64
# Side of a block of flex_attention, whose tiles divide it.
FLEX_BLOCK = 128
FEW_PAIRS = 1 << 15  # below this many pairs a dense mask costs less than walking blocks
# From so many pairs on blocks cost less than torch's attention with dropout, which on the CPU keeps every probability.
MANY_PAIRS = 1 << 20


@dataclass(frozen=True)
class BackendChoice:
    """What ``backend="auto"`` takes, and why. pairs: "all", "causal" or "masked", how the sdpa backend is called;
    "documents" where each document is a call of its own, for which "auto" chooses again; "heads" where each pattern is,
    with the heads that have it: then ``heads`` holds the choice for each query head."""

    backend: str
    pairs: str
    reason: str
    heads: tuple["BackendChoice", ...] = ()


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Sequence[Pattern] | None = ...,
    layout: BlockLayout | Choice | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    query_positions: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    dropout: float = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
) -> Tensor:
    """The output alone."""


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern | Sequence[Pattern] | None = ...,
    layout: BlockLayout | Choice | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    alibi: Tensor | None = ...,
    query_positions: Tensor | None = ...,
    key_positions: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    dropout: float = ...,
    backend: str = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of each query."""


def attend(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    *,
    pattern: Pattern | Sequence[Pattern] | None = None,
    layout: BlockLayout | Choice | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi: Float[Tensor, "H"] | None = None,
    query_positions: Int[Tensor, "L"] | Int[Tensor, "B L"] | None = None,
    key_positions: Int[Tensor, "S"] | Int[Tensor, "B S"] | None = None,
    key_mask: Bool[Tensor, "B S"] | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
) -> Float[Tensor, "B H L d_v"] | tuple[Float[Tensor, "B H L d_v"], Float[Tensor, "B H L"]]:
    """softmax(scale · q kᵀ over the visible keys) v. Query head h reads key head h // (H / Hkv).

    pattern: which keys a query sees; None: all. A sequence, or ``per_head(…)``, has one for each query head; heads of
    equal pattern attend together. layout: its blocks instead, built once, or what a selection chose (BlockSelection,
    TokenSelection, Buckets), which "auto" visits and "reference" turns into a mask.
    scale: 1/√d if None. softcap: scores become softcap · tanh(score / softcap). alibi: slope of each query head, then
    -slope · |i - j| is added to the score (``alibi_slopes``).
    Positions: keys sit at 0 … S-1 and queries at S-L … S-1 unless given (a cache gives its own);
    [B, L] and [B, S] give each sequence its own, by a dense mask.
    key_mask: False for padding, which nobody sees. dropout: on the probabilities; pass 0 in evaluation.
    return_lse: also log Σ exp(score) over the visible keys, float32 at least, differentiable; -inf where none.
    A query that sees nothing gives zeros, with zero gradient. Results agree between backends to rounding.
    backend: "triton" (CUDA, or interpreted for tests) computes the same blocks as "folded", without dropout, softcap
    and alibi; "flex" is torch's compiled flex_attention (CUDA; CPU without gradients, where it was measured slower than
    "folded"), without dropout. "auto" takes neither, as no GPU was at hand to time them.

    >>> attend(q, k, v, pattern=causal() & (sliding_window(256) | sinks(4)))

    Under torch.compile, full() and causal() stay in the graph; another pattern, or a key_mask, is one graph break.
    NaN in, NaN out holds for folded and reference; torch's own SDPA kernel on CPU may hide NaN in q where L < 16.

    Raises: ValueError naming the argument, its bound and its value.
    """
    q, k, v = _autocast(q, k, v)
    check_tensors(q, k, v, key_mask, query_positions, key_positions)
    check_pattern(pattern)
    seen = per_head(*pattern) if isinstance(pattern, Sequence) else pattern
    check_options(
        q, k, seen, layout, query_positions, key_positions, scale, softcap, alibi, dropout, backend, return_lse
    )
    scoring = Scoring(1 / sqrt(max(q.shape[-1], 1)) if scale is None else float(scale), softcap, alibi)
    if layout is not None and not isinstance(layout, BlockLayout):
        both = attend_choice(q, k, v, layout, scoring, key_mask, dropout, backend)
        return both if return_lse else both[0]
    call = _Call(layout, query_positions, key_positions, key_mask, dropout, backend, return_lse)
    if isinstance(seen, PerHead):

        def part(one: Pattern, heads: list[int], rows: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
            return _attend(rows, keys, values, one, scoring.of_heads(heads), call)

        results = over_heads(part, q, k, v, seen.heads)
    else:
        results = _attend(q, k, v, full() if seen is None else seen, scoring, call)
    return (results[0], results[1]) if return_lse else results[0]


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of attend that are the same for all heads."""

    layout: BlockLayout | None
    query_positions: Tensor | None
    key_positions: Tensor | None
    key_mask: Tensor | None
    dropout: float
    backend: str
    return_lse: bool

    @property
    def bare(self) -> bool:
        """Whether the lengths and the pattern alone say what is visible, and torch's own attention may do."""
        given = (self.layout, self.query_positions, self.key_positions, self.key_mask)
        return not self.return_lse and self.backend in ("auto", "sdpa") and all(part is None for part in given)


def _attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scoring: Scoring, call: _Call) -> list[Tensor]:
    """One pattern for all heads: the output, and the log-sum-exp if asked."""
    fits = call.backend == "sdpa" or not _keeps_all(q, k, call.dropout)
    if call.bare and scoring.plain and _is_dense(pattern, q.shape[2], k.shape[2]) and fits:
        return [sdpa_unmasked(q, k, v, scale=scoring.scale, causal=pattern == causal(), dropout=call.dropout)]
    apart = _apart(pattern, q.shape[2], k.shape[2]) if call.bare and call.backend == "auto" else None
    if apart is not None:
        sizes, inside = apart
        rows, keys, values = (x.split(list(sizes), dim=2) for x in side_by_side(q, k, v))
        outs = [_attend(a, b, c, inside, scoring, call)[0] for a, b, c in zip(rows, keys, values, strict=True)]
        return [torch.cat(outs, dim=2)]
    out, lse = _by_pattern(q, k, v, pattern, scoring, call)
    return [out, lse] if call.return_lse else [out]


@lru_cache(maxsize=32)
def _apart(pattern: Pattern, q_len: int, kv_len: int) -> tuple[tuple[int, ...], Pattern] | None:
    """Documents that are worth a call each: lengths, and the pattern inside one. None where blocks do as well."""
    split = split_documents(pattern, q_len) if q_len == kv_len else None
    return split if split is not None and 0 < len(split[0]) * BLOCK <= q_len else None


# The one graph break of a compiled model: each attention layer whose pattern is neither full() nor causal(), or that
# has a key mask.
@torch.compiler.disable(reason="sparse_attn walks the blocks of a sparse pattern in Python")
def _by_pattern(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scoring: Scoring, call: _Call
) -> tuple[Tensor, Tensor]:
    q_len, kv_len = q.shape[2], k.shape[2]
    place = _place(q_len, kv_len, call.query_positions, call.key_positions)
    choice = _choose(
        pattern,
        call.layout is not None,
        q_len,
        kv_len,
        place,
        call.key_mask is not None,
        call.return_lse,
        scoring.slopes is not None,
        scoring.softcap is not None,
        _keeps_all(q, k, call.dropout),
    )
    name = choice.backend if call.backend == "auto" else call.backend
    if name in ("folded", "flex", "triton"):
        if place is None:
            raise ValueError(f"backend={name!r} needs consecutive positions, keys from 0 on: use 'sdpa' or 'reference'")
        if name == "flex":
            layout = _layout(pattern, q_len, kv_len, place, FLEX_BLOCK) if call.layout is None else call.layout
            return flex_attend(
                q, k, v, layout, scoring=scoring, key_mask=call.key_mask, dropout=call.dropout,
                return_lse=call.return_lse,
            )  # fmt: skip
        if name == "triton":
            layout = _plan(pattern, q_len, kv_len, place).layout if call.layout is None else call.layout
            return triton_attend(q, k, v, layout, scale=scoring.scale, key_mask=call.key_mask, dropout=call.dropout)
        plan = make_plan(call.layout) if call.layout is not None else _plan(pattern, q_len, kv_len, place)
        return folded(q, k, v, plan, scoring=scoring, key_mask=call.key_mask, dropout=call.dropout)
    if name == "sdpa" and choice.pairs == "causal":
        return sdpa_unmasked(q, k, v, scale=scoring.scale, causal=True, dropout=call.dropout), q.new_empty(0)
    mask = _mask(pattern, q_len, kv_len, q.device, call)
    bias = scoring.bias(*_positions(q_len, kv_len, q.device, call), q)
    if name == "reference":
        return reference(q, k, v, mask, scale=scoring.scale, softcap=scoring.softcap, bias=bias, dropout=call.dropout)
    return sdpa_masked(q, k, v, mask, scale=scoring.scale, bias=bias, dropout=call.dropout), q.new_empty(0)


def explain_backend(
    pattern: Pattern | Sequence[Pattern] | None,
    q_len: int,
    kv_len: int | None = None,
    *,
    query_positions: Int[Tensor, "L"] | None = None,
    key_positions: Int[Tensor, "S"] | None = None,
    key_mask: bool = False,
    return_lse: bool = False,
    alibi: bool = False,
    softcap: bool = False,
    dropout: bool = False,
) -> BackendChoice:
    """What ``attend(..., backend="auto")`` would run for such a call on the CPU, and why. key_mask, alibi, softcap,
    dropout: whether the call has one. Raises: ValueError on a negative length, or what is no pattern.

    >>> explain_backend(causal() & sliding_window(256), 4096).backend
    'folded'
    >>> [head.backend for head in explain_backend(per_head(causal(), causal() & sinks(4)), 4096).heads]
    ['sdpa', 'folded']
    """
    keys = q_len if kv_len is None else kv_len
    for name, length in (("q_len", q_len), ("kv_len", keys)):
        check_least(name, length, 0)
    check_pattern(pattern)
    place = _place(q_len, keys, query_positions, key_positions)
    bare = query_positions is None and key_positions is None and not (key_mask or return_lse)

    def one(seen: Pattern) -> BackendChoice:
        apart = _apart(seen, q_len, keys) if bare else None
        if apart is not None:
            return BackendChoice(
                "auto", "documents", f"each of {len(apart[0])} documents attends by itself: {apart[1]}"
            )
        keeps_all = dropout and q_len * keys >= MANY_PAIRS
        return _choose(seen, False, q_len, keys, place, key_mask, return_lse, alibi, softcap, keeps_all)

    seen = per_head(*pattern) if isinstance(pattern, Sequence) else pattern
    return _by_heads(one, seen) if isinstance(seen, PerHead) else one(full() if seen is None else seen)


def _by_heads(one: Callable[[Pattern], BackendChoice], pattern: PerHead) -> BackendChoice:
    chosen = {head: one(head) for head in dict.fromkeys(pattern.heads)}
    each = "; ".join(f"{head} by {choice.backend}, {choice.reason}" for head, choice in chosen.items())
    reason = f"heads of equal pattern attend together: {each}"
    return BackendChoice("auto", "heads", reason, tuple(chosen[head] for head in pattern.heads))


# Positions of the first query and the first key, or None where positions are scattered or keys' negative.
_Place = tuple[int, int] | None


@lru_cache(maxsize=256)
def _choose(
    pattern: Pattern,
    has_layout: bool,
    q_len: int,
    kv_len: int,
    place: _Place,
    key_mask: bool,
    return_lse: bool,
    alibi: bool,
    softcap: bool,
    keeps_all: bool,
) -> BackendChoice:
    dense = "reference" if return_lse or softcap else "sdpa"
    bare = not (key_mask or return_lse or alibi or softcap or keeps_all)
    if has_layout:
        return BackendChoice("folded", "masked", "a layout was given")
    if place is None:
        return BackendChoice(dense, "masked", "positions are scattered or negative: blocks are no intervals of them")
    if bare and pattern == full():
        return BackendChoice("sdpa", "all", "every key is visible")
    if bare and _is_plain_causal(pattern, q_len, kv_len, place):
        return BackendChoice("sdpa", "causal", "exactly the keys j <= i are visible")
    if q_len * kv_len <= FEW_PAIRS:
        return BackendChoice(dense, "masked", f"{q_len}x{kv_len} pairs are few")
    if keeps_all:
        return BackendChoice("folded", "masked", "torch's attention would keep every probability for dropout")
    return BackendChoice("folded", "masked", "only the visited blocks are computed")


def _keeps_all(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether torch's attention would hold L·S probabilities, and many: its CPU kernel knows no dropout."""
    many = q.shape[2] * k.shape[2] >= MANY_PAIRS
    return dropout > 0 and many and q.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_dense(pattern: Pattern, q_len: int, kv_len: int) -> bool:
    """Whether torch's own attention computes nothing in vain."""
    return pattern == full() or (pattern == causal() and q_len == kv_len)


def _is_plain_causal(pattern: Pattern, q_len: int, kv_len: int, place: tuple[int, int]) -> bool:
    """Whether, at these lengths, the pattern is exactly j ≤ i (a window longer than the sequence is)."""
    if q_len != kv_len or place[0] != place[1] or not pattern.is_causal:
        return False
    if pattern == causal():
        return True
    layout = _plan(pattern, q_len, kv_len, place).layout
    return layout.visible_pairs() == q_len * (q_len + 1) // 2


@lru_cache(maxsize=32)
def _plan(pattern: Pattern, q_len: int, kv_len: int, place: tuple[int, int]) -> Plan:
    # Keyed by geometry, not by tensors: the same few lengths come back at every step and every layer.
    return make_plan(_layout(pattern, q_len, kv_len, place, BLOCK))


@lru_cache(maxsize=32)
def _layout(pattern: Pattern, q_len: int, kv_len: int, place: tuple[int, int], block: int) -> BlockLayout:
    return pattern.layout(q_len, kv_len, block=block, offset=place[0], key_offset=place[1])


def _place(q_len: int, kv_len: int, query_positions: Tensor | None, key_positions: Tensor | None) -> _Place:
    query, key = _first(query_positions, kv_len - q_len), _first(key_positions, 0)
    # what a pattern reaches is told from position 0 on
    return None if query is None or key is None or key < 0 else (query, key)


def _first(positions: Int[Tensor, "*#B n"] | None, default: int) -> int | None:
    """The first of consecutive positions; None if they are not consecutive, or each sequence has its own."""
    if positions is None or positions.numel() == 0:
        return default
    if positions.dim() == 2:
        return None
    return int(positions[0]) if bool((positions.diff() == 1).all()) else None


def _positions(q_len: int, kv_len: int, device: torch.device, call: _Call) -> tuple[Tensor, Tensor]:
    """Where queries and keys sit: as given, as the layout says, or the last query at the last key."""
    first, key_first = kv_len - q_len, 0
    if call.layout is not None:
        first, key_first = call.layout.offset, call.layout.key_offset
    query, key = call.query_positions, call.key_positions
    query = torch.arange(first, first + q_len, device=device) if query is None else query
    key = torch.arange(key_first, key_first + kv_len, device=device) if key is None else key
    # Sequences with positions of their own: the other side must have a batch dimension too.
    batched = query.dim() == 2 or key.dim() == 2
    return (torch.atleast_2d(query), torch.atleast_2d(key)) if batched else (query, key)


def _mask(pattern: Pattern, q_len: int, kv_len: int, device: torch.device, call: _Call) -> Bool[Tensor, "#B 1 L S"]:
    """The truth for every pair."""
    if call.layout is not None:
        truth = call.layout.to_mask().to(device)
    else:
        query, key = _positions(q_len, kv_len, device, call)
        truth = pattern.visible(query[..., None], key[..., None, :])
    truth = truth[:, None] if truth.dim() == 3 else truth[None, None]
    return truth if call.key_mask is None else truth & call.key_mask[:, None, None, :]


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """As torch's own attention does: lower precision under autocast, float64 left alone."""
    for name, given in zip("qkv", tensors, strict=True):
        check_tensor(name, given)
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    target = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(target) for tensor in tensors]
