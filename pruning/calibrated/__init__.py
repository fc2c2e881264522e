"""Pruning that looks at calibration data: Wanda, SparseGPT, ADMM, optimal brain surgeon, and least-squares refits.

The blocks of a model are the nn.ModuleList with most of its weights. They are run one at a time, on the outputs of
those already pruned. Other weights, and those shared between blocks, come last, in a pass of the whole model; if the
blocks do not feed one another, all do, and a warning says so. Each expert is calibrated on the rows that the router
gave it; one that got none is pruned by magnitude, which a warning and the report say. Padding does not count.
"""

from pruning.calibrated.admm import admm
from pruning.calibrated.descent import group_descent
from pruning.calibrated.fisher import FisherFactors, fisher_factors, loss_counts
from pruning.calibrated.hessian import DampingRaised, layer_hessian
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
    "DampingRaised",
    "Finished",
    "FisherFactors",
    "Journal",
    "MatrixReport",
    "admm",
    "exact_obs",
    "fisher_factors",
    "group_descent",
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
