"""Which parameters stay: scores of heads, neurons and weights, masks that hold, and surgery that shrinks."""

from pruning.adapters.loading import load_pruned
from pruning.allocation import erk, global_ranking, keep_dense, lamp_ranking, min_density, owl, uniform
from pruning.axes import Axis, Slice
from pruning.budget import prune_to_budget
from pruning.execution import SparseLinear, choose_execution, restore_dense
from pruning.formats import decode, encode, load_compact, save_compact, smallest
from pruning.gates import gated, masked
from pruning.mask_selection import select_masks
from pruning.masking import Masks
from pruning.merge import fold_constant_neurons, merge_neurons
from pruning.merge_experts import merge_experts
from pruning.model_axes import prunable_axes
from pruning.prescribed import Prescribed, masks_before_training, masks_from
from pruning.recovery import add_adapters, load_quantized, merge_adapters, quantize_weights
from pruning.saliency import (
    AxisScores,
    WeightChange,
    activation_importance,
    attention_confidence,
    expert_importance,
    expert_neuron_importance,
    gate_importance,
    gradient_scores,
    grasp_scores,
    head_importance,
    lamp,
    layer_importance,
    leave_one_out,
    magnitude,
    magnitude_importance,
    neuron_importance,
    random_importance,
    random_scores,
    response_importance,
    snip_scores,
    synflow_scores,
    taylor,
    taylor_scores,
    woodfisher_scores,
)
from pruning.sanity import reinitialise, shuffle_masks
from pruning.schedules import cubic, linear, one_shot
from pruning.selection import select_units
from pruning.sparsifier import Sparsifier, sparsify
from pruning.structure import block, columns, n_of_m, rows, unstructured
from pruning.structured import (
    PruneReport,
    prune_expert_neurons,
    prune_experts,
    prune_heads,
    prune_layers,
    prune_neurons,
    prune_width,
)
from pruning.surgery import count_parameters, predict_parameters, shrink
from pruning.torch_prune import from_torch_prune, to_torch_prune
from pruning.weights import prunable_weights

__all__ = [
    "Axis",
    "AxisScores",
    "Masks",
    "Prescribed",
    "PruneReport",
    "Slice",
    "SparseLinear",
    "Sparsifier",
    "WeightChange",
    "activation_importance",
    "add_adapters",
    "attention_confidence",
    "block",
    "choose_execution",
    "columns",
    "count_parameters",
    "cubic",
    "decode",
    "encode",
    "erk",
    "expert_importance",
    "expert_neuron_importance",
    "fold_constant_neurons",
    "from_torch_prune",
    "gate_importance",
    "gated",
    "global_ranking",
    "gradient_scores",
    "grasp_scores",
    "head_importance",
    "keep_dense",
    "lamp",
    "lamp_ranking",
    "layer_importance",
    "leave_one_out",
    "linear",
    "load_compact",
    "load_pruned",
    "load_quantized",
    "magnitude",
    "magnitude_importance",
    "masked",
    "masks_before_training",
    "masks_from",
    "merge_adapters",
    "merge_experts",
    "merge_neurons",
    "min_density",
    "n_of_m",
    "neuron_importance",
    "one_shot",
    "owl",
    "predict_parameters",
    "prunable_axes",
    "prunable_weights",
    "prune_expert_neurons",
    "prune_experts",
    "prune_heads",
    "prune_layers",
    "prune_neurons",
    "prune_to_budget",
    "prune_width",
    "quantize_weights",
    "random_importance",
    "random_scores",
    "reinitialise",
    "response_importance",
    "restore_dense",
    "rows",
    "save_compact",
    "select_masks",
    "select_units",
    "shrink",
    "shuffle_masks",
    "smallest",
    "snip_scores",
    "sparsify",
    "synflow_scores",
    "taylor",
    "taylor_scores",
    "to_torch_prune",
    "uniform",
    "unstructured",
    "woodfisher_scores",
]
