"""The shape of a layer's feed-forward, of whichever kind, as frozen records that validate themselves."""

import math
from dataclasses import dataclass

from moe import Thresholds
from moe.checks import at_least, below_one, not_negative, one_of, positive
from moe.thresholded import GATED
from transformer.checks import check_fields

ACTIVATIONS = ("swiglu", "gelu", "relu", "silu", "relu2")
ROUTERS = ("top_k", "switch", "noisy_top_k", "top_2", "sigmoid", "expert_choice", "hash", "sinkhorn", "base")
# options of MoEConfig that only some routers have
ROUTER_OPTIONS = {
    "jitter": ("switch",),
    "second_expert": ("top_2",),
    "renormalize": ("top_k", "sigmoid"),
    **dict.fromkeys(("num_groups", "top_groups", "route_scale", "bias_update"), ("sigmoid",)),
    **dict.fromkeys(("sinkhorn_iterations", "sinkhorn_temperature"), ("sinkhorn",)),
    **dict.fromkeys(("auction_rounds", "auction_epsilon"), ("base",)),
    **dict.fromkeys(("hash_seed", "hash_table"), ("hash",)),
}
DROP_PRIORITIES = ("first_come", "gate", "choice")


@dataclass(frozen=True)
class DenseConfig:
    """A dense feed-forward layer of ``hidden`` neurons; ``swiglu`` has a gate matrix, the other activations do not.

    drop_connect: rate at which single weights are dropped in training (:class:`moe.DropConnect`). error_k: how many of
    the errors that come back to each output vector of a matrix are kept, None for all; error_unified: the same ones
    for all tokens of a batch (:func:`moe.meprop_linear`). A matrix narrower than error_k keeps all.
    """

    hidden: int
    activation: str = "swiglu"
    drop_connect: float = 0.0
    error_k: int | None = None
    error_unified: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("hidden", self.hidden, 1)
        one_of("activation", self.activation, ACTIVATIONS)
        if self.error_k is not None:
            at_least("error_k", self.error_k, 1)
        elif self.error_unified:
            raise ValueError("error_unified needs error_k, the number of errors that are kept, got error_k=None")
        below_one("drop_connect", self.drop_connect)


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of ``num_experts`` feed-forward layers of ``hidden`` neurons each, ``k`` of them for each token.

    router: how experts are chosen (:data:`ROUTERS`); ``switch`` and ``base`` take k = 1, ``top_2`` k = 2; under
    ``expert_choice`` each expert takes T·k/E tokens, so that k is what a token gets on average. renormalize: whether
    the gates of the chosen k sum to 1 (top_k, sigmoid). jitter: multiplicative input noise of the switch router in
    training.
    num_groups, top_groups: the sigmoid router chooses inside the best ``top_groups`` of ``num_groups`` groups of
    experts; route_scale: factor on its gates; bias_update: step of its balancing bias.
    second_expert: whether top_2 uses it at "random", in proportion to its gate, or "always".
    sinkhorn_iterations, sinkhorn_temperature: of the sinkhorn router's plan, in training. auction_rounds: at most, and
    auction_epsilon: the least that a bid rises by, of the base router's auction, in training.
    hash_table: "none", the hash router hashes every id; "even", it has a table in which the ids of the vocabulary are
    spread evenly; "balanced", their frequencies are (:meth:`moe.HashRouter.balance` makes it, from the training text in
    a run). hash_seed: which of the hash functions.
    capacity_factor: None keeps every assignment; a number c lets an expert take ``ceil(k·T/E·c)`` of them and drops the
    rest; drop_priority: the latest ("first_come"), the lowest gates ("gate") or second choices ("choice") go first.
    shared_hidden: neurons of a dense expert that every token uses. expert_bias: whether experts, that one too, have
    biases before their activation and on their output.
    allow_future: an expert-choice router compares a token with later ones; a causal model takes it only with this.
    """

    hidden: int
    num_experts: int
    k: int = 2
    router: str = "top_k"
    renormalize: bool = True
    capacity_factor: float | None = None
    shared_hidden: int = 0
    jitter: float = 0.0
    activation: str = "swiglu"
    num_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    bias_update: float = 1e-3
    drop_priority: str = "first_come"
    allow_future: bool = False
    sinkhorn_iterations: int = 8
    hash_seed: int = 0
    second_expert: str = "random"
    sinkhorn_temperature: float = 1.0
    auction_rounds: int = 500
    auction_epsilon: float = 0.01
    hash_table: str = "none"
    expert_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("hidden", self.hidden, 1)
        at_least("num_experts", self.num_experts, 1)
        for name in ("sinkhorn_iterations", "auction_rounds"):
            at_least(name, getattr(self, name), 1)
        for name in ("route_scale", "sinkhorn_temperature", "auction_epsilon"):
            positive(name, getattr(self, name))
        not_negative("bias_update", self.bias_update)
        at_least("shared_hidden", self.shared_hidden, 0)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("router", self.router, ROUTERS)
        one_of("drop_priority", self.drop_priority, DROP_PRIORITIES)
        one_of("second_expert", self.second_expert, ("random", "always"))
        one_of("hash_table", self.hash_table, ("none", "even", "balanced"))
        if not 1 <= self.k <= self.num_experts:
            raise ValueError(f"k must be in [1, num_experts={self.num_experts}], got {self.k}")
        fixed = {"switch": 1, "top_2": 2, "base": 1}.get(self.router, self.k)
        if self.k != fixed:
            raise ValueError(
                f"the {self.router} router sends a token to {fixed} experts: k must be {fixed}, got {self.k}"
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor must be a finite number > 0, or None, got {self.capacity_factor}")
        below_one("jitter", self.jitter)
        self._check_owners()
        self._check_groups()

    @property
    def sees_future(self) -> bool:
        """Whether a token's experts depend on later tokens."""
        return self.router == "expert_choice"

    def _check_owners(self) -> None:
        for name, routers in ROUTER_OPTIONS.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and self.router not in routers:
                raise ValueError(
                    f"{name} belongs to the {' or '.join(routers)} router, got {name}={value} with {self.router!r}"
                )
        if self.hash_table == "balanced" and self.hash_seed:
            raise ValueError(
                f"hash_seed must be 0 with hash_table='balanced', which hashes nothing, got {self.hash_seed}"
            )
        if self.capacity_factor is None and self.drop_priority != "first_come":
            raise ValueError(f"drop_priority needs a capacity_factor, got {self.drop_priority!r} with None")
        if self.capacity_factor is not None and self.router == "expert_choice":
            raise ValueError(
                "capacity_factor must be None under expert_choice, whose experts take T·k/E tokens each, "
                f"got {self.capacity_factor}: set k"
            )

    def _check_groups(self) -> None:
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"num_groups must divide num_experts={self.num_experts}, got {self.num_groups}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups must be in [1, num_groups={self.num_groups}], got {self.top_groups}")
        open_experts = self.top_groups * self.num_experts // self.num_groups
        if self.k > open_experts:
            raise ValueError(f"k must be at most the {open_experts} experts of {self.top_groups} groups, got {self.k}")


@dataclass(frozen=True)
class ThresholdedConfig:
    """A feed-forward layer that leaves out small activations: ``moe.ThresholdedFeedForward`` has the rules.

    method: "hard", "cett", "cats" (with a gate: swiglu, reglu, drelu) or "teal". threshold: magnitudes up to it are
    dropped; thresholds: instead, one for each place, as calibration finds them; top_k: neurons kept instead, under
    "hard". predictor_rank, predictor_threshold: a :class:`moe.ActivePredictor` of that rank tells the neurons
    beforehand, those with a logit above the threshold. It is trained apart (:func:`transformer.train_own_predictors`),
    gets no gradient from the model, and is frozen; with a predictor_threshold of None it is not trained yet and tells
    every neuron. predictor_rank None: no predictor. execution: "auto" measures, for each shape and density, whether
    decoding is faster where it reads the needed weights alone; "sparse" and "dense" force one way: what is measured may
    differ from run to run.
    """

    hidden: int
    activation: str = "relu2"
    method: str = "hard"
    threshold: float = 0.0
    top_k: int | None = None
    thresholds: Thresholds | None = None
    predictor_rank: int | None = None
    predictor_threshold: float | None = None
    execution: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        at_least("hidden", self.hidden, 1)
        one_of("activation", self.activation, ("swiglu", "reglu", "drelu", "relu", "relu2", "gelu"))
        one_of("method", self.method, ("hard", "cett", "cats", "teal"))
        one_of("execution", self.execution, ("auto", "dense", "sparse"))
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be >= 0, got {self.threshold}")
        if self.method == "cats" and self.activation not in GATED:
            raise ValueError(f"method 'cats' must have a gate ({', '.join(GATED)}), got activation={self.activation!r}")
        if self.thresholds is not None and (self.threshold or self.top_k is not None):
            raise ValueError(
                f"thresholds must stand alone, got threshold={self.threshold} and top_k={self.top_k} beside them"
            )
        if self.predictor_rank is not None:
            at_least("predictor_rank", self.predictor_rank, 1)
        if self.method == "teal" and self.predictor_rank is not None:
            raise ValueError("method must be 'hard', 'cats' or 'cett' with a predictor, got 'teal'")
        if self.top_k is None:
            return
        if not 1 <= self.top_k <= self.hidden:
            raise ValueError(f"top_k must be in [1, hidden={self.hidden}], got {self.top_k}")
        if self.method != "hard":
            raise ValueError(f"method must be 'hard' with top_k={self.top_k}, got {self.method!r}")
        if self.threshold:
            raise ValueError(f"threshold must be 0 with top_k={self.top_k}, which chooses alone, got {self.threshold}")


@dataclass(frozen=True)
class SoftMoEConfig:
    """Soft MoE: every expert works on ``slots_per_expert`` mixtures of all tokens (arXiv:2308.00951).

    expert_bias: whether experts have biases before their activation and on their output.
    allow_future: a mixture holds later tokens; a causal model takes the layer only with this.
    """

    hidden: int
    num_experts: int
    slots_per_expert: int = 1
    activation: str = "swiglu"
    allow_future: bool = False
    expert_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("hidden", "num_experts", "slots_per_expert"):
            at_least(name, getattr(self, name), 1)
        one_of("activation", self.activation, ACTIVATIONS)

    @property
    def sees_future(self) -> bool:
        """Whether a token's output depends on later tokens: always."""
        return True


@dataclass(frozen=True)
class ProductKeyConfig:
    """A product-key memory of ``num_keys²`` values, of which each of ``heads`` heads reads ``k`` (arXiv:1907.05242).

    key_dim: width of a head's query. query_norm: "layer", "batch" (lets tokens see each other while training) or
    "none". gated: Memory+ (arXiv:2412.09764). pool: layers that name the same pool share one table of values, as in
    Memory+; their num_keys and value_dim must agree. None: a table of the layer's own. value_dim: width of the values,
    which the gate brings back to the layer's; None: the layer's width.
    """

    num_keys: int
    heads: int = 4
    k: int = 32
    key_dim: int = 128
    query_norm: str = "layer"
    gated: bool = False
    pool: str | None = None
    value_dim: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_keys(self)
        if self.pool == "":
            raise ValueError("pool must be a name, or None for a table of the layer's own, got ''")
        if self.value_dim is not None:
            at_least("value_dim", self.value_dim, 1)
            if not self.gated:
                raise ValueError(f"value_dim needs gated=True, whose matrices have its width, got {self.value_dim}")


@dataclass(frozen=True)
class PEERConfig:
    """``num_keys²`` experts of one neuron each; each of ``heads`` heads uses ``k`` of them (arXiv:2407.04153)."""

    num_keys: int
    heads: int = 8
    k: int = 16
    key_dim: int = 128
    query_norm: str = "layer"
    activation: str = "gelu"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_keys(self)
        one_of("activation", self.activation, ("gelu", "relu2"))


def _check_keys(config: ProductKeyConfig | PEERConfig) -> None:
    for name in ("num_keys", "heads"):
        at_least(name, getattr(config, name), 1)
    if not 1 <= config.k <= config.num_keys:
        raise ValueError(f"k must be in [1, num_keys={config.num_keys}], got {config.k}")
    if config.key_dim < 2 or config.key_dim % 2:
        raise ValueError(f"key_dim must be even and >= 2, got {config.key_dim}")
    one_of("query_norm", config.query_norm, ("layer", "batch", "none"))


FeedForwardConfig = DenseConfig | ThresholdedConfig | MoEConfig | SoftMoEConfig | ProductKeyConfig | PEERConfig
