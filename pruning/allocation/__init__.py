"""One sparsity for the whole → how many weights each matrix loses."""

from pruning.allocation.counts import Allocation, erk, global_ranking, lamp_of_magnitudes, lamp_ranking, uniform
from pruning.allocation.guards import fixed_counts, guarded_ranking, keep_dense, min_density
from pruning.allocation.outliers import owl
from pruning.allocation.search import Evolved, evolve, least_error
from pruning.allocation.sensitivity import equal_loss, loss_curves

__all__ = [
    "Allocation",
    "Evolved",
    "equal_loss",
    "erk",
    "evolve",
    "fixed_counts",
    "global_ranking",
    "guarded_ranking",
    "keep_dense",
    "lamp_of_magnitudes",
    "lamp_ranking",
    "least_error",
    "loss_curves",
    "min_density",
    "owl",
    "uniform",
]
