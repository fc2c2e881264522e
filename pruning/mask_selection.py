"""Scores of weights and a sparsity → masks."""

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from pruning.allocation.counts import Allocation, global_ranking, uniform
from pruning.masking import Masks
from pruning.sharding import gathered, sharded_as
from pruning.structure import Structure, Tiles, tile_sizes, unstructured
from pruning.weights import assembled, matrices

# (scores by parameter name, sparsity) → masks
Select = Callable[[Mapping[str, Tensor], float], Masks]


def ranked_globally(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """`select_masks` by one ranking over all matrices: how most methods before training choose."""
    return select_masks(scores, sparsity=sparsity, allocation=global_ranking)


def select_masks(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    allocation: Allocation = uniform,
    structure: Structure = unstructured,
    turned: Collection[str] = (),
) -> Masks:
    """Scores by parameter name → masks: `allocation` says how many weights each matrix loses, `structure` which.

    turned: names of matrices stored [in, out] (Conv1D; `pruning.weights.stored_turned`), whose masks lie so too.
    Stacks are taken matrix by matrix, each as [out, in] (`pruning.weights.matrices`). Under tiles (blocks, rows,
    columns) the allocation counts tiles, each with the sum of its weights' scores. Scores that are DTensors are
    compared whole on every rank of their mesh, and their masks are laid out as they are.
    Raises: ValueError if sparsity is outside [0, 1), a score is NaN, or tiles of unequal size meet an allocation that
    shares one number of removals among matrices."""
    parts = matrices(gathered(scores), turned)
    counts = weight_counts(parts, sparsity, allocation, structure)
    kept = {name: _chosen(name, structure, part, counts[name]) for name, part in parts.items()}
    return Masks({name: sharded_as(assembled(name, score, kept, turned), score) for name, score in scores.items()})


def weight_counts(
    parts: Mapping[str, Tensor], sparsity: float, allocation: Allocation, structure: Structure
) -> dict[str, int]:
    """How many weights each matrix [out, in] loses: what `allocation` says of its scores, of whole tiles if there are.

    Raises: ValueError naming a matrix that tiles do not fill, and for tiles of unequal size under any allocation but
    `uniform`."""
    if not isinstance(structure, Tiles):
        return allocation(parts, sparsity)
    sizes = tile_sizes(structure, parts)
    if allocation is not uniform and len(set(sizes.values())) > 1:
        raise ValueError(
            f"structure {structure} has tiles of {min(sizes.values())} to {max(sizes.values())} weights here, which no "
            f"single ranking compares: allocation must be 'uniform'"
        )
    counts = allocation({name: structure.pooled(part) for name, part in parts.items()}, sparsity)
    return {name: counts[name] * size for name, size in sizes.items()}


def _chosen(name: str, structure: Structure, scores: Tensor, count: int) -> Tensor:
    try:
        return structure(scores, count)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
