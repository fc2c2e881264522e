"""The records of a layer, made from the words of [model]."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe import AttentionThresholds
from moe.checks import at_least, positive
from training.layer_override import FeedForwardName, SelectionName
from training.model_owners import owned_by_router
from training.model_words import ATTENTION_WORDS, FEEDFORWARD_WORDS, SELECTION_WORDS, in_words
from transformer import (
    AttentionConfig,
    DenseConfig,
    DSAConfig,
    FeedForwardConfig,
    KMeansConfig,
    LSHConfig,
    MoBAConfig,
    MoEConfig,
    NSAConfig,
    PEERConfig,
    ProductKeyConfig,
    SelectionConfig,
    SinkhornConfig,
    SoftMoEConfig,
    ThresholdedConfig,
    TopKKeysConfig,
)

if TYPE_CHECKING:
    from training.model_config import ModelConfig


def attention_of(model: "ModelConfig", max_length: int) -> AttentionConfig:
    """The attention of a layer that is ``model``'s. Raises: ValueError, in the words of [model]."""
    if not model.attention_threshold >= 0:
        raise ValueError(f"model.attention_threshold must be >= 0, got {model.attention_threshold}")
    if not 0 <= model.softcap < math.inf:
        raise ValueError(f"softcap must be a finite number >= 0, got {model.softcap}")
    limits = AttentionThresholds(*[model.attention_threshold] * 4) if model.attention_threshold else None
    kv_heads = model.heads if model.kv_heads is None else model.kv_heads
    head_dim, selection = _head_dim(model), _selection(model, max_length)
    with in_words(ATTENTION_WORDS):
        return AttentionConfig(
            model.heads, kv_heads, head_dim, model.pattern, head_dropout=model.head_dropout,
            drop_connect=model.drop_connect, selection=selection, thresholds=limits,
            softcap=model.softcap or None, dropout=model.attention_dropout, alibi=model.alibi,
        )  # fmt: skip


def _head_dim(model: "ModelConfig") -> int:
    at_least("heads", model.heads, 1)
    if model.head_dim is not None:
        return model.head_dim
    head_dim, rest = divmod(model.dim, model.heads)
    if rest:
        raise ValueError(f"model.heads must divide dim={model.dim}, got {model.heads}: or set model.head_dim")
    if head_dim < 2 or (head_dim % 2 and not model.alibi):
        raise ValueError(
            f"model.heads must leave each head an even number of dim={model.dim} channels, got {model.heads}: "
            "or set model.head_dim"
        )
    return head_dim


def _selection(model: "ModelConfig", max_length: int) -> SelectionConfig | None:
    if model.selection == "none":
        return None
    with in_words(SELECTION_WORDS[model.selection]):
        return _SELECTIONS[model.selection](model, max_length)


def feedforward_of(model: "ModelConfig") -> FeedForwardConfig:
    """The feed-forward of a layer that is ``model``'s. Raises: ValueError, in the words of [model]."""
    with in_words(FEEDFORWARD_WORDS.get(model.feedforward, {})):
        return _KINDS[model.feedforward](model)


def _moe(model: "ModelConfig") -> MoEConfig:
    positive("route_scale", model.route_scale)
    if not 0 <= model.bias_update < math.inf:
        raise ValueError(f"bias_update must be a finite number >= 0, got {model.bias_update}")
    return MoEConfig(
        hidden=model.hidden,
        num_experts=model.num_experts,
        k=model.k,
        router=model.router,
        capacity_factor=model.capacity_factor,
        shared_hidden=model.shared_hidden,
        expert_bias=model.expert_bias,
        activation=model.activation or "swiglu",
        drop_priority=model.drop_priority,
        allow_future=model.allow_future,
        **{name: getattr(model, name) for name in owned_by_router(model.router)},
    )


def _soft_moe(model: "ModelConfig") -> SoftMoEConfig:
    return SoftMoEConfig(
        model.hidden, model.num_experts, model.slots_per_expert, activation=model.activation or "swiglu",
        allow_future=model.allow_future, expert_bias=model.expert_bias,
    )  # fmt: skip


def _product_key(model: "ModelConfig") -> ProductKeyConfig:
    return ProductKeyConfig(
        model.num_keys, model.memory_heads, model.memory_k, model.key_dim, query_norm=model.query_norm,
        gated=model.gated, pool=model.memory_pool, value_dim=model.value_dim,
    )  # fmt: skip


def _peer(model: "ModelConfig") -> PEERConfig:
    return PEERConfig(
        model.num_keys, model.memory_heads, model.memory_k, model.key_dim, query_norm=model.query_norm,
        activation=model.activation or "gelu",
    )  # fmt: skip


def _nsa(model: "ModelConfig", _: int) -> NSAConfig:
    stride, block = model.select_stride, model.select_block
    at_least("select_stride", stride, 1)
    at_least("select_block", block, 1)
    if model.select_compress is None and 2 * stride > block:
        raise ValueError(
            f"select_stride must be at most half of select_block={block} without select_compress, got {stride}"
        )
    compress = 2 * stride if model.select_compress is None else model.select_compress
    return NSAConfig(
        compress, stride, block, model.select_k, model.select_initial, model.select_local, model.select_window,
        model.select_hidden,
    )  # fmt: skip


def _sinkhorn(model: "ModelConfig", max_length: int) -> SinkhornConfig:
    at_least("select_block", model.select_block, 1)
    return SinkhornConfig(
        model.select_block, -(-max_length // model.select_block), model.select_iterations, model.select_temperature,
        model.select_gumbel, model.select_seed,
    )  # fmt: skip


_SELECTIONS: dict[SelectionName, Callable[["ModelConfig", int], SelectionConfig]] = {
    "moba": lambda model, _: MoBAConfig(model.select_block, model.select_k),
    "top_k": lambda model, _: TopKKeysConfig(model.select_k),
    "nsa": _nsa,
    "dsa": lambda model, _: DSAConfig(
        model.select_k, model.select_heads, model.select_dim, model.select_warm_up, model.select_rope_dim,
        model.rope_theta if model.select_rope_dim else DSAConfig.rope_theta,
    ),
    "lsh": lambda model, _: LSHConfig(
        model.select_buckets, model.select_rounds, model.select_block, model.select_seed, model.select_shared_qk
    ),
    "kmeans": lambda model, _: KMeansConfig(
        model.select_buckets, model.select_block, model.select_decay, model.select_seed, model.select_shared_qk
    ),
    "sinkhorn": _sinkhorn,
}  # fmt: skip

_KINDS: dict[FeedForwardName, Callable[["ModelConfig"], FeedForwardConfig]] = {
    "moe": _moe,
    "dense": lambda model: DenseConfig(
        model.hidden, model.activation or "swiglu", model.drop_connect, model.error_k, model.error_unified
    ),
    "thresholded": lambda model: ThresholdedConfig(
        model.hidden,
        model.activation or "relu2",
        model.threshold_method,
        model.threshold,
        model.top_neurons,
        predictor_rank=model.activation_predictor_rank,
        execution=model.threshold_execution,
    ),
    "soft_moe": _soft_moe,
    "product_key": _product_key,
    "peer": _peer,
}
