"""The choices of one calibrated pruning, checked before anything changes, and what the loss says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pruning.allocation.counts import Allocation, erk, uniform
from pruning.batches import Batch, Loss
from pruning.calibrated.blocks import without_cache
from pruning.calibrated.dense import dense_scores, distinct_matrices
from pruning.calibrated.fisher import fisher_factors, loss_counts
from pruning.calibrated.reconstruct import check_order
from pruning.calibrated.selection import Groups
from pruning.calibrated.targets import Inputs
from pruning.mask_selection import weight_counts
from pruning.structure import Tiles, named_structure, parse_structure, removal_count, unstructured

ALLOCATIONS = ("uniform", "loss")
# their masks are chosen from scores that no update changes, so that whole tiles may go
BY_SCORE = ("magnitude", "wanda")
FROM_SHAPES: tuple[Allocation, ...] = (uniform, erk)
CALIBRATED = ("admm", "descent", "exact_obs", "magnitude", "obs", "sparsegpt", "wanda")


@dataclass(frozen=True)
class Plan:
    """The choices that hold for every matrix."""

    method: str
    sparsity: float
    groups: Groups
    refit: bool
    damping: float
    block: int
    dtype: torch.dtype
    counts: Mapping[str, int] | None = None
    rows: Mapping[str, Tensor] | None = None
    tiles: Tiles | None = None
    order: str | None = None

    def count(self, label: str, size: int) -> int:
        """How many of its ``size`` weights a matrix loses."""
        return removal_count(self.sparsity, size) if self.counts is None else self.counts[label]

    def row_weights(self, label: str) -> Tensor | None:
        """What an error in each of its outputs costs; None where all cost the same, or none is known."""
        return None if self.rows is None else self.rows.get(label)

    @property
    def norms_only(self) -> bool:
        """Whether squared norms of the inputs are all that the method needs."""
        return self.method in BY_SCORE and not self.refit


def make_plan(
    method: str,
    sparsity: float | None,
    structure: str | None,
    allocation: str | Allocation,
    loss: Loss | None,
    refit: bool,
    damping: float,
    block: int,
    dtype: torch.dtype,
    order: str | None = None,
) -> Plan:
    """Raises: ValueError for a choice that is unknown, out of bounds, or does not go with another."""
    if method not in CALIBRATED:
        raise ValueError(f"method must be one of {', '.join(CALIBRATED)}, got {method!r}")
    groups, tiles = _structured(method, structure)
    if isinstance(allocation, str) and allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)} or a function of pruning.allocation, "
                         f"got {allocation!r}; sparsify knows the others by name")  # fmt: skip
    if groups is None and method == "descent":
        raise ValueError("method='descent' solves groups of m inputs: structure must be 'n:m', got None")
    if groups is not None:
        _check_groups(method, structure, groups, allocation, block)
    if loss is not None and allocation != "loss":
        raise ValueError(f"method={method!r} keeps each layer's outputs: loss must be None unless allocation='loss'")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be in [0, inf), got {damping}")
    if block < 1:
        raise ValueError(f"block must be >= 1, got {block}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    check_order(order, groups)
    if order is not None and method != "sparsegpt":
        raise ValueError(f"method={method!r} has no order of columns: order must be None, got {order!r}")
    if allocation == "loss" and tiles is not None:
        raise ValueError(f"structure={structure!r} takes whole tiles, and allocation='loss' shares out single weights: "
                         "allocation must be 'uniform' or a function of pruning.allocation")  # fmt: skip
    return Plan(method, _share(sparsity, structure, groups), groups, refit, damping, block, dtype, tiles=tiles,
                order=order)  # fmt: skip


def _structured(method: str, structure: str | None) -> tuple[Groups, Tiles | None]:
    if structure is None:
        return None, None
    if ":" in structure:
        return parse_structure(structure), None
    tiles = named_structure(structure)
    if method not in BY_SCORE or not isinstance(tiles, Tiles):
        raise ValueError(f"method={method!r} chooses weights or n:m groups while it changes others: structure must be "
                         f"None or 'n:m', got {structure!r}")  # fmt: skip
    return None, tiles


def _check_groups(
    method: str, structure: str | None, groups: tuple[int, int], allocation: str | Allocation, block: int
) -> None:
    if not 0 < groups[0] < groups[1]:
        raise ValueError(f"structure n:m must satisfy 0 < n < m, got {structure}")
    if method == "exact_obs":
        raise ValueError(f"method='exact_obs' removes one weight at a time: structure must be None, got {structure!r}")
    if method in ("descent", "sparsegpt") and block % groups[1]:
        raise ValueError(f"block must be a multiple of m={groups[1]} in {structure}, got {block}")
    if allocation not in ("uniform", uniform):
        raise ValueError(f"structure={structure!r} fixes every matrix's sparsity: allocation must be 'uniform', "
                         f"got {allocation!r}")  # fmt: skip


def _share(sparsity: float | None, structure: str | None, groups: Groups) -> float:
    implied = None if groups is None else (groups[1] - groups[0]) / groups[1]
    if sparsity is None and implied is None:
        raise ValueError("sparsity must be in [0, 1), got None; only structure='n:m' implies one")
    if implied is not None and sparsity is not None and abs(sparsity - implied) > 1e-9:
        raise ValueError(f"structure={structure!r} means sparsity={implied:g}, got {sparsity}")
    share = cast(float, implied if sparsity is None else sparsity)
    removal_count(share, 1)
    return share


def check_shapes(inputs: Sequence[Inputs], plan: Plan) -> None:
    """Raises: ValueError for a matrix that the structure's groups or tiles do not divide."""
    for matrix in distinct_matrices(inputs):
        width = matrix.view(matrix.parameter).shape[1]
        if plan.groups is not None and width % plan.groups[1]:
            n, m = plan.groups
            raise ValueError(f"{matrix.label}: {n}:{m} needs its inputs divisible by {m}, got {width}")


def by_loss(
    plan: Plan, model: nn.Module, inputs: Sequence[Inputs], batches: Sequence[Batch], loss: Loss | None
) -> Plan:
    """Counts and costs of rows by the loss of the dense model."""
    with without_cache(model):
        factors = fisher_factors(model, inputs, batches, loss=loss)
    rows = {label: _positive(costs) for label, costs in factors.outputs.items()}
    return replace(plan, counts=loss_counts(factors, distinct_matrices(inputs), plan.sparsity), rows=rows)


def by_allocation(
    plan: Plan, model: nn.Module, inputs: Sequence[Inputs], batches: Sequence[Batch], allocation: Allocation
) -> Plan:
    """Counts by an allocation of the dense model: by shapes, by abs(w) for the method "magnitude", else by
    `dense_scores`, which takes one pass. Weights that are 0 have score −inf.

    Raises: ValueError as the allocation, and if it does not give every matrix a count of at most its weights."""
    weights = {one.label: one.view(one.parameter.detach()) for one in distinct_matrices(inputs)}
    data = allocation not in FROM_SHAPES and plan.method != "magnitude"
    scores = dense_scores(model, inputs, batches) if data else {label: w.abs() for label, w in weights.items()}
    scores = {label: score.masked_fill(weights[label] == 0, -torch.inf) for label, score in scores.items()}
    counts = weight_counts(scores, plan.sparsity, allocation, plan.tiles or unstructured)
    for label, weight in weights.items():
        if not 0 <= counts.get(label, -1) <= weight.numel():
            raise ValueError(f"allocation must give {label} a count in [0, {weight.numel()}], got {counts.get(label)}")
    return replace(plan, counts=counts)


def _positive(costs: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
    """With a hundredth of their mean added: an output that the calibration never needed is not free."""
    return costs + 0.01 * costs.mean() + torch.finfo(costs.dtype).tiny


def first_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches that together hold so many tokens (elements of their first tensor), all if they do not."""
    found: list[Batch] = []
    for batch in batches:
        if tokens <= 0 and found:
            break
        found.append(batch)
        values = [batch] if isinstance(batch, Tensor) else [v for v in batch.values() if isinstance(v, Tensor)]
        tokens -= values[0].numel() if values else 0
    return found
