"""Scores of weights and of structures; larger means more important, everywhere."""

from pruning.saliency.activations import activation_importance, response_importance
from pruning.saliency.confidence import attention_confidence
from pruning.saliency.correlation import correlation_scores
from pruning.saliency.data_free import lamp, magnitude, magnitude_importance, random_importance, random_scores
from pruning.saliency.expert_neurons import expert_neuron_importance
from pruning.saliency.experts import expert_importance
from pruning.saliency.first_order import gradient_scores, snip_scores, taylor, taylor_scores
from pruning.saliency.grasp import grasp_scores
from pruning.saliency.heads import AxisScores, gate_importance, head_importance, leave_one_out, neuron_importance
from pruning.saliency.layers import layer_importance
from pruning.saliency.outliers import outlier_shares
from pruning.saliency.second_order import hessian_diagonal, obd
from pruning.saliency.synflow import synflow_scores
from pruning.saliency.wanda import dense_wanda_scores
from pruning.saliency.weight_change import WeightChange
from pruning.saliency.woodfisher import inverse_fisher, woodfisher_scores, woodfisher_update

__all__ = [
    "AxisScores",
    "WeightChange",
    "activation_importance",
    "attention_confidence",
    "correlation_scores",
    "dense_wanda_scores",
    "expert_importance",
    "expert_neuron_importance",
    "gate_importance",
    "gradient_scores",
    "grasp_scores",
    "head_importance",
    "hessian_diagonal",
    "inverse_fisher",
    "lamp",
    "layer_importance",
    "leave_one_out",
    "magnitude",
    "magnitude_importance",
    "neuron_importance",
    "obd",
    "outlier_shares",
    "random_importance",
    "random_scores",
    "response_importance",
    "snip_scores",
    "synflow_scores",
    "taylor",
    "taylor_scores",
    "woodfisher_scores",
    "woodfisher_update",
]
