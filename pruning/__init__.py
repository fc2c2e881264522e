"""Which parameters stay: scores of heads, neurons and weights, masks that hold, and surgery that shrinks."""

from pruning.axes import Axis, Slice
from pruning.gates import gated, masked
from pruning.saliency import (
    AxisScores,
    gate_importance,
    head_importance,
    leave_one_out,
    magnitude,
    magnitude_importance,
    neuron_importance,
    random_importance,
    random_scores,
    taylor,
)
from pruning.selection import select_units
from pruning.structured import PruneReport, prune_heads, prune_neurons
from pruning.surgery import count_parameters, predict_parameters, shrink

__all__ = [
    "Axis",
    "AxisScores",
    "PruneReport",
    "Slice",
    "count_parameters",
    "gate_importance",
    "gated",
    "head_importance",
    "leave_one_out",
    "magnitude",
    "magnitude_importance",
    "masked",
    "neuron_importance",
    "predict_parameters",
    "prune_heads",
    "prune_neurons",
    "random_importance",
    "random_scores",
    "select_units",
    "shrink",
    "taylor",
]
