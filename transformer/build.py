"""From the record of a layer to its modules."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

from torch import nn

from moe import (
    PEER,
    ActivePredictor,
    BalancedAssignmentRouter,
    ExpertChoiceRouter,
    HashRouter,
    MemoryValues,
    MixtureOfDepths,
    MoE,
    NoisyTopKRouter,
    ProductKeyMemory,
    SigmoidRouter,
    SinkhornRouter,
    SoftMoE,
    SwitchRouter,
    ThresholdedFeedForward,
    Top2Router,
    TopKRouter,
)
from sparse_attn import Pattern, causal, parse_pattern
from sparse_attn.selection.dsa import DSA
from sparse_attn.selection.kmeans import KMeansRouting
from sparse_attn.selection.lsh import LSH
from sparse_attn.selection.moba import MoBA
from sparse_attn.selection.nsa import NSA
from sparse_attn.selection.sinkhorn import SinkhornSorting
from sparse_attn.selection.top_k import TopKKeys
from transformer.attention import Attention
from transformer.feedforward import FeedForward
from transformer.feedforward_config import (
    DenseConfig,
    FeedForwardConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    SoftMoEConfig,
    ThresholdedConfig,
)
from transformer.layer_config import AttentionConfig, DepthConfig
from transformer.selection_config import (
    Bounded,
    DSAConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    NSAConfig,
    SinkhornConfig,
    TopKKeysConfig,
)


def build_attention(dim: int, config: AttentionConfig, *, norm_eps: float = 1e-6) -> Attention:
    """The module that an attention config describes; norm_eps: of the norm of queries and keys, if it has one."""
    selection = None if config.selection is None else build_selection(dim, config)
    # a cache keeps every key for a selection, which counts keys from the first
    pattern = causal() if isinstance(config.selection, Bounded) else parse_pattern(config.pattern)
    return Attention(
        dim, config.num_heads, config.num_kv_heads, config.head_dim, pattern, qk_norm=config.qk_norm, norm_eps=norm_eps,
        bias=config.bias, head_dropout=config.head_dropout, drop_connect=config.drop_connect,
        selection=selection, thresholds=config.thresholds, softcap=config.softcap, dropout=config.dropout,
        alibi=config.slopes(),
    )  # fmt: skip


def build_selection(dim: int, config: AttentionConfig) -> nn.Module:
    """The module that chooses the keys of an attention layer whose config has a ``selection``."""
    return _SELECTIONS[type(config.selection)](dim, config, config.selection)


def build_feedforward(
    dim: int,
    config: FeedForwardConfig,
    *,
    name: str = "feedforward",
    pools: dict[str, MemoryValues] | None = None,
    vocab_size: int | None = None,
) -> nn.Module:
    """The module that a feed-forward config describes; ``name`` appears in its errors.

    pools: tables of values by name; a memory that names a pool takes it from here, or adds it if it is the first.
    vocab_size: of the table of a hash router that has one.
    Raises: ValueError for such a router without a vocab_size.
    """
    if isinstance(config, MoEConfig):
        return _moe(dim, config, name, vocab_size)
    if isinstance(config, ProductKeyConfig):
        return _product_key(dim, config, name, {} if pools is None else pools)
    return _BUILDERS[type(config)](dim, config, name)


def build_depth(dim: int, config: DepthConfig, *, name: str = "depth") -> MixtureOfDepths:
    """The router that chooses which tokens pass a block; ``name`` appears in its errors."""
    return MixtureOfDepths(dim, capacity=config.capacity, weighting=cast(Any, config.weighting), name=name)


def _dense(dim: int, config: DenseConfig, name: str) -> FeedForward:
    return FeedForward(
        dim, config.hidden, activation=config.activation, drop_connect=config.drop_connect, error_k=config.error_k,
        error_unified=config.error_unified,
    )  # fmt: skip


def _thresholded(dim: int, config: ThresholdedConfig, name: str) -> ThresholdedFeedForward:
    predictor = None
    if config.predictor_rank is not None:
        # what it tells has no gradient: processes that average gradients would wait for one
        predictor = ActivePredictor(dim, config.hidden, rank=config.predictor_rank).requires_grad_(False)
        predictor.threshold = -math.inf if config.predictor_threshold is None else config.predictor_threshold
    return ThresholdedFeedForward(
        dim, config.hidden, activation=cast(Any, config.activation), method=cast(Any, config.method),
        threshold=config.threshold if config.thresholds is None else config.thresholds, top_k=config.top_k,
        predictor=predictor, execution=cast(Any, config.execution),
    )  # fmt: skip


def _moe(dim: int, config: MoEConfig, name: str, vocab_size: int | None) -> MoE:
    router = _hash(dim, config, vocab_size) if config.router == "hash" else _ROUTERS[config.router](dim, config)
    # expert choice has its capacity in the router: nothing can exceed it
    return MoE(
        dim=dim, hidden=config.hidden, num_experts=config.num_experts, router=router,
        activation=cast(Any, config.activation), capacity_factor=config.capacity_factor,
        drop_priority=cast(Any, config.drop_priority), drop_in_eval=False,
        shared_hidden=config.shared_hidden, bias=config.expert_bias, name=name,
    )  # fmt: skip


def _hash(dim: int, c: MoEConfig, vocab_size: int | None) -> HashRouter:
    if c.hash_table == "none":
        return HashRouter(dim, c.num_experts, k=c.k, seed=c.hash_seed)
    if vocab_size is None:
        raise ValueError(f"vocab_size must be given for hash_table={c.hash_table!r}, got None")
    frequencies: Literal["later"] | None = "later" if c.hash_table == "balanced" else None
    return HashRouter(dim, c.num_experts, k=c.k, vocab_size=vocab_size, seed=c.hash_seed, frequencies=frequencies)


def _soft(dim: int, config: SoftMoEConfig, name: str) -> SoftMoE:
    return SoftMoE(
        dim, config.hidden, config.num_experts, slots_per_expert=config.slots_per_expert,
        activation=cast(Any, config.activation), bias=config.expert_bias, allow_future=config.allow_future, name=name,
    )  # fmt: skip


def _product_key(dim: int, config: ProductKeyConfig, name: str, pools: dict[str, MemoryValues]) -> ProductKeyMemory:
    values = None if config.pool is None else pools.get(config.pool)
    if values is None:
        values = MemoryValues(config.num_keys**2, config.value_dim or dim, sparse=False)
    if config.pool is not None:
        pools[config.pool] = values
    return ProductKeyMemory(
        dim, num_keys=config.num_keys, heads=config.heads, k=config.k, key_dim=config.key_dim,
        value_dim=config.value_dim, query_norm=cast(Any, config.query_norm), gated=config.gated, values=values,
        name=name,
    )  # fmt: skip


def _peer(dim: int, config: PEERConfig, name: str) -> PEER:
    return PEER(
        dim, num_keys=config.num_keys, heads=config.heads, k=config.k, key_dim=config.key_dim,
        activation=cast(Any, config.activation), query_norm=cast(Any, config.query_norm), sparse=False, name=name,
    )  # fmt: skip


_BUILDERS: dict[type, Callable[[int, Any, str], nn.Module]] = {
    DenseConfig: _dense,
    ThresholdedConfig: _thresholded,
    SoftMoEConfig: _soft,
    PEERConfig: _peer,
}


def _within(config: AttentionConfig) -> Pattern | None:
    pattern = parse_pattern(config.pattern)
    return None if pattern == causal() else pattern


def _dsa(dim: int, config: AttentionConfig, s: DSAConfig) -> DSA:
    # index keys from the layer's own keys: decoding then needs no cache of layer inputs
    return DSA(
        dim, top_k=s.top_k, heads=s.heads, head_dim=s.head_dim, key_width=config.num_kv_heads * config.head_dim,
        warm_up=s.warm_up, rope_dim=s.rope_dim, rope_theta=s.rope_theta, within=_within(config),
    )  # fmt: skip


def _nsa(dim: int, config: AttentionConfig, s: NSAConfig) -> NSA:
    return NSA(
        dim, config.num_heads, config.num_kv_heads, config.head_dim, compress=s.compress, stride=s.stride,
        block=s.block, top_n=s.top_n, initial=s.initial, local=s.local, window=s.window,
        mlp_hidden=s.mlp_hidden,
    )  # fmt: skip


def _lsh(dim: int, config: AttentionConfig, s: LSHConfig) -> LSH:
    return LSH(
        config.head_dim, config.num_kv_heads, num_buckets=s.num_buckets, rounds=s.rounds, chunk=s.chunk,
        shared_qk=s.shared_qk, seed=s.seed,
    )  # fmt: skip


def _kmeans(dim: int, config: AttentionConfig, s: KMeansConfig) -> KMeansRouting:
    return KMeansRouting(
        config.head_dim, config.num_kv_heads, num_clusters=s.num_clusters, window=s.window, decay=s.decay, seed=s.seed,
        shared_qk=s.shared_qk,
    )  # fmt: skip


def _sinkhorn(dim: int, config: AttentionConfig, s: SinkhornConfig) -> SinkhornSorting:
    return SinkhornSorting(
        config.head_dim, config.num_kv_heads, block=s.block, max_blocks=s.max_blocks, iterations=s.iterations,
        temperature=s.temperature, gumbel=s.gumbel, seed=s.seed, causal=s.causal,
    )  # fmt: skip


_SELECTIONS: dict[type, Callable[[int, AttentionConfig, Any], nn.Module]] = {
    MoBAConfig: lambda dim, config, s: MoBA(block=s.block, top_k=s.top_k),
    TopKKeysConfig: lambda dim, config, s: TopKKeys(s.k, within=_within(config)),
    NSAConfig: _nsa,
    DSAConfig: _dsa,
    LSHConfig: _lsh,
    KMeansConfig: _kmeans,
    SinkhornConfig: _sinkhorn,
}

_ROUTERS: dict[str, Callable[[int, MoEConfig], nn.Module]] = {
    "top_k": lambda dim, c: TopKRouter(dim, c.num_experts, k=c.k, renormalize=c.renormalize),
    "switch": lambda dim, c: SwitchRouter(dim, c.num_experts, jitter=c.jitter),
    "noisy_top_k": lambda dim, c: NoisyTopKRouter(dim, c.num_experts, k=c.k),
    "top_2": lambda dim, c: Top2Router(dim, c.num_experts, second=cast(Any, c.second_expert)),
    "sigmoid": lambda dim, c: SigmoidRouter(
        dim, c.num_experts, k=c.k, num_groups=c.num_groups, top_groups=c.top_groups, scale=c.route_scale,
        bias_update=c.bias_update, renormalize=c.renormalize,
    ),
    "expert_choice": lambda dim, c: ExpertChoiceRouter(
        dim, c.num_experts, capacity_factor=c.k, allow_future=c.allow_future
    ),
    "sinkhorn": lambda dim, c: SinkhornRouter(
        dim, c.num_experts, k=c.k, iterations=c.sinkhorn_iterations, temperature=c.sinkhorn_temperature
    ),
    "base": lambda dim, c: BalancedAssignmentRouter(
        dim, c.num_experts, rounds=c.auction_rounds, epsilon=c.auction_epsilon
    ),
}  # fmt: skip
