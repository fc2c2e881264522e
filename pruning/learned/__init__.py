"""Sparsity that is trained: scores, gates, thresholds and noise levels beside the weights, and penalties on them."""

from pruning.learned.base import LearnedSparsity
from pruning.learned.hard_concrete import L0
from pruning.learned.movement import Movement, SoftMovement
from pruning.learned.penalties import group_lasso, hoyer_square, l1, l2, polarization
from pruning.learned.shrinkage import Proximal, Regularized
from pruning.learned.thresholds import STR, soft_threshold
from pruning.learned.units import L0Units, UnitGates, VariationalUnits
from pruning.learned.variational import VariationalDropout

__all__ = [
    "L0",
    "STR",
    "L0Units",
    "LearnedSparsity",
    "Movement",
    "Proximal",
    "Regularized",
    "SoftMovement",
    "UnitGates",
    "VariationalDropout",
    "VariationalUnits",
    "group_lasso",
    "hoyer_square",
    "l1",
    "l2",
    "polarization",
    "soft_threshold",
]
