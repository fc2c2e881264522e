"""Weights pruned to an exact count: at once (`sparsify`), or while training (`Sparsifier`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.adapters import forget_file
from pruning.agreement import averaged, follow_first
from pruning.allocation import Allocation
from pruning.batches import Batch, Loss, Progress
from pruning.calibrated.prune import prune_calibrated
from pruning.criteria import (
    CALIBRATED,
    CRITERIA,
    METHODS,
    Scored,
    check_name,
    check_pair,
    default_allocation,
    make_allocation,
    needs,
    resolve_structure,
    score_weights,
)
from pruning.mask_selection import select_masks
from pruning.masking import Masks, check_kept, clear_gradients
from pruning.resuming import check_named, named
from pruning.saliency.data_free import magnitude
from pruning.schedules import Schedule
from pruning.sharding import as_wholes, sharded_as, spread_layouts
from pruning.structure import Structure, check_fraction, named_structure, unstructured
from pruning.weights import check_dense_gradients, check_unquantised, check_values, prunable_weights, stored_turned


def sparsify(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    method: str = "magnitude",
    allocation: str | Allocation | None = None,
    structure: str | None = None,
    rounds: int | None = None,
    order: str | None = None,
    calibration: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    weights: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
    progress: Progress = None,
) -> Masks:
    """Set a share `sparsity` of the model's weights to 0, in place, and return the masks.

    method, without data: "magnitude" abs(w); "lamp"; "synflow"; "random" (with `generator`). Over `calibration`, with
    `loss` (None: next-token loss): "gradient" abs(w·g), g the mean gradient; "taylor" mean of abs(w·g_b) over samples;
    "snip" abs(w·g) in rounds; "grasp" w·(Hg); "obd" w²·H_ii/2 with the Fisher diagonal (empirical with a loss);
    "woodfisher" w²/(2[H⁻¹]_ii), survivors updated. Over `calibration` alone: "correlation"; "wanda", "sparsegpt",
    "admm", "obs", "exact_obs" and "descent" as in `prune_calibrated`, which has their options: layer by layer on what
    the pruned layers before put out, all but wanda with new values for the survivors. Formulas: `pruning.saliency`.
    allocation: "uniform" takes ⌊sparsity·n⌋ of every matrix (each expert is one), "global" ⌊sparsity·N⌋ of all
    together in one ranking, "erk", "lamp"; "owl" and "sensitivity" look at `calibration`; "loss", of methods that go
    layer by layer, at the dense model's loss over it (`pruning.calibrated.fisher_factors`); or a function of
    `pruning.allocation`. For methods that go layer by layer "global", "lamp" and functions count by Wanda's scores in
    the dense model, from one pass before. None: that of the method's paper, "global" for snip, grasp, synflow and lamp,
    else "uniform".
    structure: None; "n:m", n of every m consecutive inputs stay, and sparsity is 1 − n/m; "block HxW", "row" or
    "column": whole ones go, ⌊sparsity · their number⌋ of them, each with the sum of its scores (not for "sparsegpt",
    "admm", "obs", "exact_obs" and "descent", which change weights while they choose).
    rounds: of "snip" (10) and "synflow" (100), exponential; 1 under "n:m". order: of the columns that "sparsegpt" goes
    through: None, as they lie, or "diag", by descending diagonal of the Hessian (not with "n:m").
    Counts are exact under ties, where the earlier position goes first. Weights that are 0 already go before all others,
    and the masks hold every one of them, by any method: where a matrix (or under "n:m" a group, under tiles a tile that
    stays) has more than it was to lose, the masks have those above the count, so that a model that was pruned before
    stays so. weights: parameter names; None is `prunable_weights`. Keep the masks through fine-tuning with
    `Masks.apply`.
    Raises: ValueError for unknown words, with the nearest; a sparsity outside [0, 1) or at odds with the structure; a
    method that needs calibration without it; two choices that do not go together; a model on the meta device; as the
    method itself."""
    check_name("method", method, METHODS)
    if sparsity is not None:
        check_fraction("sparsity", sparsity)
    check_unquantised(model)
    check_values(prunable_weights(model, weights))
    forget_file(model)
    chosen = default_allocation(method, allocation, structure)
    if method not in CALIBRATED:
        if order is not None:
            raise ValueError(f"method={method!r} has no order of columns: order must be None, got {order!r}")
        return _scored(model, sparsity, method, chosen, structure, rounds, calibration, loss, weights, generator,
                       progress)  # fmt: skip
    batches = _calibrated(method, chosen, rounds, calibration, loss)
    rule = _calibrated_allocation(chosen, model, prunable_weights(model, weights), batches, loss)
    return prune_calibrated(
        model, batches, method=method, sparsity=sparsity, structure=structure, allocation=rule,
        loss=loss if chosen == "loss" else None, order=order, weights=weights, progress=progress,
    ).masks  # fmt: skip


def _scored(
    model: nn.Module,
    sparsity: float | None,
    method: str,
    allocation: str | Allocation,
    structure: str | None,
    rounds: int | None,
    calibration: Iterable[Batch] | None,
    loss: Loss | None,
    weights: Sequence[str] | None,
    generator: torch.Generator | None,
    progress: Progress,
) -> Masks:
    """The masks of a method that gives every weight a score, put on the model."""
    share, select = resolve_structure(structure, sparsity)
    check_pair(method, allocation, structure, rounds, loss)
    chosen = prunable_weights(model, weights)
    held = None if calibration is None else needs("sparsify", calibration)
    rule = make_allocation(allocation, model, chosen, held, loss)
    found = score_weights(
        model, chosen, method=method, sparsity=share, allocation=rule, structure=select,
        rounds=1 if structure is not None and ":" in structure else rounds,
        calibration=held, loss=loss, generator=generator, progress=progress,
    )  # fmt: skip
    zeros = {name: chosen[name].detach() == 0 for name in found.scores}
    scores = {name: score.masked_fill(zeros[name], -torch.inf) for name, score in found.scores.items()}
    masks = select_masks(scores, sparsity=share, allocation=rule, structure=select, turned=stored_turned(model))
    masks = Masks({name: kept.masked_fill(zeros[name], False) for name, kept in masks.kept.items()})
    _finish(model, masks, found)
    return masks


def _finish(model: nn.Module, masks: Masks, found: Scored) -> None:
    if found.repair is not None:
        found.repair(masks)
    masks.apply(model)


def _calibrated(
    method: str,
    allocation: str | Allocation,
    rounds: int | None,
    calibration: Iterable[Batch] | None,
    loss: Loss | None,
) -> list[Batch]:
    """The batches of a method of `pruning.calibrated`. Raises: ValueError for what it does not go with."""
    batches = needs(f"method={method!r}", calibration)
    if loss is not None and allocation not in ("loss", "sensitivity"):
        raise ValueError(f"method={method!r} keeps each layer's outputs and takes no loss: loss must be None")
    if rounds is not None:
        raise ValueError(f"method={method!r} goes block by block: rounds must be None, got {rounds}")
    return batches


def _calibrated_allocation(
    allocation: str | Allocation,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    loss: Loss | None,
) -> str | Allocation:
    """What `prune_calibrated` takes: an allocation that looks at data does so when it is asked, after all checks."""
    if allocation == "loss":
        return allocation
    if allocation in ("owl", "sensitivity"):
        return lambda scores, share: make_allocation(allocation, model, weights, batches, loss)(scores, share)
    return make_allocation(allocation, model, weights, batches, loss)


class Sparsifier:
    """Prunes a model while it trains: saliency × allocation × structure × schedule, each a function.

    saliency(weight) → scores of its shape (`magnitude`; `taylor` reads weight.grad), or the name of a method of
    `sparsify` that scores weights ("wanda" too, on the model as it is and inside each row, by `dense_wanda_scores`),
    with its `calibration`, `loss` and `generator`; allocation (scores, sparsity) →
    count of each matrix; structure (scores, count) → mask; schedule(step) → sparsity. Allocation and structure may be
    names too, as in `sparsify` (None: the method's own, "uniform" for a function). Whenever the schedule rises the
    masks are chosen again; what was pruned stays pruned. Call `before_step`, then the optimiser, then `after_step`.

    >>> sparsifier = Sparsifier(model, schedule=cubic(0.8, begin=100, end=900, every=50))
    >>> if sparsifier.before_step(optimizer):
    ...     optimizer.step()
    ...     sparsifier.after_step(optimizer)

    Under DDP the scores of a saliency given by name are averaged over the ranks, each with its own calibration, and all
    take rank 0's masks; a function must give every rank the same. Under FSDP2 build it after `fully_shard`, and after
    `moe.shard_experts`: masks are chosen as one process would and sharded as the weights are. A saliency given by name
    needs all experts on every rank.
    averages: models that hold running averages of this one's weights, as `AveragedModel.module` does; what is pruned is
    0 in them too. A sparsity that the schedule asks at step 0 is applied at once.
    Raises: ValueError if the schedule leaves [0, 1), for unknown names, for choices that do not go together, and for
    tables whose gradients are the rows that were read; when it prunes, for a matrix of which nothing would be left (one
    ranking: pass allocation=guarded_ranking of `pruning.allocation`)."""

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        saliency: str | Callable[[Tensor], Tensor] = magnitude,
        allocation: str | Allocation | None = None,
        structure: str | Structure = unstructured,
        calibration: Iterable[Batch] | None = None,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
        weights: Sequence[str] | None = None,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.schedule, self.saliency = model, schedule, saliency
        self.averages = tuple(averages)
        self.loss, self.generator = loss, generator
        self.calibration = None if calibration is None else needs("Sparsifier", calibration)
        method, text = saliency if isinstance(saliency, str) else "magnitude", structure
        check_name("saliency", method, CRITERIA)
        name = text if isinstance(text, str) else None
        self.allocation = default_allocation(method, allocation, name)
        check_pair(method, self.allocation, name, None, loss)
        if CRITERIA[method].data:
            needs(f"saliency={method!r}", self.calibration)
        self.structure = named_structure(structure) if isinstance(structure, str) else structure
        if structure is unstructured:
            self.structure = CRITERIA[method].among
        # whether replicas would choose apart: each from its own calibration, or by its own generator
        self._apart = CRITERIA[method].data or method == "random" or self.calibration is not None
        self.step, self.sparsity = 0, 0.0
        check_unquantised(model)
        check_dense_gradients(model, prunable_weights(model, weights))
        layouts = spread_layouts(model)
        if layouts and isinstance(saliency, str):
            raise ValueError(f"saliency must be a function where ranks hold a part of the experts, got {saliency!r}")
        self._weights = cast(dict[str, nn.Parameter], as_wholes(prunable_weights(model, weights), layouts))
        check_values(self._weights)
        forget_file(model)
        self._masks = Masks({name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights.items()})
        self._advance()

    def before_step(self, optimizer: Optimizer) -> bool:
        """Clear the gradients of pruned weights, which would count where gradients are clipped. True: step."""
        clear_gradients(self.model, self._masks.kept if self.sparsity else {})
        return True

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step, prune further if the schedule says so, and set every pruned weight back to 0."""
        self.step += 1
        self._advance()
        if self.sparsity:
            for model in (self.model, *self.averages):
                self._masks.apply(model)

    def _advance(self) -> None:
        asked = self.schedule(self.step)
        if asked > self.sparsity:
            rule = make_allocation(self.allocation, self.model, self._weights, self.calibration, self.loss)
            found = self._score(asked, rule)
            scores = averaged(found.scores) if self._apart else found.scores
            scores = {name: score.masked_fill(~self._masks.kept[name], -torch.inf) for name, score in scores.items()}
            self._masks = select_masks(
                scores, sparsity=asked, allocation=rule, structure=self.structure, turned=stored_turned(self.model)
            )
            check_kept(self._masks.kept, asked)
            if self._apart:
                follow_first(self._masks.kept.values())
            _finish(self.model, self._masks, found)
            if self._apart and found.repair is not None:
                follow_first(self._weights.values())
            self.sparsity = asked

    def _score(self, sparsity: float, allocation: Allocation) -> Scored:
        if not isinstance(self.saliency, str):
            return Scored({name: self.saliency(weight) for name, weight in self._weights.items()})
        # the schedule makes the rounds
        rounds = 1 if CRITERIA[self.saliency].rounds else None
        return score_weights(
            self.model, self._weights, method=self.saliency, sparsity=sparsity, allocation=allocation,
            structure=self.structure, rounds=rounds, calibration=self.calibration, loss=self.loss,
            generator=self.generator, progress=None,
        )  # fmt: skip

    def masks(self) -> Masks:
        """The masks in force."""
        return self._masks

    def state_dict(self) -> dict[str, Any]:
        """name, step, sparsity and masks, for a checkpoint."""
        return named(self) | {"step": self.step, "sparsity": self.sparsity, "masks": self._masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; the masks are applied to the model at once.

        Raises: ValueError if it is another method's, or the masks are not those of this model's prunable weights."""
        check_named(state, self, unnamed=("step", "sparsity", "masks"))
        masks = Masks.from_state_dict({name: mask.to(self._weights[name].device) if name in self._weights else mask
                                       for name, mask in state["masks"].items()})  # fmt: skip
        if masks.kept.keys() != self._weights.keys():
            odd = sorted(masks.kept.keys() ^ self._weights.keys())
            raise ValueError(
                f"masks must be those of the model's {len(self._weights)} prunable weights, "
                f"got a difference in {odd[0]!r}"
            )
        for model in (self.model, *self.averages):
            masks.apply(model)
        kept = {name: sharded_as(mask, self._weights[name]) for name, mask in masks.kept.items()}
        self._masks, self.step, self.sparsity = Masks(kept), state["step"], state["sparsity"]
