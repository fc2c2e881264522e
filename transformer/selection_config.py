"""Learned selection as a layer choice: how an attention layer picks the keys that each query sees, by content.

Every choice looks at the query's own and earlier keys only, but for Sinkhorn sorting with causal=False. The modules are
those of :mod:`sparse_attn.selection`, which hold the formulas and say where they differ from the papers.
"""

from dataclasses import dataclass

from moe.checks import at_least
from sparse_attn.checking import check_seed
from sparse_attn.selection.compressed import Geometry
from transformer.checks import check_fields


@dataclass(frozen=True)
class MoBAConfig:
    """Each query sees the ``top_k`` blocks of ``block`` keys whose mean key fits best, its own among them
    (MoBA, arXiv:2502.13189)."""

    block: int = 64
    top_k: int = 8

    def __post_init__(self) -> None:
        _positive(self, "block", "top_k")


@dataclass(frozen=True)
class TopKKeysConfig:
    """Each query sees the ``k`` keys of highest score among those that the layer's pattern shows; all scores are
    computed to find them."""

    k: int = 64

    def __post_init__(self) -> None:
        _positive(self, "k")


@dataclass(frozen=True)
class NSAConfig:
    """Native sparse attention: compressed keys, selected blocks and a window, gated (arXiv:2502.11089).

    compress, stride: keys that one compressed key stands for, and from one to the next. block, top_n: size and number
    of the blocks that a query selects, of which the first ``initial`` and last ``local`` always. window: of the third
    branch. mlp_hidden: neurons of the network that compresses; None: twice the channels of a head.
    """

    compress: int = 32
    stride: int = 16
    block: int = 64
    top_n: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512
    mlp_hidden: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "window", *([] if self.mlp_hidden is None else ["mlp_hidden"]))
        self.geometry()

    def geometry(self) -> Geometry:
        """The sizes as the module takes them. Raises: ValueError where they do not fit together."""
        return Geometry(self.compress, self.stride, self.block, self.top_n, self.initial, self.local)


@dataclass(frozen=True)
class DSAConfig:
    """Each query sees the ``top_k`` keys that a lightning indexer scores highest (DeepSeek-V3.2), among those that the
    layer's pattern shows.

    heads, head_dim: of the indexer. It reads the layer's keys, which a cache holds, and learns from a side loss of its
    own. warm_up: attend to all of them while it learns. rope_dim: its first channels that turn with their position, at
    frequencies of base rope_theta.
    """

    top_k: int = 64
    heads: int = 4
    head_dim: int = 32
    warm_up: bool = False
    rope_dim: int = 0
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _positive(self, "top_k", "heads", "head_dim")
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim must be even and in [0, head_dim={self.head_dim}], got {self.rope_dim}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be > 0, got {self.rope_theta}")


@dataclass(frozen=True)
class LSHConfig:
    """Queries see keys of their own hash bucket, the latest ``chunk`` to 2 · ``chunk`` of them in each of ``rounds``
    (Reformer, arXiv:2001.04451). seed: of the random rotations. shared_qk: queries are keys, as in the paper: the layer
    has no projection to queries, and as many key-value heads as heads."""

    num_buckets: int = 16
    rounds: int = 2
    chunk: int = 32
    seed: int = 0
    shared_qk: bool = False

    def __post_init__(self) -> None:
        _positive(self, "num_buckets", "rounds", "chunk")
        check_seed(self.seed)
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {self.num_buckets}")


@dataclass(frozen=True)
class KMeansConfig:
    """Queries see keys of the cluster that they are nearest to, the latest ``window`` to 2 · ``window`` of them
    (Routing Transformer, arXiv:2003.05997). decay: of the centroids' moving average; seed: of their first values.
    shared_qk: queries are keys: the layer has no projection to queries, and as many key-value heads as heads.

    The paper's algorithm 1 (``KMeansRouting(members="top")``) is no word here: what it chooses depends on later tokens,
    which decoding has not seen."""

    num_clusters: int = 8
    window: int = 32
    decay: float = 0.999
    seed: int = 0
    shared_qk: bool = False

    def __post_init__(self) -> None:
        _positive(self, "num_clusters", "window")
        check_seed(self.seed)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True)
class SinkhornConfig:
    """Queries see their own block and a learned soft mix of earlier blocks (Sparse Sinkhorn Attention,
    arXiv:2002.11296).

    max_blocks: blocks of the longest sequence. iterations, temperature: of the balancing of the mix. gumbel: noise on
    it in training, from ``seed``. causal: False mixes later blocks too, for an encoder, whose pattern is ``full()``.
    """

    block: int = 64
    max_blocks: int = 64
    iterations: int = 8
    temperature: float = 0.75
    gumbel: bool = False
    seed: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        _positive(self, "block", "max_blocks")
        check_seed(self.seed)
        at_least("iterations", self.iterations, 0)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")


SelectionConfig = MoBAConfig | TopKKeysConfig | NSAConfig | DSAConfig | LSHConfig | KMeansConfig | SinkhornConfig

SELECTIONS: dict[str, type[SelectionConfig]] = {
    "moba": MoBAConfig,
    "top_k": TopKKeysConfig,
    "nsa": NSAConfig,
    "dsa": DSAConfig,
    "lsh": LSHConfig,
    "kmeans": KMeansConfig,
    "sinkhorn": SinkhornConfig,
}

# those that choose among the keys that a pattern shows
Bounded = TopKKeysConfig | DSAConfig

# those that leave the choice of queries being keys
SharedQK = LSHConfig | KMeansConfig

# the side loss that a kind has in training
SIDE_LOSSES: dict[type[SelectionConfig], str] = {DSAConfig: "indexer_kl", KMeansConfig: "kmeans_commitment"}


def _positive(record: SelectionConfig, *names: str) -> None:
    check_fields(record)
    for name in names:
        at_least(name, getattr(record, name), 1)
