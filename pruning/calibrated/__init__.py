"""Pruning that looks at calibration data: Wanda, SparseGPT, optimal brain surgeon, and least-squares refits."""

from pruning.calibrated.fisher import FisherFactors, fisher_factors, loss_counts
from pruning.calibrated.hessian import layer_hessian
from pruning.calibrated.journal import Finished, Journal
from pruning.calibrated.prune import CALIBRATED, prune_calibrated
from pruning.calibrated.reconstruct import (
    exact_obs,
    layerwise_obs,
    magnitude_mask,
    obs_scores,
    output_error,
    refit,
    sparsegpt,
    wanda_mask,
    wanda_scores,
)
from pruning.calibrated.report import CalibratedReport, MatrixReport

__all__ = [
    "CALIBRATED",
    "CalibratedReport",
    "Finished",
    "FisherFactors",
    "Journal",
    "MatrixReport",
    "exact_obs",
    "fisher_factors",
    "layer_hessian",
    "layerwise_obs",
    "loss_counts",
    "magnitude_mask",
    "obs_scores",
    "output_error",
    "prune_calibrated",
    "refit",
    "sparsegpt",
    "wanda_mask",
    "wanda_scores",
]
