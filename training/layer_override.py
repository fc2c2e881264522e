"""A [[model.layer]] section of a run: what differs in one layer."""

from dataclasses import dataclass
from typing import Literal

from moe.column_products import Execution
from moe.depth import Weighting
from moe.dispatch import Priority
from moe.product_key import QueryNorm
from moe.routers.top_2 import Second
from moe.thresholded import Method

FeedForwardName = Literal["moe", "dense", "thresholded", "soft_moe", "product_key", "peer"]
SelectionName = Literal["none", "moba", "top_k", "nsa", "dsa", "lsh", "kmeans", "sinkhorn"]
RouterName = Literal["top_k", "switch", "noisy_top_k", "top_2", "sigmoid", "expert_choice", "hash", "sinkhorn", "base"]
HashTable = Literal["none", "even", "balanced"]
ActivationName = Literal["swiglu", "reglu", "drelu", "gelu", "relu", "silu", "relu2"]


@dataclass(frozen=True)
class LayerOverride:
    """One layer that differs from the others: every field but 'at' may be left out."""

    at: int
    """Index of the layer, from 0."""
    heads: int | None = None
    """Query heads of this layer."""
    kv_heads: int | None = None
    """Key-value heads of this layer."""
    pattern: str | None = None
    """Attention pattern of this layer."""
    selection: SelectionName | None = None
    """How this layer chooses the keys that a query sees; 'none': its pattern alone decides."""
    softcap: float | None = None
    """Scores of this layer are capped to softcap · tanh(score / softcap); 0: not capped."""
    attention_dropout: float | None = None
    """Rate at which attention probabilities of this layer are dropped, in training."""
    alibi: bool | None = None
    """Whether a bias by distance gives this layer's positions (ALiBi), in place of rotations."""
    feedforward: FeedForwardName | None = None
    """Kind of feed-forward of this layer."""
    hidden: int | None = None
    """Neurons of each expert, or of the dense feed-forward."""
    num_experts: int | None = None
    """Experts of this layer."""
    k: int | None = None
    """Experts that a token uses in this layer."""
    router: RouterName | None = None
    """How experts of this layer are chosen."""
    capacity_factor: float | None = None
    """Tokens that an expert of this layer takes, as a multiple of an equal share."""
    drop_priority: Priority | None = None
    """Which tokens keep their place when an expert of this layer is over its capacity."""
    renormalize: bool | None = None
    """Whether the weights of a token's experts in this layer are scaled to sum to 1 (top_k, sigmoid)."""
    jitter: float | None = None
    """Multiplicative noise on the input of this layer's switch router, in training."""
    second_expert: Second | None = None
    """Whether this layer's top_2 router uses the second expert at random or always."""
    num_groups: int | None = None
    """Groups that this layer's sigmoid router divides the experts into."""
    top_groups: int | None = None
    """Groups that a token's experts come from in this layer (sigmoid)."""
    route_scale: float | None = None
    """Factor on the gates of this layer's sigmoid router."""
    bias_update: float | None = None
    """Step of the balancing bias of this layer's sigmoid router."""
    sinkhorn_iterations: int | None = None
    """Iterations that balance this layer's sinkhorn router."""
    sinkhorn_temperature: float | None = None
    """Temperature of the plan of this layer's sinkhorn router."""
    auction_rounds: int | None = None
    """Rounds that the auction of this layer's base router may take."""
    auction_epsilon: float | None = None
    """Least rise of a bid in the auction of this layer's base router."""
    hash_table: HashTable | None = None
    """What the table of this layer's hash router spreads evenly, if it has one."""
    hash_seed: int | None = None
    """Which hash function this layer's hash router takes."""
    slots_per_expert: int | None = None
    """Mixtures of tokens that each expert of this layer's soft_moe works on."""
    shared_hidden: int | None = None
    """Neurons of an expert that every token uses in this layer."""
    expert_bias: bool | None = None
    """Whether this layer's experts have biases."""
    activation: ActivationName | None = None
    """Activation of this layer's feed-forward."""
    num_keys: int | None = None
    """Sub-keys of each half of this layer's memory."""
    memory_heads: int | None = None
    """Queries that a token asks of this layer's memory."""
    memory_k: int | None = None
    """Rows that each query reads in this layer."""
    key_dim: int | None = None
    """Width of a query of this layer's memory."""
    query_norm: QueryNorm | None = None
    """Norm of the queries of this layer's memory."""
    gated: bool | None = None
    """Whether the answer of this layer's product-key memory passes a gate."""
    memory_pool: str | None = None
    """Pool of values that this layer's product-key memory shares."""
    value_dim: int | None = None
    """Width of the rows of this layer's gated product-key memory."""
    threshold_method: Method | None = None
    """What this layer's thresholded feed-forward compares with its threshold."""
    threshold: float | None = None
    """Magnitude up to which this layer's thresholded feed-forward leaves activations out."""
    top_neurons: int | None = None
    """Neurons that this layer's thresholded feed-forward keeps for each token."""
    threshold_execution: Execution | None = None
    """How this layer's thresholded feed-forward decodes on the CPU."""
    activation_predictor_rank: int | None = None
    """Rank of the network that tells the neurons of this layer's thresholded feed-forward."""
    error_k: int | None = None
    """Errors that the backward pass of this layer's dense feed-forward keeps for each token."""
    error_unified: bool | None = None
    """Whether they are the same for all tokens of a batch."""
    drop_connect: float | None = None
    """Rate at which single weights of this layer's attention and dense feed-forward are dropped, in training."""
    layer_drop: float | None = None
    """Rate at which this layer is skipped for a batch, in training."""
    layer_drop_rescale: bool | None = None
    """Whether this layer, where it is not skipped, changes the stream by 1 / (1 - layer_drop) times as much."""
    attention_threshold: float | None = None
    """Magnitude up to which the inputs of this layer's attention projections are left out."""
    depth_capacity: float | None = None
    """Share of each sequence that passes this layer (Mixture-of-Depths)."""
    depth_weighting: Weighting | None = None
    """Factor on what this layer changes, if it has a depth_capacity."""
