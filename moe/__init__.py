"""Conditional computation: which parameters a token uses."""

from moe.calibration import calibrate_thresholds, calibrate_to_perplexity
from moe.decode_layout import prepare_for_decoding
from moe.depth import DepthRouting, MixtureOfDepths, passing_tokens
from moe.dropout import DropConnect, HeadDropout, LayerDrop, PathDropout, drop_connect
from moe.expert_parallel import ShardedExperts, Traffic, gather_experts, shard_experts
from moe.fairscale import FairscaleGate, GumbelTop2Router, from_fairscale
from moe.layer import MoE
from moe.losses import entropy_loss, importance_loss, load_balancing_loss, load_loss, router_z_loss
from moe.memory_stats import MemoryStats, memory_stats
from moe.memory_values import MemoryValues
from moe.meprop import MePropLinear, meprop_linear
from moe.noise import Noise
from moe.peer import PEER
from moe.predictor import ActivePredictor, Foresight, active_neurons, foresight, train_predictor, train_predictors
from moe.product_key import ProductKeyMemory
from moe.routers import (
    BalancedAssignmentRouter,
    ExpertChoiceRouter,
    HashRouter,
    NoisyTopKRouter,
    SigmoidRouter,
    SinkhornRouter,
    SwitchRouter,
    Top2Router,
    TopKRouter,
)
from moe.routing import Routing
from moe.soft import SoftMoE
from moe.sparsified import sparsify_activations
from moe.stats import (
    RoutingMeter,
    RoutingStats,
    RoutingSummary,
    TakenToken,
    coactivation,
    coactivation_lift,
    count_together,
    dead_experts,
    drop_fractions,
    gate_mass,
    load_imbalance,
    load_variation,
    routing_stats,
    specialisation,
    top_tokens,
)
from moe.teal import TealThresholds, calibrate_teal
from moe.thresholded import ThresholdedFeedForward, Thresholds
from moe.thresholded_linear import AttentionThresholds, ThresholdedLinear
from moe.upcycle import upcycle

__all__ = [
    "PEER",
    "ActivePredictor",
    "AttentionThresholds",
    "BalancedAssignmentRouter",
    "DepthRouting",
    "DropConnect",
    "ExpertChoiceRouter",
    "FairscaleGate",
    "Foresight",
    "GumbelTop2Router",
    "HashRouter",
    "HeadDropout",
    "LayerDrop",
    "MePropLinear",
    "MemoryStats",
    "MemoryValues",
    "MixtureOfDepths",
    "MoE",
    "Noise",
    "NoisyTopKRouter",
    "PathDropout",
    "ProductKeyMemory",
    "Routing",
    "RoutingMeter",
    "RoutingStats",
    "RoutingSummary",
    "ShardedExperts",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftMoE",
    "SwitchRouter",
    "TakenToken",
    "TealThresholds",
    "ThresholdedFeedForward",
    "ThresholdedLinear",
    "Thresholds",
    "Top2Router",
    "TopKRouter",
    "Traffic",
    "active_neurons",
    "calibrate_teal",
    "calibrate_thresholds",
    "calibrate_to_perplexity",
    "coactivation",
    "coactivation_lift",
    "count_together",
    "dead_experts",
    "drop_connect",
    "drop_fractions",
    "entropy_loss",
    "foresight",
    "from_fairscale",
    "gate_mass",
    "gather_experts",
    "importance_loss",
    "load_balancing_loss",
    "load_imbalance",
    "load_loss",
    "load_variation",
    "memory_stats",
    "meprop_linear",
    "passing_tokens",
    "prepare_for_decoding",
    "router_z_loss",
    "routing_stats",
    "shard_experts",
    "sparsify_activations",
    "specialisation",
    "top_tokens",
    "train_predictor",
    "train_predictors",
    "upcycle",
]
