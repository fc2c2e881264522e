"""One sparsity for the whole → how many weights each matrix loses."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pruning.structure import removal_count, unstructured

# (scores of each matrix, sparsity) → weights to remove from each matrix
Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """⌊sparsity · n⌋ of every matrix of n weights; scores do not matter.

    Raises: ValueError if sparsity is outside [0, 1)."""
    return {name: removal_count(sparsity, score.numel()) for name, score in scores.items()}


def global_ranking(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """One ranking over all matrices: the ⌊sparsity · N⌋ lowest of all N scores go, wherever they are.

    Of equal scores the earlier matrix and the earlier position go first. A matrix may end empty.
    Raises: ValueError if sparsity is outside [0, 1) or a score is NaN."""
    sizes = [score.numel() for score in scores.values()]
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    every = torch.cat([score.reshape(-1).to(dtype) for score in scores.values()])
    keep = unstructured(every, removal_count(sparsity, every.numel()))
    return {name: int((~part).sum()) for name, part in zip(scores, keep.split(sizes), strict=True)}
