"""What sparsity costs: measurements, each a frozen record with a figure."""

from pruning.diagnostics.curve import Sensitivity, SparsityCurve, layer_sensitivity, mean_loss, sparsity_loss_curve
from pruning.diagnostics.fisher import (
    FisherCurriculum,
    FisherHistory,
    FisherTrace,
    empirical_fisher_trace,
    fisher_penalty,
    fisher_trace,
    low_fisher_first,
)
from pruning.diagnostics.path import LossPath, loss_path
from pruning.diagnostics.ranking import (
    RankingStability,
    kendall_tau,
    layer_kind,
    magnitudes,
    ranking_stability,
    spearman_rho,
)

__all__ = [
    "FisherCurriculum",
    "FisherHistory",
    "FisherTrace",
    "LossPath",
    "RankingStability",
    "Sensitivity",
    "SparsityCurve",
    "empirical_fisher_trace",
    "fisher_penalty",
    "fisher_trace",
    "kendall_tau",
    "layer_kind",
    "layer_sensitivity",
    "loss_path",
    "low_fisher_first",
    "magnitudes",
    "mean_loss",
    "ranking_stability",
    "sparsity_loss_curve",
    "spearman_rho",
]
