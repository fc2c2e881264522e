"""The [model] section of a run, and the transformer that it describes."""

import dataclasses
from dataclasses import dataclass

from moe.checks import at_least, below_one, positive
from moe.column_products import Execution
from moe.depth import Weighting
from moe.dispatch import Priority
from moe.product_key import QueryNorm
from moe.routers.top_2 import Second
from moe.thresholded import Method
from training.layer_override import ActivationName, FeedForwardName, HashTable, RouterName, SelectionName
from training.layer_override import LayerOverride as LayerOverride
from training.model_layers import attention_of, feedforward_of
from training.model_owners import check_owners
from training.model_words import DEPTH_WORDS, in_words, of_layer
from transformer import DepthConfig, LayerConfig, TransformerConfig


@dataclass(frozen=True)
class ModelConfig:
    """The model; the tokenizer gives its vocabulary. [[model.layer]] tables change single layers.

    An option of a kind of feed-forward or selection that no layer has is refused; but for the sizes hidden, num_experts
    and k, which a base of comparisons may state for other kinds (a layer's own table may not).
    """

    dim: int = 256
    """Width of the residual stream."""
    layers: int = 4
    """Number of layers."""
    heads: int = 4
    """Query heads of each layer."""
    kv_heads: int | None = None
    """Key-value heads (grouped-query attention); as many as heads if left out."""
    head_dim: int | None = None
    """Channels of a head; dim / heads if left out."""
    pattern: str = "causal()"
    """Which keys a query sees, e.g. 'causal() & (sliding_window(256) | sinks(4))'."""
    softcap: float = 0.0
    """Attention scores become softcap · tanh(score / softcap) before the softmax (Gemma 2 takes 50); 0: as they are."""
    alibi: bool = False
    """Whether a bias by distance on each head's scores gives the positions (ALiBi), in place of rotations (RoPE)."""
    selection: SelectionName = "none"
    """How the keys that a query sees are chosen by content: of those that the pattern shows the best keys (top_k) or
    keys by a lightning indexer (dsa); with pattern 'causal()' blocks by their mean key (moba), NSA's three branches
    (nsa), keys of the same hash bucket (lsh) or cluster (kmeans), or the own block and a learned mix of others
    (sinkhorn)."""
    select_block: int = 64
    """Keys of a block (moba, nsa, sinkhorn); how many of its bucket or cluster a query sees at least (lsh, kmeans)."""
    select_k: int = 8
    """Blocks (moba, nsa) or keys (top_k, dsa) that a query sees."""
    select_window: int = 128
    """Keys of the window beside the selected ones (nsa)."""
    select_stride: int = 16
    """Keys from one compressed key to the next (nsa)."""
    select_compress: int | None = None
    """Keys that a compressed key stands for (nsa); None: twice select_stride."""
    select_heads: int = 4
    """Heads of the lightning indexer (dsa)."""
    select_dim: int = 32
    """Width of a head of the lightning indexer (dsa)."""
    select_buckets: int = 8
    """Hash buckets of each round (lsh), or clusters (kmeans)."""
    select_rounds: int = 2
    """Rounds of hashing (lsh)."""
    select_shared_qk: bool = False
    """Whether queries are keys (lsh, kmeans), with as many key-value heads as heads and no projection to queries."""
    select_initial: int = 1
    """First blocks that every query sees (nsa)."""
    select_local: int = 2
    """Latest blocks that a query always sees, its own among them (nsa)."""
    select_hidden: int | None = None
    """Neurons of the network that compresses keys (nsa); twice the channels of a head if left out."""
    select_rope_dim: int = 0
    """Channels of each head of the lightning indexer that turn with their position (dsa)."""
    select_warm_up: bool = False
    """Attend to all keys while the lightning indexer learns (dsa)."""
    select_decay: float = 0.999
    """Decay of the moving average of the centroids (kmeans)."""
    select_iterations: int = 8
    """Iterations that balance the mix of blocks (sinkhorn)."""
    select_temperature: float = 0.75
    """Temperature of the mix of blocks (sinkhorn)."""
    select_gumbel: bool = False
    """Noise on the mix of blocks, in training (sinkhorn)."""
    select_seed: int = 0
    """Seed of rotations (lsh), first centroids (kmeans) or noise (sinkhorn)."""
    feedforward: FeedForwardName = "moe"
    """Mixture of experts; one dense feed-forward, or one that leaves out small activations (thresholded); Soft MoE;
    product-key memory; or PEER, a memory of one-neuron experts."""
    hidden: int = 256
    """Neurons of each expert, or of the dense feed-forward."""
    activation: ActivationName | None = None
    """Activation of the feed-forward: swiglu, gelu, relu, silu or relu2; if it is thresholded reglu or drelu too, but
    not silu; gelu or relu2 in peer. If left out swiglu, relu2 if it is thresholded, gelu in peer."""
    num_experts: int = 8
    """Experts of each layer."""
    k: int = 2
    """Experts that a token uses."""
    router: RouterName = "top_k"
    """How experts are chosen."""
    renormalize: bool = True
    """Whether the weights of a token's k experts are scaled to sum to 1 (top_k, sigmoid)."""
    capacity_factor: float | None = None
    """Tokens that an expert takes, as a multiple of an equal share; without it nothing is dropped."""
    shared_hidden: int = 0
    """Neurons of an expert that every token uses, beside the routed ones."""
    expert_bias: bool = False
    """Whether experts have biases before their activation and on their output."""
    jitter: float = 0.0
    """Multiplicative noise on the input of a switch router, in training."""
    second_expert: Second = "random"
    """Whether the top_2 router uses a token's second expert at random, in proportion to its gate, or always."""
    num_groups: int = 1
    """Groups that the sigmoid router divides the experts into."""
    top_groups: int = 1
    """Groups, the best for a token, that its experts come from (sigmoid)."""
    route_scale: float = 1.0
    """Factor on the gates of the sigmoid router."""
    bias_update: float = 1e-3
    """Step of the sigmoid router's balancing bias after each optimiser step."""
    sinkhorn_iterations: int = 8
    """Iterations that balance the sinkhorn router in training."""
    sinkhorn_temperature: float = 1.0
    """Temperature of the sinkhorn router's plan in training: the lower, the nearer to the best balanced assignment."""
    auction_rounds: int = 500
    """Rounds that the base router's auction may take in training; who has no place then goes where there is room."""
    auction_epsilon: float = 0.01
    """Least rise of a bid in the base router's auction, which is what each token may lose."""
    hash_table: HashTable = "none"
    """Whether the hash router has a table that spreads the vocabulary over the experts evenly (even), or the training
    text's tokens (balanced); without one it hashes each id."""
    hash_seed: int = 0
    """Which hash function the hash router takes."""
    drop_priority: Priority = "first_come"
    """Which tokens keep their place when an expert is over its capacity: the earliest, or those of the highest gate."""
    allow_future: bool = False
    """Take experts that compare a token with later ones (expert_choice, soft_moe) in this causal model all the same."""
    slots_per_expert: int = 1
    """Mixtures of tokens that each expert of a soft_moe works on."""
    num_keys: int = 128
    """Sub-keys of each half of a memory's keys (product_key, peer): the memory has their square of rows."""
    memory_heads: int = 4
    """Queries that a token asks of a memory."""
    memory_k: int = 16
    """Rows that each query reads."""
    key_dim: int = 64
    """Width of a query."""
    query_norm: QueryNorm = "layer"
    """Norm of the queries; 'batch' lets tokens see each other in training."""
    gated: bool = False
    """Whether a product-key memory's answer passes a gate (Memory+)."""
    memory_pool: str | None = None
    """Product-key layers that name the same pool share one table of values (Memory+); each its own if left out."""
    value_dim: int | None = None
    """Width of a gated product-key memory's rows; the model's if left out."""
    threshold_method: Method = "hard"
    """What a thresholded feed-forward compares with its threshold: a neuron's value (hard), what it adds to the output
    (cett), its gate (cats), or each input of a matrix (teal)."""
    threshold: float = 0.0
    """Magnitude up to which a thresholded feed-forward leaves activations out."""
    top_neurons: int | None = None
    """Neurons that a thresholded feed-forward keeps for each token, the largest; by threshold if left out."""
    threshold_execution: Execution = "auto"
    """How a thresholded feed-forward decodes on the CPU: whichever is measured to be faster, always by reading what is
    left alone (sparse), or always whole (dense)."""
    activation_predictor_rank: int | None = None
    """Rank of a network in a thresholded feed-forward that tells beforehand which neurons it keeps (DejaVu), but with
    teal. It is not trained with the model and tells every neuron, in evaluation too, until 'sparse-transformers
    threshold RUN --method dejavu' trains it; none if left out."""
    attention_threshold: float = 0.0
    """Magnitude up to which entries of the inputs of attention's four projections are left out, in training too
    (TEAL)."""
    tied: bool = True
    """Whether the output head shares the embedding's weights."""
    depth_capacity: float | None = None
    """Share of each sequence that passes a layer in training, the rest skips it (Mixture-of-Depths); all if left out.
    A predictor decides when the model is evaluated or generates."""
    depth_weighting: Weighting = "sigmoid"
    """Factor on what a layer with a depth_capacity changes: sigmoid of its router's logit, or the logit."""
    dropout: float = 0.0
    """Dropout rate."""
    attention_dropout: float = 0.0
    """Rate at which attention probabilities are dropped, in training."""
    head_dropout: float = 0.0
    """Rate at which an attention head is dropped for a sequence, in training."""
    drop_connect: float = 0.0
    """Rate at which single weights of attention and dense feed-forward are dropped, in training."""
    error_k: int | None = None
    """Errors that the backward pass of a dense feed-forward's matrices keeps for each token, the largest (meProp); all
    if left out."""
    error_unified: bool = False
    """Whether the kept errors are the same for all tokens of a batch, which saves time where choosing token by token
    does not."""
    path_dropout: float = 0.0
    """Rate at which a branch of the last layer is dropped for a sequence, in training; it rises linearly from layer to
    layer (stochastic depth)."""
    layer_drop: float = 0.0
    """Rate at which a layer is skipped for a batch, in training."""
    layer_drop_rescale: bool = False
    """Whether a layer that is not skipped changes the stream by 1 / (1 - layer_drop) times as much, in training."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    prefix_length: int = 0
    """First tokens of each sequence that patterns such as 'prefix_lm(64)' may look ahead to: a prefix language model,
    whose loss leaves them out."""
    max_length: int | None = None
    """Longest sequence that the model accepts; data.length if left out."""
    layer: tuple[LayerOverride, ...] = ()
    """Layers that differ."""


def model_config(model: ModelConfig, *, vocab_size: int, length: int) -> TransformerConfig:
    """The transformer that a [model] section describes.

    Raises: ValueError if sizes do not fit together, an override names a layer that is not there or that another
    names too, or an option belongs to a kind of feed-forward or selection that no layer has.
    """
    _check_numbers(model)
    overrides: dict[int, LayerOverride] = {}
    for override in model.layer:
        if not 0 <= override.at < model.layers:
            raise ValueError(f"model.layer.at must be in [0, layers={model.layers}), got {override.at}")
        if override.at in overrides:
            raise ValueError(f"model.layer.at must name each layer once, got {override.at} twice: put both into one")
        overrides[override.at] = override
    check_owners(model)
    max_length = length if model.max_length is None else model.max_length
    layers = []
    for index in range(model.layers):
        with of_layer(index):
            layers.append(_layer(model, index, overrides.get(index), max_length))
    return TransformerConfig(
        vocab_size=vocab_size,
        dim=model.dim,
        layers=tuple(layers),
        max_length=max_length,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        tied=model.tied,
        dropout=model.dropout,
        prefix_length=model.prefix_length,
    )


def _layer(model: ModelConfig, index: int, override: LayerOverride | None, max_length: int) -> LayerConfig:
    if override is not None:
        changed = {k: v for k, v in dataclasses.asdict(override).items() if k != "at" and v is not None}
        model = dataclasses.replace(model, **changed)
    if model.depth_capacity is not None and model.selection != "none":
        raise ValueError(
            "selection must be 'none' in a layer with depth_capacity, whose tokens stand at scattered positions, "
            f"got {model.selection!r}"
        )
    attention = attention_of(model, max_length)
    with in_words(DEPTH_WORDS):
        depth = None if model.depth_capacity is None else DepthConfig(model.depth_capacity, model.depth_weighting)
    # p_l = l/L · p_L: Huang et al. 2016 (arXiv:1603.09382), eq. 4
    path_dropout = model.path_dropout * (index + 1) / model.layers
    return LayerConfig(
        attention, feedforward_of(model), depth, path_dropout=path_dropout, layer_drop=model.layer_drop,
        layer_drop_rescale=model.layer_drop_rescale and model.layer_drop > 0,
    )  # fmt: skip


def _check_numbers(model: ModelConfig) -> None:
    """Of what no layer has of its own. Raises: ValueError."""
    for name in ("dim", "layers"):
        at_least(f"model.{name}", getattr(model, name), 1)
    for name in ("rope_theta", "norm_eps"):
        positive(f"model.{name}", getattr(model, name))
    below_one("model.path_dropout", model.path_dropout)
