"""Exact counts of weights and of matrix-product FLOPs, all of them or those that one token uses."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moe import MemoryValues, MoE
from moe.depth import passing_tokens, predictor_width
from sparse_attn import Pattern, PerHead, parse_pattern
from transformer.config import TransformerConfig
from transformer.feedforward_config import (
    DenseConfig,
    MoEConfig,
    PEERConfig,
    ProductKeyConfig,
    SoftMoEConfig,
    ThresholdedConfig,
)
from transformer.layer_config import AttentionConfig, LayerConfig
from transformer.selection_cost import selection_flops

if TYPE_CHECKING:
    from transformer.model import Transformer


def num_parameters(model: "Transformer", *, active: bool = False) -> int:
    """Weights of the model, tied ones once. active: an expert's weights count k/E times, as one token uses k of E.

    Of a product-key memory or of PEER one token uses heads · k rows of each table, in every layer that shares it.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if active:
        rows: dict[MemoryValues, int] = {}
        for layer, module in zip(model.config.layers, model.layers, strict=True):
            if isinstance(layer.feedforward, MoEConfig) and isinstance(module.feedforward, MoE):
                of_experts = sum(parameter.numel() for parameter in module.feedforward.experts.parameters())
                idle = layer.feedforward.num_experts - layer.feedforward.k
                total -= of_experts // layer.feedforward.num_experts * idle
            if isinstance(layer.feedforward, ProductKeyConfig | PEERConfig):
                for table in module.feedforward.modules():
                    if isinstance(table, MemoryValues):
                        rows[table] = rows.get(table, 0) + layer.feedforward.heads * layer.feedforward.k
        total -= sum((table.num_slots - min(read, table.num_slots)) * table.dim for table, read in rows.items())
    return total


def used_shares(model: "Transformer") -> dict[str, float]:
    """Parameter's name → in how many products a weight of it takes part for each token, where it is not 1.

    k/E for the weights of experts, the number of heads for the sub-keys that PEER's heads share, times the capacity of
    a layer that only some tokens pass. Capacity may drop more."""
    shares: dict[str, float] = {}
    for index, layer in enumerate(model.config.layers):
        passing = 1.0 if layer.depth is None else layer.depth.capacity
        for name, _ in model.layers[index].named_parameters():
            uses = passing * _uses(layer, name)
            if uses != 1 and not name.startswith("depth."):
                shares[f"layers.{index}.{name}"] = uses
    return shares


def _uses(layer: LayerConfig, name: str) -> float:
    """Products a token that passes the layer."""
    if isinstance(layer.feedforward, MoEConfig) and name.startswith("feedforward.experts."):
        return layer.feedforward.k / layer.feedforward.num_experts
    if isinstance(layer.feedforward, PEERConfig) and name == "feedforward.keys.weight":
        return layer.feedforward.heads
    return 1.0


def flops_per_token(config: TransformerConfig, length: int, *, active: bool = True) -> float:
    """Forward FLOPs of matrix products a token (2 for each multiply-add), averaged over a sequence of ``length``.

    Counted: projections, scores and mixing for the (query, key) pairs that the pattern shows or the selection chose,
    what choosing costs, feed-forward (k experts of E; all E with ``active=False``), router, head. Of a layer with
    ``depth`` the share of tokens that passes in training (all with ``active=False``), and for every token its router
    and predictor. Training takes three times as much. Not counted: norms, rotations, softmax, activations, what
    thresholds save.
    Without drops: capacity can only lower it.
    Raises ValueError if length < 1.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    layers = sum(_layer_flops(config.dim, layer, length, active=active) for layer in config.layers)
    return layers + 2 * config.dim * config.vocab_size


def _layer_flops(dim: int, layer: LayerConfig, length: int, *, active: bool) -> float:
    if layer.depth is None:
        return _block_flops(dim, layer, length, length, active=active)
    passing = passing_tokens(length, capacity=layer.depth.capacity) if active else length
    width = predictor_width(dim)
    chosen = 2 * dim + 2 * width * (dim + 1)
    return chosen + _block_flops(dim, layer, length, passing, active=active) * passing / length


def _block_flops(dim: int, layer: LayerConfig, length: int, passing: int, *, active: bool) -> float:
    """For each of the ``passing`` tokens of a sequence of ``length``."""
    total = 0.0
    if layer.attention:
        a = layer.attention
        total += 2 * dim * a.head_dim * ((1 if a.shared_qk else 2) * a.num_heads + 2 * a.num_kv_heads)
        total += _attention_flops(dim, a, length, passing) / passing
    if layer.feedforward is not None:
        total += _FLOPS[type(layer.feedforward)](dim, layer.feedforward, passing, active)
    return total


def _attention_flops(dim: int, a: AttentionConfig, length: int, passing: int) -> float:
    """Scores and mixing over a sequence, and what the choice of keys costs."""
    if a.selection is not None:
        return selection_flops(dim, a, length)
    pattern = parse_pattern(a.pattern)
    heads = pattern.heads if isinstance(pattern, PerHead) else (pattern,) * a.num_heads
    pairs = sum(count * visible_pairs_among(one, length, passing) for one, count in Counter(heads).items())
    return 4 * a.head_dim * pairs


def visible_pairs_among(pattern: Pattern, length: int, passing: int) -> float:
    """Visible pairs among C of L tokens: exact for causal() and full(), else the mean over all choices of C tokens.

    A token is among them with probability C/L, two tokens with C(C − 1) / (L(L − 1)).
    """
    pairs = pattern.visible_pairs(length, length)
    if passing == length:
        return pairs
    places = torch.arange(length)
    alone = int(pattern.visible(places, places).sum())
    return alone * passing / length + (pairs - alone) * passing * (passing - 1) / (length * (length - 1))


def _plain(dim: int, f: DenseConfig, length: int, active: bool) -> float:
    return _feedforward_flops(dim, f.hidden, f.activation)


def _thresholded(dim: int, f: ThresholdedConfig, length: int, active: bool) -> float:
    return _feedforward_flops(dim, f.hidden, f.activation) + 2 * (f.predictor_rank or 0) * (dim + f.hidden)


def _experts(dim: int, f: MoEConfig, length: int, active: bool) -> float:
    used = (f.k if active else f.num_experts) * f.hidden + f.shared_hidden
    return _router_flops(dim, f) + _feedforward_flops(dim, used, f.activation)


def _router_flops(dim: int, f: MoEConfig) -> int:
    # noise has a matrix of its own; a hash multiplies nothing
    return 2 * dim * f.num_experts * {"hash": 0, "noisy_top_k": 2}.get(f.router, 1)


def _soft_experts(dim: int, f: SoftMoEConfig, length: int, active: bool) -> float:
    # slot logits, dispatch and combine for each token; the experts' work is shared by all tokens of the sequence
    slots = f.num_experts * f.slots_per_expert
    return 3 * 2 * dim * slots + slots * _feedforward_flops(dim, f.hidden, f.activation) / length


def _memory(dim: int, f: ProductKeyConfig, length: int, active: bool) -> float:
    width = dim if f.value_dim is None else f.value_dim
    read = 2 * f.heads * (f.k if active else f.num_keys**2) * width
    return _search_flops(dim, f) + read + (2 * 2 * dim * width if f.gated else 0)


def _neurons(dim: int, f: PEERConfig, length: int, active: bool) -> float:
    return _search_flops(dim, f) + 2 * 2 * f.heads * (f.k if active else f.num_keys**2) * dim


def _search_flops(dim: int, f: ProductKeyConfig | PEERConfig) -> int:
    return 2 * f.heads * f.key_dim * (dim + f.num_keys)


_FLOPS: dict[type, Callable[[int, Any, int, bool], float]] = {
    DenseConfig: _plain,
    ThresholdedConfig: _thresholded,
    MoEConfig: _experts,
    SoftMoEConfig: _soft_experts,
    ProductKeyConfig: _memory,
    PEERConfig: _neurons,
}


def _feedforward_flops(dim: int, hidden: int, activation: str) -> int:
    return 2 * (3 if activation in ("swiglu", "reglu", "drelu") else 2) * dim * hidden
