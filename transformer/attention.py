"""Projections, positions by RoPE or ALiBi, and grouped-query attention under any pattern."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moe.dropout import HeadDropout, drop_connect
from moe.noise import Source
from moe.thresholded_linear import AttentionThresholds, ThresholdedLinear
from sparse_attn import KVCache, Pattern, RaggedKVCache, StreamingKVCache, attend, causal
from sparse_attn.selection import ScoreOptions
from transformer.attention_dropout import drawn_from, refuse_recomputation, seeds_from
from transformer.attention_selection import attend_chosen
from transformer.norm import RMSNorm
from transformer.rope import RopeScaling, frequencies


def rotary_angles(
    positions: Int[Tensor, "..."], head_dim: int, *, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> tuple[Float[Tensor, "... P"], Float[Tensor, "... P"]]:
    """cos and sin of ``position · theta^(−2i/head_dim)`` for i in [0, head_dim/2): float32 [..., head_dim/2].

    Su et al. 2021, arXiv:2104.09864, eq. 15. scaling: changes the frequencies, :func:`transformer.rope.frequencies`.
    """
    steps = frequencies(head_dim, theta=theta, scaling=scaling, device=positions.device)
    angles = positions[..., None].float() * steps
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "B H L d"], angles: tuple[Float[Tensor, "..."], Float[Tensor, "..."]]
) -> Float[Tensor, "B H L d"]:
    """Turn the channel pairs (i, i + d/2) of each head by their angle; the layout of Llama checkpoints.

    angles: cos and sin [L, d/2] or [B, L, d/2], from :func:`rotary_angles`.
    """
    cos, sin = (a.to(x.dtype).unsqueeze(-3) for a in angles)
    if torch.compiler.is_compiling():  # the compiler fuses these passes itself
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _Rotate.apply(x, cos, sin)


def turn(
    x: Float[Tensor, "B H n d"],
    places: Int[Tensor, "n"] | Int[Tensor, "B n"],
    *,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "B H n d"]:
    """:func:`rotate` by the angles of these places: how a streaming cache turns what it holds."""
    return rotate(x, rotary_angles(places, x.shape[-1], theta=theta, scaling=scaling))


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation back: nothing but the angles is saved."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out


class Attention(nn.Module):
    """Multi-head attention with positions by RoPE or ALiBi: query head h uses key-value head ``h // (H / H_kv)``.

    dim: width in and out. num_heads, num_kv_heads, head_dim: as in :class:`AttentionConfig`. pattern: which keys a
    query sees. qk_norm: RMSNorm of queries and keys before they turn, over each head ("head", one weight for all heads;
    Henry et al. 2020, arXiv:2010.04245, normalise so by length) or over all heads at once ("full"); norm_eps: its eps.
    head_dropout, drop_connect: rates of dropping heads and projection weights in training.
    bias: whether the projections to queries, keys and values have one (Qwen2); the output projection has none.
    selection: a module of :mod:`sparse_attn.selection` that attends instead, to keys that it chooses; with causal().
    Where its queries are keys (shared_qk) there is no projection to queries.
    thresholds: up to which the projections' inputs count as zero (:class:`moe.ThresholdedLinear`); None leaves all.
    softcap, dropout: of :func:`sparse_attn.attend`, the latter in training. alibi: slope of each query head, for
    positions by ALiBi; None: by RoPE. A selection has all three on the scores of the keys that it chose.
    Raises ValueError for another qk_norm, or a rate outside [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        pattern: Pattern,
        *,
        qk_norm: str = "none",
        norm_eps: float = 1e-6,
        bias: bool = False,
        head_dropout: float = 0.0,
        drop_connect: float = 0.0,
        selection: nn.Module | None = None,
        thresholds: AttentionThresholds | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        alibi: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        # numbers, no buffer: slopes stay float32 in a bfloat16 model, and are in no checkpoint
        self.softcap, self.dropout, self.alibi = softcap, dropout, None if alibi is None else tuple(alibi)
        self.head_dropout, self.drop_connect = HeadDropout(head_dropout), drop_connect
        self.num_heads, self.num_kv_heads, self.head_dim, self.pattern = num_heads, num_kv_heads, head_dim, pattern
        shared = selection is not None and getattr(selection, "shared_qk", False)
        self.query = None if shared else _linear(dim, num_heads * head_dim, bias, thresholds, "query")
        self.key = _linear(dim, num_kv_heads * head_dim, bias, thresholds, "key")
        self.value = _linear(dim, num_kv_heads * head_dim, bias, thresholds, "value")
        for linear in (self.query, self.key, self.value):
            if linear is not None and linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.output = _linear(num_heads * head_dim, dim, False, thresholds, "output")
        self.selection = selection
        if qk_norm not in ("none", "head", "full"):
            raise ValueError(f"qk_norm must be one of none, head, full, got {qk_norm!r}")
        self.qk_norm = qk_norm
        heads = (1, 1) if qk_norm == "head" else (num_heads, num_kv_heads)
        self.query_norm = RMSNorm(heads[0] * head_dim, eps=norm_eps) if qk_norm != "none" and not shared else None
        self.key_norm = RMSNorm(heads[1] * head_dim, eps=norm_eps) if qk_norm != "none" else None

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        angles: tuple[Tensor, Tensor] | None,
        *,
        token_mask: Bool[Tensor, "B L"] | None = None,
        cache: KVCache | RaggedKVCache | StreamingKVCache | None = None,
        positions: Int[Tensor, "B L"] | None = None,
        generator: Source | None = None,
    ) -> tuple[Float[Tensor, "B L D"], dict[str, Float[Tensor, ""]]]:
        """x [B, L, dim] to the same shape, and the side losses of the selection, by name: none without one.

        angles: from :func:`rotary_angles` for these positions, not read with ALiBi; token_mask: False marks padding,
        which no query sees. cache: earlier keys and values; it receives these. positions: where the rows stand, where
        they do not follow each other: ascending in each sequence, padding last (or first, with a cache); a cache is
        then a RaggedKVCache, or a StreamingKVCache of unequal rows. A StreamingKVCache turns queries and keys itself.
        generator: draws the heads, weights and probabilities that are dropped. Under activation checkpointing it is a
        :class:`moe.Noise`, or None. Raises: ValueError for a torch.Generator in a recomputation, which drops otherwise.
        """
        if self.training and (self.dropout or self.drop_connect or self.head_dropout.p):
            refuse_recomputation(generator)
        losses: dict[str, Tensor] = {}
        q, k, v = self._projected(x, generator)
        if isinstance(cache, StreamingKVCache):
            mixed = cache.attend(q, k, v, key_mask=token_mask, positions=positions)
            return self._out(mixed, generator), losses
        if self.alibi is None:
            if angles is None:
                raise ValueError("angles must be given to an attention without ALiBi, got None")
            q, k = rotate(q, angles), rotate(k, angles)
        if self.selection is not None:
            mixed, losses = attend_chosen(
                self.selection, q, k, v, x, token_mask=token_mask, cache=cache, positions=positions,
                scoring=self._scoring(q, generator),
            )  # fmt: skip
        elif positions is not None:
            mixed = self._scattered(q, k, v, positions, token_mask, cache, generator)
        elif cache is None:
            mixed = self._attend(q, k, v, generator, key_mask=token_mask)
        elif isinstance(cache, KVCache):
            mixed = self._cached(q, k, v, token_mask, cache, generator)
        else:
            raise ValueError("positions must be given with a RaggedKVCache, got None")
        return self._out(mixed, generator), losses

    def _projected(self, x: Tensor, generator: Source | None) -> tuple[Tensor, Tensor, Tensor]:
        q = None
        if self.query is not None:
            q = self._heads(self._project(self.query, x, "query", generator), self.query_norm)
        k = self._heads(self._project(self.key, x, "key", generator), self.key_norm)
        v = _split(self._project(self.value, x, "value", generator), self.head_dim)
        return k if q is None else q, k, v

    def _out(self, mixed: Float[Tensor, "B H L d"], generator: Source | None) -> Float[Tensor, "B L D"]:
        kept = self.head_dropout(mixed, generator=generator).transpose(1, 2).flatten(2)
        return self._project(self.output, kept, "output", generator)

    def _slopes(self, device: torch.device) -> Float[Tensor, "H"] | None:
        return None if self.alibi is None else torch.tensor(self.alibi, device=device)

    def _scoring(self, q: Tensor, generator: Source | None) -> ScoreOptions:
        """What a selection does to its scores."""
        rate = self.dropout if self.training else 0.0
        seeds = seeds_from(generator, len(q)) if rate and generator is not None else None
        return ScoreOptions(self.softcap, self._slopes(q.device), rate, seeds)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        generator: Source | None,
        *,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        rate = self.dropout if self.training else 0.0
        slopes = self._slopes(q.device)

        def some(rows: slice | None) -> Tensor:
            return attend(
                *(_of(rows, x) for x in (q, k, v)), pattern=self.pattern, softcap=self.softcap, alibi=slopes,
                dropout=rate, query_positions=_of(rows, query_positions), key_positions=_of(rows, key_positions),
                key_mask=_of(rows, key_mask),
            )  # fmt: skip

        if not rate or generator is None:
            return some(None)
        return drawn_from(generator, some, rows=len(q), device=q.device)

    def _cached(
        self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, cache: KVCache, generator: Source | None
    ) -> Tensor:
        positions = torch.arange(cache.length, cache.length + q.shape[2], device=q.device)
        k, v, held = cache.append(k, v, key_mask=token_mask)
        return self._attend(
            q, k, v, generator, query_positions=positions, key_positions=held, key_mask=cache.key_mask
        )  # fmt: skip

    def _scattered(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        token_mask: Tensor | None,
        cache: KVCache | RaggedKVCache | None,
        generator: Source | None,
    ) -> Tensor:
        seen = token_mask
        if isinstance(cache, RaggedKVCache):
            real = torch.ones_like(positions, dtype=torch.bool) if token_mask is None else token_mask
            k, v, held, seen = cache.append(k, v, positions, real)
        elif cache is None:
            held = positions
        else:
            raise ValueError(f"cache must be a RaggedKVCache where positions are given, got {type(cache).__name__}")
        if cache is None and self.pattern == causal() and self.alibi is None:
            # rows in ascending order with padding last: the order says all, and torch's own kernel needs no mask
            return self._attend(q, k, v, generator)
        return self._attend(q, k, v, generator, query_positions=positions, key_positions=held, key_mask=seen)

    def _project(self, linear: nn.Module, x: Tensor, site: str, generator: Source | None) -> Tensor:
        return drop_connect(linear, x, self.drop_connect if self.training else 0.0, generator=generator, site=site)

    def _heads(self, x: Float[Tensor, "B L C"], norm: nn.Module | None) -> Float[Tensor, "B H L d"]:
        if norm is None:
            return _split(x, self.head_dim)
        return norm(_split(x, self.head_dim)) if self.qk_norm == "head" else _split(norm(x), self.head_dim)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        sizes = f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        scoring = f"softcap={self.softcap}, dropout={self.dropout}, alibi={self.alibi}"
        return f"{sizes}, pattern={self.pattern}, qk_norm={self.qk_norm}, {scoring}"


def _linear(inputs: int, outputs: int, bias: bool, thresholds: AttentionThresholds | None, part: str) -> nn.Linear:
    if thresholds is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return ThresholdedLinear(inputs, outputs, bias=bias, threshold=getattr(thresholds, part))


def _of(rows: slice | None, x: Tensor | None) -> Any:
    """Those of some sequences, of a tensor that begins with them: positions [n] are of all."""
    return x if x is None or rows is None or x.dim() == 1 else x[rows]


def _split(x: Float[Tensor, "B L C"], head_dim: int) -> Float[Tensor, "B H L d"]:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
