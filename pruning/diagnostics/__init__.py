"""What sparsity costs: measurements, each a frozen record with a figure."""

from pruning.diagnostics.accounting import (
    Densities,
    RunCost,
    dense_run,
    feedback_run,
    gradual_run,
    momentum_run,
    rigl_run,
    run_cost,
    static_run,
    top_kast_run,
)
from pruning.diagnostics.curve import Sensitivity, SparsityCurve, layer_sensitivity, mean_loss, sparsity_loss_curve
from pruning.diagnostics.degrees import DegreeDistribution, PowerLaw, degree_distribution, fit_power_law
from pruning.diagnostics.fisher import (
    FisherCurriculum,
    FisherHistory,
    FisherTrace,
    empirical_fisher_trace,
    fisher_penalty,
    fisher_trace,
    low_fisher_first,
)
from pruning.diagnostics.generalisation import (
    DataCurve,
    Memorisation,
    TransferCurve,
    data_hunger,
    memorisation,
    random_labels,
    transfer_curve,
)
from pruning.diagnostics.kernel import TangentKernel, last_logits, tangent_kernel
from pruning.diagnostics.path import LossPath, loss_path
from pruning.diagnostics.ranking import (
    RankingStability,
    kendall_tau,
    layer_kind,
    magnitudes,
    ranking_stability,
    spearman_rho,
)
from pruning.diagnostics.robustness import Robustness, adversarial_robustness

__all__ = [
    "DataCurve",
    "DegreeDistribution",
    "Densities",
    "FisherCurriculum",
    "FisherHistory",
    "FisherTrace",
    "LossPath",
    "Memorisation",
    "PowerLaw",
    "RankingStability",
    "Robustness",
    "RunCost",
    "Sensitivity",
    "SparsityCurve",
    "TangentKernel",
    "TransferCurve",
    "adversarial_robustness",
    "data_hunger",
    "degree_distribution",
    "dense_run",
    "empirical_fisher_trace",
    "feedback_run",
    "fisher_penalty",
    "fisher_trace",
    "fit_power_law",
    "gradual_run",
    "kendall_tau",
    "last_logits",
    "layer_kind",
    "layer_sensitivity",
    "loss_path",
    "low_fisher_first",
    "magnitudes",
    "mean_loss",
    "memorisation",
    "momentum_run",
    "random_labels",
    "ranking_stability",
    "rigl_run",
    "run_cost",
    "sparsity_loss_curve",
    "spearman_rho",
    "static_run",
    "tangent_kernel",
    "top_kast_run",
    "transfer_curve",
]
