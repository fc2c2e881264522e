"""Streaming: positions are counted inside the cache, so that decoding goes on for ever within the trained positions."""

import re
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_attn.attend import attend
from sparse_attn.cache import KVCache
from sparse_attn.merging import merge
from sparse_attn.patterns import Pattern, causal, sinks, sliding_window
from sparse_attn.ragged_cache import RaggedKVCache

Rotate = Callable[[Tensor, Tensor], Tensor]


def window_and_sinks(pattern: Pattern) -> tuple[int, int]:
    """(w, n) of ``causal() & (sliding_window(w) | sinks(n))``; n = 0 for ``causal() & sliding_window(w)``.

    Raises: ValueError for another pattern: what its keys' places in a cache would be, no paper says.
    """
    text = str(pattern)
    found = [re.search(rf"{name}\((\d+)\)", text) for name in ("sliding_window", "sinks")]
    w, n = (int(match[1]) if match else 0 for match in found)
    if w and n:
        seen = [sliding_window(w) | sinks(n), sinks(n) | sliding_window(w)]
    else:
        seen = [sliding_window(w)] if w else []
    if not any(pattern in (causal() & one, one & causal()) for one in seen):
        raise ValueError(
            f"streaming needs the pattern causal() & (sliding_window(w) | sinks(n)) or causal() & sliding_window(w), "
            f"got {pattern}"
        )
    return w, n


def attend_streaming(
    q: Float[Tensor, "B H L d"],
    k: Float[Tensor, "B Hkv S d"],
    v: Float[Tensor, "B Hkv S d_v"],
    *,
    pattern: Pattern,
    rotate: Rotate | None,
    query_positions: Int[Tensor, "L"] | Int[Tensor, "B L"],
    key_positions: Int[Tensor, "S"] | Int[Tensor, "B S"],
    key_mask: Bool[Tensor, "B S"] | None = None,
    softcap: float | None = None,
    alibi: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H L d_v"]:
    """Attention over a window of w keys and n sinks where q and k, given before RoPE, turn by their place in the cache.

    Query i sees what the pattern shows it in the text, c = min(i, w + n − 1) keys before itself. It stands at place c,
    key j of the window at c − (i − j), sink j at j: no place is ever beyond w + n − 1, and between sinks and window
    there is no gap (Xiao et al. 2024, §3.2, arXiv:2309.17453). Until w + n tokens this is the exact mode.

    A score depends on the difference of two places alone, which is i − j inside the window. So a chunk turns its keys
    once, and its queries twice: by i for the window, by c for the sinks. rotate(x, places): RoPE at integer places,
    [n] or [B, n]. Equal to L chunks of one query. Differentiable. softcap: as in :func:`attend`.
    alibi: slope of each query head, with rotate=None: the bias is of the distance of two places.
    Raises: ValueError for another pattern, or unless one of rotate and alibi is None.
    """
    window, count = window_and_sinks(pattern)
    if rotate is None:
        where = (query_positions, key_positions)
        return _by_distance(q, k, v, window, count, where, key_mask, softcap, alibi)
    if alibi is not None:
        raise ValueError("rotate must be None with alibi, which gives the positions")
    if not q.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    last = window + count - 1
    # positions of the text grow without bound, and with them the rounding error of an angle
    shift = (query_positions[..., :1] - last).clamp_min(0)
    is_sink = key_positions < count
    keys = rotate(k, torch.where(is_sink, key_positions, key_positions - shift))
    near, far = query_positions - shift, query_positions.clamp_max(last)
    queries, scale = rotate(q, near), q.shape[-1] ** -0.5
    if not near.equal(far):
        queries = torch.cat([queries, rotate(q, far)], -1)
        sink = is_sink[None, None, :, None] if is_sink.dim() == 1 else is_sink[:, None, :, None]
        keys = torch.cat([keys.masked_fill(sink, 0), keys.masked_fill(~sink, 0)], -1)
    return attend(
        queries, keys, v, pattern=pattern, scale=scale, query_positions=query_positions, key_positions=key_positions,
        key_mask=key_mask, softcap=softcap,
    )  # fmt: skip


def _by_distance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    count: int,
    where: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    softcap: float | None,
    alibi: Tensor | None,
) -> Float[Tensor, "B H L d_v"]:
    """The window by distances in the text, the sinks by those in the cache, merged by their log-sum-exp."""
    at, held = where

    def part(pattern: Pattern, at: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        rows = among.expand(k.shape[0], -1)
        seen = rows if key_mask is None else rows & key_mask
        return attend(
            q, k, v, pattern=pattern, query_positions=at, key_positions=held, key_mask=seen, softcap=softcap,
            alibi=alibi, return_lse=True,
        )  # fmt: skip

    near = part(causal() & sliding_window(window), at, held >= count)
    if not count:
        return near[0]
    far = part(causal() & sinks(count), at.clamp_max(window + count - 1), held < count)
    return merge((near[0], far[0]), (near[1], far[1]))[0]


class StreamingKVCache:
    """Keys before RoPE, and values, of one attention layer in the streaming mode: :func:`attend_streaming`.

    pattern: ``causal() & (sliding_window(w) | sinks(n))``, or without sinks. rotate, softcap, alibi: as there. At most
    w + n + slack keys are held between steps, and no angle is larger than theirs, however long the text.
    unequal: each sequence of a batch counts its own positions (left-padded prompts), given to ``attend``.
    Raises: ValueError for another pattern, or slack < 0.

    >>> cache = StreamingKVCache(pattern, rotate)
    >>> out = cache.attend(q, k, v)
    """

    def __init__(
        self,
        pattern: Pattern,
        rotate: Rotate | None,
        *,
        slack: int = 64,
        unequal: bool = False,
        softcap: float | None = None,
        alibi: Float[Tensor, "H"] | None = None,
    ) -> None:
        window_and_sinks(pattern)
        self.pattern, self.rotate, self.softcap, self.alibi = pattern, rotate, softcap, alibi
        self._store = RaggedKVCache(pattern, slack=slack) if unequal else KVCache(pattern, slack=slack)

    @property
    def held(self) -> int:
        """How many keys are held; of the longest sequence, if they are unequal."""
        return self._store.held if isinstance(self._store, KVCache) else max(self._store.held, default=0)

    def attend(
        self,
        q: Float[Tensor, "B H n d"],
        k: Float[Tensor, "B Hkv n d"],
        v: Float[Tensor, "B Hkv n d_v"],
        *,
        key_mask: Bool[Tensor, "B n"] | None = None,
        positions: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B H n d_v"]:
        """Add the next n positions, not yet turned, and attend from them. key_mask: False for padding.

        positions: where the rows of an ``unequal`` cache stand in their own texts; those of padding do not matter.
        Raises: ValueError if shapes or types differ from those held, or positions are given to a cache of equal rows,
        or not given to the other.
        """
        if isinstance(self._store, KVCache):
            if positions is not None:
                raise ValueError("positions must be None unless the cache is unequal=True")
            where = torch.arange(self._store.length, self._store.length + q.shape[2], device=q.device)
            keys, values, held = self._store.append(k, v, key_mask=key_mask)
            return self._attend(q, keys, values, where, held, self._store.key_mask)
        if positions is None:
            raise ValueError("positions must be given to a cache that is unequal=True, got None")
        real = torch.ones_like(positions, dtype=torch.bool) if key_mask is None else key_mask
        if positions.shape[1]:  # padding stands with the first token: a row's angles are counted from its first column
            first = positions.masked_fill(~real, torch.iinfo(positions.dtype).max).amin(1, keepdim=True)
            positions = positions.where(real, first.where(real.any(1, keepdim=True), 0))
        keys, values, held, seen = self._store.append(k, v, positions, real)
        return self._attend(q, keys, values, positions, held, seen)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, where: Tensor, held: Tensor, key_mask: Tensor | None
    ) -> Float[Tensor, "B H n d_v"]:
        return attend_streaming(
            q, k, v, pattern=self.pattern, rotate=self.rotate, query_positions=where, key_positions=held,
            key_mask=key_mask, softcap=self.softcap, alibi=self.alibi,
        )  # fmt: skip
