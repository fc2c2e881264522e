"""Calibrated pruning of a whole model: block by block, each on what the pruned blocks before it put out."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.adapters import forget_file
from pruning.allocation.counts import Allocation, uniform
from pruning.batches import Batch, Loss, Progress, evaluating, model_batches, row_batches
from pruning.calibrated import reconstruct
from pruning.calibrated.admm import admm
from pruning.calibrated.blocks import Recorded, find_blocks, record_calls, run_model, without_cache
from pruning.calibrated.capture import Moments, recording
from pruning.calibrated.descent import group_descent
from pruning.calibrated.hessian import dead_inputs, layer_hessian, naming_layer
from pruning.calibrated.journal import Finished, Journal
from pruning.calibrated.plan import CALIBRATED, Plan, by_allocation, by_loss, check_shapes, first_batches, make_plan
from pruning.calibrated.reconstruct import Pruned, magnitude_mask, output_error, wanda_mask, wanda_scores
from pruning.calibrated.report import CalibratedReport, MatrixReport
from pruning.calibrated.targets import Inputs, Matrix, find_inputs
from pruning.masking import Masks
from pruning.structure import Tiles
from pruning.weights import check_unquantised, prunable_weights

__all__ = ["CALIBRATED", "prune_calibrated"]

_Done = tuple[MatrixReport, Matrix, Tensor]


@torch.no_grad()
def prune_calibrated(
    model: nn.Module,
    calibration: Iterable[Batch],
    *,
    method: str = "sparsegpt",
    sparsity: float | None = None,
    structure: str | None = None,
    allocation: str | Allocation = "uniform",
    loss: Loss | None = None,
    loss_tokens: int = 8192,
    refit: bool = False,
    damping: float = 0.01,
    block: int = 128,
    order: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Sequence[str] | None = None,
    progress: Progress = None,
    journal: Journal | None = None,
) -> CalibratedReport:
    """Zero ⌊sparsity · n⌋ weights of every matrix, in place, choosing by what the layers see on `calibration`.

    The masks hold all zeros that were there before, also where they outnumber that.

    method: "wanda", "sparsegpt", "admm", "obs" (`layerwise_obs`), "exact_obs" (small layers only), "magnitude" (for
    refit), or, of n:m groups alone, "descent" (SparseGPT's answer, then `group_descent`). structure: None; "n:m",
    which implies the sparsity; of "wanda" and "magnitude" also "block HxW", "row" or "column": the tiles of a matrix
    with the least sums of scores go (the other methods change weights while they choose).
    allocation: "uniform"; a function of `pruning.allocation`, which is asked once, before anything is pruned: of abs(w)
    for "magnitude", of the dense model's `wanda_scores` for all other methods, from one more pass over `calibration`
    (none for `uniform` and `erk`, which look at shapes): `owl(outlier_shares(...))` is OWL with Wanda or SparseGPT, as
    Yin et al. 2024 have it (arXiv:2310.05175); or "loss": one backward pass of the dense model over the first
    `loss_tokens` tokens (with `loss`, None: next-token loss) says what an error in each output of each matrix costs
    (`fisher_factors`); ⌊sparsity · N⌋ of all N weights go, shared out by `loss_counts`, and the rows of a matrix
    compete by their cost in all methods but "wanda" and "magnitude". refit: solve the survivors by least squares
    afterwards ("obs" always does). damping: share of the Hessian's mean diagonal that is added to it. block: columns of
    one SparseGPT block. order: of its columns, None or "diag" (`sparsegpt`). dtype: of the sums and the solvers,
    float32 or float64.
    weights: parameter names; None is `prunable_weights`. journal: keeps each finished block, and gives back those that
    an earlier run of the same arguments on the same dense model finished.

    Blocks are run one at a time, each on what those already pruned put out; what else holds weights comes last. Each
    expert is calibrated on the rows that the router gave it. `pruning.calibrated` says more.
    Raises: ValueError for bad options and empty calibration, before anything changes; for a layer whose inputs are
    not finite or whose Hessian cannot be factorised (it is named; those before it are pruned already), for a weight
    that its module never multiplied with, and for a journal of another model."""
    plan = make_plan(method, sparsity, structure, allocation, loss, refit, damping, block, dtype, order)
    check_unquantised(model)
    forget_file(model)
    chosen = prunable_weights(model, weights)
    inputs = find_inputs(model, chosen)
    check_shapes(inputs, plan)
    batches = list(model_batches(model, calibration))
    _check_tokens(batches)
    batches = list(row_batches(model, batches))
    if allocation == "loss":
        plan = by_loss(plan, model, inputs, first_batches(batches, loss_tokens), loss)
    elif not isinstance(allocation, str) or plan.tiles is not None:
        rule = uniform if isinstance(allocation, str) else allocation
        plan = by_allocation(plan, model, inputs, batches, rule)
    with evaluating(model), without_cache(model):
        reports, sequential = _prune_model(model, chosen, inputs, batches, plan, progress, journal)
    report = CalibratedReport(_masks(chosen, reports), tuple(one for one, _, _ in reports), sequential)
    if report.unseen:
        warnings.warn(f"no calibration row reached {', '.join(report.unseen)}: pruned by magnitude", stacklevel=3)
    return report


def _prune_model(
    model: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    inputs: Sequence[Inputs],
    batches: Sequence[Batch],
    plan: Plan,
    progress: Progress,
    journal: Journal | None,
) -> tuple[list[_Done], bool]:
    """Every matrix, and whether each block saw what the pruned blocks before it put out."""
    name, blocks = find_blocks(model, chosen)
    recorded = record_calls(model, blocks, batches)
    if blocks and not recorded.chained:
        warnings.warn(f"the modules of {name!r} do not feed one another once each: every layer is calibrated on "
                      f"the inputs that it has in the dense model", stacklevel=4)  # fmt: skip
        blocks = []
    *owned, rest = _by_block(inputs, blocks)
    reports = _prune_blocks(blocks, owned, recorded, batches, plan, progress, journal)
    if rest:
        runs = [partial(run_model, model, batch) for batch in batches]
        reports += _journaled(len(blocks), rest, runs, batches, plan, journal)
    return reports, bool(blocks)


def _check_tokens(batches: Sequence[Batch]) -> None:
    for index, batch in enumerate(batches):
        ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
        mask = _real_tokens(batch)
        if ids is not None and (not ids.numel() or (mask is not None and not mask.any())):
            raise ValueError(f"calibration batches must hold tokens, got none in batch {index} of {list(ids.shape)}")


def _by_block(inputs: Sequence[Inputs], blocks: Sequence[nn.Module]) -> list[list[Inputs]]:
    """The inputs of each block, and last those that belong to none or share a weight with another's."""
    places: dict[int, set[int]] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            places.setdefault(id(module), set()).add(index)
    users: dict[str, set[int]] = {}
    for use in inputs:
        for name in _names(use):
            users.setdefault(name, set()).update(places.get(id(use.module), {len(blocks)}))
    owned: list[list[Inputs]] = [[] for _ in range(len(blocks) + 1)]
    for use in inputs:
        homes = set.union(*(users[name] for name in _names(use)))
        owned[homes.pop() if len(homes) == 1 else len(blocks)].append(use)
    return owned


def _names(use: Inputs) -> set[str]:
    return {matrix.name for part in use.weights.values() for matrix in part}


def _prune_blocks(
    blocks: Sequence[nn.Module],
    owned: Sequence[Sequence[Inputs]],
    recorded: Recorded,
    batches: Sequence[Batch],
    plan: Plan,
    progress: Progress,
    journal: Journal | None,
) -> list[_Done]:
    """Block after block: see its inputs, prune it, and put out what the next one gets."""
    done: list[_Done] = []
    states, numbered = recorded.states, list(enumerate(blocks))
    for index, block in progress(numbered) if progress else numbered:
        calls = recorded.calls[index]
        runs = [partial(call.run, block, hidden) for call, hidden in zip(calls, states, strict=True)]
        done += _journaled(index, owned[index], runs, batches, plan, journal)
        if index + 1 < len(blocks):
            del runs
            for at, call in enumerate(calls):
                states[at] = call.run(block, states[at])
        calls.clear()
    return done


def _journaled(
    index: int,
    inputs: Sequence[Inputs],
    runs: Sequence[Callable[[], Any]],
    batches: Sequence[Batch],
    plan: Plan,
    journal: Journal | None,
) -> list[_Done]:
    """What `_prune_stage` does; what the journal has is put in place instead."""
    if journal is None:
        return _prune_stage(inputs, runs, batches, plan)
    found = journal.read(index)
    if found is not None:
        return _restored(index, inputs, found)
    done = _prune_stage(inputs, runs, batches, plan)
    journal.write(index, [Finished(one, matrix.view(matrix.parameter.detach()), kept) for one, matrix, kept in done])
    return done


def _restored(index: int, inputs: Sequence[Inputs], found: Sequence[Finished]) -> list[_Done]:
    matrices = {one.label: one for use in inputs for part in use.weights.values() for one in part}
    names = [one.report.name for one in found]
    if sorted(names) != sorted(matrices):
        raise ValueError(f"the journal of block {index} must hold {sorted(matrices)}, got {sorted(names)}")
    for one in found:
        matrix = matrices[one.report.name]
        matrix.view(matrix.parameter.detach()).copy_(one.weight)
    return [(one.report, matrices[one.report.name], one.kept) for one in found]


def _prune_stage(
    inputs: Sequence[Inputs], runs: Sequence[Callable[[], Any]], batches: Sequence[Batch], plan: Plan
) -> list[_Done]:
    """Run, one batch after the other, what calls these modules; then prune their weights."""
    moments = Moments(diagonal=plan.norms_only, dtype=plan.dtype)
    with recording(inputs, moments):
        for run, batch in zip(runs, batches, strict=True):
            moments.real = _real_tokens(batch)
            run()
    matrices = {one.label: one for use in inputs for part in use.weights.values() for one in part}
    seen = {matrices[label].name for label in moments.rows}
    for matrix in matrices.values():
        if matrix.name not in seen:
            raise ValueError(f"calibration must reach {matrix.name}, got no row of input: leave it out by weights=")
    devices = {matrix.parameter.device.type for matrix in matrices.values()}
    with ExitStack() as stack:
        # autocast is for the forward passes: solvers in half precision would undo what the sums are kept in
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        return [_prune_matrix(matrix, moments, plan) for matrix in matrices.values()]


def _real_tokens(batch: Batch) -> Bool[Tensor, "B L"] | None:
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _prune_matrix(matrix: Matrix, moments: Moments, plan: Plan) -> _Done:
    stored = matrix.view(matrix.parameter.detach())
    rows, weight = moments.rows.get(matrix.label, 0), stored.to(plan.dtype)
    count, sums = plan.count(matrix.label, weight.numel()), moments.sums.pop(matrix.label, None)
    try:
        with naming_layer(matrix.label) as raised:
            new, kept, dead, error = _pruned(weight, sums, rows, count, plan, plan.row_weights(matrix.label))
    except ValueError as problem:
        raise ValueError(f"{matrix.label}: {problem}") from problem
    # where nothing changed the stored bits stay, whatever the dtype
    stored.copy_(torch.where(new == weight, stored, new.to(stored.dtype)).masked_fill(~kept, 0))
    report = MatrixReport(
        matrix.label, int((~kept).sum()), kept.numel(), rows, dead, error, max(raised, default=None)
    )  # fmt: skip
    return report, matrix, kept


def _pruned(
    weight: Float[Tensor, "out in"], sums: Tensor | None, rows: int, count: int, plan: Plan, costs: Tensor | None
) -> tuple[Tensor, Tensor, int, float | None]:
    """New weight, what is kept, the number of dead inputs and the output error."""
    if sums is None:
        return weight, _magnitude(weight, count, plan), 0, None
    if plan.norms_only:
        kept = _mask(weight, sums, count, plan)
        return weight, kept, int((sums == 0).sum()), None
    hessian = layer_hessian(sums, rows)
    new, kept = _reconstructed(weight, hessian, count, plan, costs)
    return new, kept, int(dead_inputs(hessian).sum()), output_error(weight, new, hessian)


def _mask(weight: Tensor, squares: Tensor, count: int, plan: Plan) -> Tensor:
    if plan.method != "wanda":
        return _magnitude(weight, count, plan)
    if plan.tiles is not None:
        return _tiled(plan.tiles, wanda_scores(weight, squares), weight, count)
    return wanda_mask(weight, squares, count, groups=plan.groups)


def _magnitude(weight: Tensor, count: int, plan: Plan) -> Tensor:
    if plan.tiles is not None:
        return _tiled(plan.tiles, weight.abs(), weight, count)
    return magnitude_mask(weight, count, groups=plan.groups)


def _tiled(tiles: Tiles, scores: Tensor, weight: Tensor, count: int) -> Tensor:
    zero = weight == 0
    return tiles(scores.masked_fill(zero, -torch.inf), count) & ~zero


def _reconstructed(weight: Tensor, hessian: Tensor, count: int, plan: Plan, costs: Tensor | None) -> Pruned:
    costs = None if costs is None else costs.to(weight.dtype)
    if plan.method == "obs":
        return reconstruct.layerwise_obs(weight, hessian, count, groups=plan.groups, damping=plan.damping, costs=costs)
    if plan.method == "admm":
        new, kept = admm(weight, hessian, count, groups=plan.groups, damping=plan.damping, costs=costs)
    elif plan.method == "exact_obs":
        new, kept = reconstruct.exact_obs(weight, hessian, count, damping=plan.damping, costs=costs)
    elif plan.method in ("descent", "sparsegpt"):
        new, kept = reconstruct.sparsegpt(
            weight, hessian, count, groups=plan.groups, block=plan.block, damping=plan.damping, costs=costs,
            order=plan.order,
        )  # fmt: skip
        if plan.method == "descent" and plan.groups is not None:
            new, kept = group_descent(weight, new, hessian, plan.groups, damping=plan.damping)
    else:
        new, kept = weight, _mask(weight, hessian.diagonal(), count, plan)
    return (reconstruct.refit(weight, kept, hessian, damping=plan.damping) if plan.refit else new), kept


def _masks(weights: Mapping[str, nn.Parameter], done: Sequence[_Done]) -> Masks:
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for _, matrix, kept in done:
        matrix.view(masks[matrix.name]).copy_(kept)
    return Masks(masks)
