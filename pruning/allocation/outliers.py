"""OWL: layers that hold more outliers stay denser."""

from collections.abc import Mapping

from torch import Tensor

from pruning.allocation.counts import Allocation, whole_counts
from pruning.structure import removal_count


def owl(shares: Mapping[str, float], *, spread: float = 0.08) -> Allocation:
    """Density 1 − S + 2λ · (D − min D)/(max D − min D) − the weighted mean of that term: within ±2λ of 1 − S.

    D: shares, from `pruning.saliency.outlier_shares`; λ = spread. Yin et al. 2024 (arXiv:2310.05175) and their code.
    The mean is weighted by the matrices' sizes, so that exactly ⌊S · N⌋ weights go. Equal shares give uniform density.
    Raises: ValueError if spread is outside [0, 0.5]; where it is used, for a matrix without a share."""
    if not 0 <= spread <= 0.5:
        raise ValueError(f"spread must be in [0, 0.5], got {spread}")

    def allocation(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        missing = [name for name in scores if name not in shares]
        if missing:
            raise ValueError(f"shares must name every matrix, got none for {missing[0]!r}")
        sizes = {name: score.numel() for name, score in scores.items()}
        total = removal_count(sparsity, sum(sizes.values()))
        low, high = min(shares[name] for name in scores), max(shares[name] for name in scores)
        raised = {name: 2 * spread * (shares[name] - low) / (high - low) if high > low else 0.0 for name in scores}
        mean = sum(raised[name] * sizes[name] for name in sizes) / max(sum(sizes.values()), 1)
        exact = {name: (sparsity - raised[name] + mean) * sizes[name] for name in sizes}
        return whole_counts(exact, total, sizes)

    return allocation
