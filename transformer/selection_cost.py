"""Matrix-product FLOPs of attention whose keys are chosen by content: choosing them, and attending to them."""

from collections.abc import Callable
from typing import Any

import torch

from sparse_attn import Pattern, PerHead, causal, parse_pattern
from transformer.layer_config import AttentionConfig
from transformer.selection_config import (
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SinkhornConfig,
    TopKKeysConfig,
)


def selection_flops(dim: int, attention: AttentionConfig, length: int) -> float:
    """Forward FLOPs for a sequence of ``length``: 4·d for each head and pair that is attended to, and the choice.

    A choice costs the scores of the (query, candidate) pairs up to the query, whatever the pattern shows of them. Of
    LSH and k-means the pairs depend on the content: counted as for buckets that fill evenly. dim: width of the layer.
    Raises: KeyError for an attention without a selection.
    """
    return _COSTS[type(attention.selection)](dim, attention, attention.selection, length)


def block_pairs(length: int, block: int, blocks: int) -> int:
    """Visible pairs where a query sees its own block up to itself and ``blocks`` - 1 earlier blocks, or all there are.

    >>> block_pairs(5, 2, 2)
    13
    """
    return sum(min(i // block, blocks - 1) * block + i % block + 1 for i in range(length))


def window_pairs(length: int, window: int) -> int:
    """Visible pairs where a query sees at most ``window`` keys up to itself.

    >>> window_pairs(4, 2)
    7
    """
    inside = min(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * window


def bounded_pairs(pattern: Pattern, length: int, most: int | None = None) -> float:
    """Visible pairs under a causal pattern where a query sees at most ``most`` of the keys that it shows; of one for
    each head the mean over heads.

    >>> bounded_pairs(causal() & sliding_window(3), 5, 2)
    9.0
    """
    if isinstance(pattern, PerHead):
        return sum(bounded_pairs(head, length, most) for head in pattern.heads) / len(pattern.heads)
    if pattern == causal():
        return float(window_pairs(length, length if most is None else most))
    if most is None:
        return float(pattern.visible_pairs(length))
    layout = pattern.layout(length)
    # visible keys of every row of a visited block: the last block of keys may be short
    rows = (length - layout.key_block * layout.block).clamp(max=layout.block)[:, None].repeat(1, layout.block)
    partial = layout.mask_index >= 0
    rows[partial] = layout.masks.sum(2)[layout.mask_index[partial]]
    seen = torch.zeros(layout.num_query_blocks, layout.block, dtype=torch.long)
    seen.index_add_(0, layout.query_block, rows)
    return float(seen.flatten()[:length].clamp(max=most).sum())


def _attended(a: AttentionConfig, pairs: float) -> float:
    return 4 * a.num_heads * a.head_dim * pairs


def _moba(dim: int, a: AttentionConfig, s: MoBAConfig, length: int) -> float:
    candidates = sum(i // s.block + 1 for i in range(length))
    return 2 * a.num_kv_heads * a.head_dim * candidates + _attended(a, block_pairs(length, s.block, s.top_k))


def _top_k(dim: int, a: AttentionConfig, s: TopKKeysConfig, length: int) -> float:
    scores = 2 * a.num_heads * a.head_dim * window_pairs(length, length)
    return scores + _attended(a, bounded_pairs(parse_pattern(a.pattern), length, s.k))


def _nsa(dim: int, a: AttentionConfig, s: NSAConfig, length: int) -> float:
    geometry, hidden = s.geometry(), s.mlp_hidden or 2 * a.head_dim
    once = 2 * (s.compress * a.head_dim * hidden + hidden * a.head_dim)
    compressing = 2 * a.num_kv_heads * geometry.compressed(length) * once
    gates = 2 * dim * 3 * a.num_heads * length
    pairs = sum(geometry.compressed(i + 1) for i in range(length))
    pairs += block_pairs(length, s.block, s.top_n) + window_pairs(length, s.window)
    return compressing + gates + _attended(a, pairs)


def _dsa(dim: int, a: AttentionConfig, s: DSAConfig, length: int) -> float:
    made = dim * s.heads * s.head_dim + a.num_kv_heads * a.head_dim * s.head_dim + dim * s.heads
    everything = window_pairs(length, length)
    index = 2 * s.heads * (s.head_dim + 1) * everything
    attended = bounded_pairs(parse_pattern(a.pattern), length, None if s.warm_up else s.top_k)
    return 2 * length * made + index + _attended(a, attended)


def _lsh(dim: int, a: AttentionConfig, s: LSHConfig, length: int) -> float:
    hashing = 2 * _hashed_heads(a, s) * s.rounds * a.head_dim * s.num_buckets // 2 * length
    return hashing + _attended(a, s.rounds * _even_buckets(length, s.num_buckets, s.chunk))


def _kmeans(dim: int, a: AttentionConfig, s: KMeansConfig, length: int) -> float:
    nearest = 2 * _hashed_heads(a, s) * a.head_dim * s.num_clusters * length
    return nearest + _attended(a, _even_buckets(length, s.num_clusters, s.window))


def _hashed_heads(a: AttentionConfig, s: LSHConfig | KMeansConfig) -> int:
    return a.num_kv_heads if s.shared_qk else a.num_heads + a.num_kv_heads


def _even_buckets(length: int, buckets: int, chunk: int) -> float:
    """A query's bucket holds (i + 1) / buckets keys; it sees chunk to 2 · chunk of them, on average half way."""
    return sum(min((i + 1) / buckets, 1.5 * chunk) for i in range(length))


def _sinkhorn(dim: int, a: AttentionConfig, s: SinkhornConfig, length: int) -> float:
    blocks = -(-length // s.block)
    sorting = 2 * a.num_kv_heads * a.head_dim * blocks * blocks
    mixing = 2 * 2 * a.num_kv_heads * a.head_dim * s.block * blocks * blocks
    if not s.causal:
        return sorting + mixing + _attended(a, 2 * length * s.block)
    mixed = (length - min(length, s.block)) * s.block
    return sorting + mixing + _attended(a, block_pairs(length, s.block, 1) + mixed)


_COSTS: dict[type, Callable[[int, AttentionConfig, Any, int], float]] = {
    MoBAConfig: _moba,
    TopKKeysConfig: _top_k,
    NSAConfig: _nsa,
    DSAConfig: _dsa,
    LSHConfig: _lsh,
    KMeansConfig: _kmeans,
    SinkhornConfig: _sinkhorn,
}
