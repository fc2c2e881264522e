"""The shape of one layer: its attention and its feed-forward, as frozen records that validate themselves."""

import math
from dataclasses import dataclass

import torch

from moe import AttentionThresholds
from moe.checks import at_least, below_one, one_of
from sparse_attn import Pattern, PerHead, alibi_slopes, causal, full, parse_pattern
from transformer.checks import check_fields
from transformer.feedforward_config import FeedForwardConfig
from transformer.selection_config import SELECTIONS, Bounded, DSAConfig, SelectionConfig, SharedQK, SinkhornConfig

QK_NORMS = ("none", "head", "full")


@dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    num_heads: query heads. num_kv_heads: key-value heads, a divisor of num_heads (grouped-query attention).
    head_dim: channels of one head, even with RoPE, which rotates pairs. pattern: which keys a query sees, as text that
    :func:`sparse_attn.parse_pattern` reads, e.g. ``"causal() & (sliding_window(256) | sinks(4))"``.
    qk_norm: RMSNorm of queries and keys before they turn: "none", "head" (each head by itself, one weight for all of
    them; Qwen3) or "full" (all heads together; OLMoE).
    bias: whether the projections to queries, keys and values have a bias (Qwen2).
    head_dropout, drop_connect: rates in training at which a head of a sample, and a single weight of the four
    projections, are dropped (:class:`moe.HeadDropout`, :class:`moe.DropConnect`).
    selection: how the keys that a query sees are chosen by content. Top-k keys and DSA choose among those that the
    pattern shows, which sees no later key; with another the pattern is ``causal()`` (``full()`` of a selection that is
    not causal). None: the pattern alone decides.
    thresholds: magnitudes up to which the inputs of the four projections are left out, in training too (TEAL;
    :class:`moe.ThresholdedLinear`). None: none is.
    softcap: scores become softcap · tanh(score / softcap) before the softmax (Gemma 2, arXiv:2408.00118). None: as they
    are. dropout: rate at which attention probabilities are dropped in training (Vaswani et al. 2017, arXiv:1706.03762).
    alibi: positions by a bias of -slope · abs(i - j) on the scores of each head in place of RoPE (Press et al. 2021,
    arXiv:2108.12409). alibi_slopes: of each query head; None: :func:`sparse_attn.alibi_slopes`, the paper's. Pruning
    writes those of the heads that stay. Under a selection all four are of the scores of the chosen keys; each module of
    :mod:`sparse_attn.selection` says whether the choice is by them too, and how far away a compressed or mixed key is.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    pattern: str = "causal()"
    qk_norm: str = "none"
    bias: bool = False
    head_dropout: float = 0.0
    drop_connect: float = 0.0
    selection: SelectionConfig | None = None
    thresholds: AttentionThresholds | None = None
    softcap: float | None = None
    dropout: float = 0.0
    alibi: bool = False
    alibi_slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("num_heads", self.num_heads, 1)
        at_least("num_kv_heads", self.num_kv_heads, 1)
        at_least("head_dim", self.head_dim, 2)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim % 2 and not self.alibi:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        one_of("qk_norm", self.qk_norm, QK_NORMS)
        below_one("head_dropout", self.head_dropout)
        below_one("drop_connect", self.drop_connect)
        below_one("dropout", self.dropout)
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be None or a finite number > 0, got {self.softcap}")
        self._check_slopes()
        pattern = parse_pattern(self.pattern)
        if isinstance(pattern, PerHead) and len(pattern.heads) != self.num_heads:
            raise ValueError(
                f"per_head must hold a pattern for each of num_heads={self.num_heads} query heads, "
                f"got {len(pattern.heads)}: {self.pattern!r}"
            )
        if self.selection is not None:
            self._check_selection(pattern)

    @property
    def shared_qk(self) -> bool:
        """Whether queries are keys, without a projection of their own."""
        return isinstance(self.selection, SharedQK) and self.selection.shared_qk

    def slopes(self) -> tuple[float, ...] | None:
        """ALiBi's slope of each query head, or None where RoPE gives the positions."""
        if not self.alibi or self.alibi_slopes is not None:
            return self.alibi_slopes
        with torch.device("cpu"):  # a model may be built on the meta device
            return tuple(alibi_slopes(self.num_heads).tolist())

    def _check_slopes(self) -> None:
        slopes = self.alibi_slopes
        if slopes is None:
            return
        if not self.alibi:
            raise ValueError(f"alibi_slopes need alibi=True, got {slopes}")
        if len(slopes) != self.num_heads:
            raise ValueError(f"alibi_slopes must be one for each of num_heads={self.num_heads}, got {len(slopes)}")
        if not all(isinstance(slope, int | float) and 0 <= slope < math.inf for slope in slopes):
            raise ValueError(f"alibi_slopes must be finite numbers >= 0, got {slopes}")

    def _check_selection(self, pattern: Pattern) -> None:
        if not isinstance(self.selection, tuple(SELECTIONS.values())):
            known = ", ".join(record.__name__ for record in SELECTIONS.values())
            raise ValueError(f"selection must be None or one of {known}, got {self.selection!r}")
        if isinstance(self.selection, SinkhornConfig) and not self.selection.causal:
            if pattern != full():
                raise ValueError(f"pattern must be full() with a selection of causal=False, got {self.pattern!r}")
        elif isinstance(self.selection, Bounded):
            if not pattern.is_causal:
                raise ValueError(f"pattern must be causal() & ... with a selection, got {self.pattern!r}")
            if isinstance(self.selection, DSAConfig) and isinstance(pattern, PerHead):
                raise ValueError(f"pattern must be one for all heads, whose choice DSA shares, got {self.pattern!r}")
        elif pattern != causal():
            name = type(self.selection).__name__
            raise ValueError(f"{name} chooses among all earlier keys: pattern must be causal(), got {self.pattern!r}")
        if self.shared_qk and self.num_kv_heads != self.num_heads:
            raise ValueError(f"num_kv_heads must be num_heads={self.num_heads} with shared_qk, got {self.num_kv_heads}")


@dataclass(frozen=True)
class DepthConfig:
    """Mixture-of-Depths: only some tokens pass the whole layer, the others skip its compute (arXiv:2404.02258).

    capacity: share of each sequence that passes in training, (0, 1]; in evaluation and decoding a predictor decides,
    token by token. weighting: the factor on what the layer changes, "sigmoid" of the router's logit or the "raw" logit.
    """

    capacity: float = 0.5
    weighting: str = "sigmoid"

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("weighting", self.weighting, ("sigmoid", "raw"))
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity must be in (0, 1], got {self.capacity}")


@dataclass(frozen=True)
class LayerConfig:
    """One block: attention, then feed-forward. None: pruned away, the residual stream passes unchanged.

    depth: which tokens pass the block; None: all. In training path_dropout is the rate at which each of the two
    branches is dropped for a sample (:class:`moe.PathDropout`), layer_drop that of skipping the layer for a batch
    (:class:`moe.LayerDrop`); a ramp over the layers is made by giving each its own rate. layer_drop_rescale: a layer
    that runs changes the stream by 1 / (1 − layer_drop) times as much, so that the mean is that of evaluation.
    """

    attention: AttentionConfig | None
    feedforward: FeedForwardConfig | None
    depth: DepthConfig | None = None
    path_dropout: float = 0.0
    layer_drop: float = 0.0
    layer_drop_rescale: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        below_one("path_dropout", self.path_dropout)
        below_one("layer_drop", self.layer_drop)
        if self.layer_drop_rescale and not self.layer_drop:
            raise ValueError("layer_drop_rescale needs a layer_drop > 0, got layer_drop=0.0")
        if self.depth is not None and self.attention is not None and self.attention.selection is not None:
            raise ValueError(
                "selection must be None in a layer with depth, whose tokens stand at scattered positions, "
                f"got {self.attention.selection}"
            )
