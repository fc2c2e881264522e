"""Experts that do the same become one: weights averaged by use, the router told."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Progress, evaluating, model_batches
from pruning.calibrated.targets import hidden_rows, routed_rows
from pruning.merge import MergeReport
from pruning.model_axes import axes_of
from pruning.structure import removal_count
from pruning.surgery import count_parameters, shrink

ROUTERS = ("kept", "mean", "logsumexp")
SAMPLE = 512
# what a stack of experts has: ours, and those of transformers
STACKS = ("hidden_one", "gate_up_proj")


@dataclass
class Use:
    """What calibration saw of one layer: how often each expert was chosen, and some of the rows that were routed."""

    counts: Float[Tensor, "E"]
    rows: list[Tensor] = field(default_factory=list)
    held: int = 0


def merge_experts(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    fraction: float,
    router: Literal["kept", "mean", "logsumexp"] = "kept",
    align: bool = True,
    axes: Sequence[Axis] | None = None,
    progress: Progress = None,
) -> MergeReport:
    """Merge ⌊fraction · experts⌋ experts of each mixture layer into others, in place; the model gets smaller.

    Pairs merge in the order of the least n_i n_j / (n_i + n_j) · mean ‖f_i(x) − f_j(x)‖², n how often an expert was
    chosen and x up to 512 of the rows that calibration routed, a merged group standing there with the mean of its
    outputs (clustering by outputs: Chen et al. 2024, arXiv:2410.08589; it is Ward's criterion). A group's weights are
    the average by frequency (Li et al. 2023, arXiv:2310.01334), where align first brings the hidden neurons of each
    into the order of the most frequent one's, greedily the most similar first. Its row of the router is: "kept" that of
    the most frequent; "mean" the average by frequency; "logsumexp" the row whose logits fit log Σ exp of the group's
    best on the calibration rows (ridge towards "kept"). At least k experts stay; under group-limited routing every
    group of the router loses equally many. Duplicates with the same rows merge exactly at k = 1.

    >>> print(merge_experts(model, batches, fraction=0.25))
    Raises: ValueError for a fraction outside [0, 1), another router, a layer that calibration does not reach, and
    experts that are not stacked."""
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
    chosen = axes_of(model, "expert", axes)
    counts = {axis.name: _count(axis, fraction) for axis in chosen}
    used = _watch(model, chosen, batches, progress)
    before, errors, groups = count_parameters(model)[0], {}, {}
    with torch.no_grad():
        for axis in chosen:
            module, use = _experts(model, axis), used[axis.name]
            outputs = _outputs(module, axis, use)
            groups[axis.name], errors[axis.name] = cluster(outputs, use.counts, counts[axis.name], axis.groups)
            for group in groups[axis.name]:
                _merge(model, axis, group, use, router=router, align=align)
    shrink(model, chosen, {name: sorted(group[0] for group in found) for name, found in groups.items()})
    pairs = {name: [(unit, group[0]) for group in found for unit in group[1:]] for name, found in groups.items()}
    return MergeReport(
        kind="expert",
        gone={name: tuple(gone for gone, _ in made) for name, made in pairs.items()},
        into={name: tuple(kept for _, kept in made) for name, made in pairs.items()},
        errors=errors,
        parameters_before=before,
        parameters_after=count_parameters(model)[0],
    )


def cluster(
    outputs: Float[Tensor, "E n D"], counts: Float[Tensor, "E"], merges: int, parts: int = 1
) -> tuple[list[list[int]], float]:
    """Groups of experts after `merges` mergings in each of `parts` equal parts, the most frequent first in its group,
    and the sum of the costs."""
    size, error, found = len(outputs) // parts, 0.0, []
    for part in range(parts):
        groups = [[unit] for unit in range(part * size, (part + 1) * size)]
        for _ in range(merges):
            cost, first, second = _cheapest(groups, outputs, counts)
            groups[first] += groups.pop(second)
            error += cost
        found += [sorted(group, key=lambda unit: (-float(counts[unit]), unit)) for group in groups]
    return found, error


def _cheapest(groups: Sequence[Sequence[int]], outputs: Tensor, counts: Tensor) -> tuple[float, int, int]:
    means = torch.stack([_mean(outputs[group], counts[group]) for group in groups]).flatten(1)
    sizes = torch.stack([counts[group].sum() for group in groups])
    both = sizes[:, None] + sizes[None, :]
    share = torch.where(both > 0, sizes[:, None] * sizes[None, :] / both.clamp_min(1), 0.0)
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square() / outputs.shape[1]
    # of equal costs, as where an expert was never chosen, the nearest pair
    cost = share * distance
    upper = torch.ones_like(cost, dtype=torch.bool).triu(1)
    least = cost[upper].min()
    place = int(torch.where(upper & (cost == least), distance, torch.inf).argmin())
    return float(least), place // len(groups), place % len(groups)


def _mean(values: Float[Tensor, "m *rest"], counts: Float[Tensor, "m"]) -> Float[Tensor, "*rest"]:
    weights = counts / counts.sum() if counts.sum() > 0 else torch.full_like(counts, 1 / len(counts))
    return torch.tensordot(weights.to(values), values, dims=1)


def _count(axis: Axis, fraction: float) -> int:
    """Mergings in each group of the router."""
    asked = removal_count(fraction, axis.size) // axis.groups
    return min(asked, (axis.size - max(axis.least, axis.groups)) // axis.groups)


def _experts(model: nn.Module, axis: Axis) -> Any:
    """The module that holds the stacked matrices."""
    return model.get_submodule(_stack_name(model, axis))


def _stack_name(model: nn.Module, axis: Axis) -> str:
    owners = [piece.parameter.rpartition(".")[0] for piece in axis.slices]
    stacks = [name for name in owners if any(hasattr(model.get_submodule(name), mark) for mark in STACKS)]
    if not stacks:
        raise ValueError(f"experts of {axis.name!r} must be stacked (moe.Experts, or gate_up_proj and down_proj)")
    return stacks[0]


def _watch(model: nn.Module, axes: Sequence[Axis], batches: Iterable[Batch], progress: Progress) -> dict[str, Use]:
    used = {axis.name: Use(torch.zeros(axis.size, dtype=torch.float64)) for axis in axes}
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for axis in axes:
            hook = partial(_see, used[axis.name])
            hooks.callback(_experts(model, axis).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for batch in model_batches(model, batches, progress=progress):
            model(batch) if isinstance(batch, Tensor) else model(**batch)
    for axis in axes:
        if not used[axis.name].counts.any():
            raise ValueError(f"{axis.gate} routed no token in the calibration batches: give batches that reach it")
    return used


def _see(use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rows = routed_rows(module, (*args, *kwargs.values()))
    use.counts += torch.tensor([len(part) for part in rows], dtype=torch.float64)
    every, room = torch.cat(rows), SAMPLE - use.held
    if room > 0 and len(every):
        # spread over the batch, and half the room at most, so that later batches have a say
        wanted = min(len(every), max(room // 2, 1))
        taken = every[torch.linspace(0, len(every) - 1, wanted).long()]
        use.rows.append(taken)
        use.held += len(taken)


def _outputs(module: Any, axis: Axis, use: Use) -> Float[Tensor, "E n D"]:
    rows = torch.cat(use.rows)
    return torch.stack([_output(module, e, rows) for e in range(axis.size)]).double().cpu()


def _output(module: Any, expert: int, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    if hasattr(module, "forward_one"):
        return module.forward_one(expert, rows)
    return hidden_rows(module, expert, rows) @ module.down_proj[expert].mT


def _down(module: Any) -> Tensor:
    return module.down if hasattr(module, "hidden_one") else module.down_proj


def _merge(model: nn.Module, axis: Axis, group: Sequence[int], use: Use, *, router: str, align: bool) -> None:
    """The group's weights, averaged, into the place of its first."""
    if len(group) == 1:
        return
    stack, counts = _stack_name(model, axis), use.counts[list(group)]
    module = model.get_submodule(stack)
    if align:
        for unit in group[1:]:
            _reorder(module, unit, _matching(_neurons(module, group[0]), _neurons(module, unit)))
    for piece in axis.slices:
        tensor = model.get_parameter(piece.parameter).data
        if piece.parameter.rpartition(".")[0] == stack or (router == "mean" and piece.parameter.endswith("weight")):
            tensor[group[0]] = _mean(tensor[list(group)].double(), counts.to(tensor.device)).to(tensor)
        elif router == "logsumexp" and piece.parameter.endswith("weight"):
            tensor[group[0]] = _fitted(tensor[list(group)].double().cpu(), torch.cat(use.rows)).to(tensor)


def _fitted(weight: Float[Tensor, "m D"], rows: Float[Tensor, "n D"]) -> Float[Tensor, "D"]:
    """argmin_r Σ_x (r·x − log Σ_i exp w_i·x)² + λ‖r − w_0‖², λ a thousandth of the mean square of an input."""
    x = rows.double().cpu()
    gram = x.mT @ x
    gram += gram.diagonal().mean() * 1e-3 * torch.eye(len(gram), dtype=gram.dtype)
    missing = (x @ weight.mT).logsumexp(1) - x @ weight[0]
    return weight[0] + torch.linalg.solve(gram, x.mT @ missing)


def _parts(module: Any, unit: int) -> list[Tensor]:
    """The expert's matrices [F, ·] with its hidden neurons first: gate, value, outgoing and biases, sharing memory."""
    down = _down(module).data[unit].mT
    up = module.up.data[unit].mT if hasattr(module, "hidden_one") else module.gate_up_proj.data[unit]
    bias = getattr(module, "up_bias", None)
    return [*up.split(len(down)), down, *(() if bias is None else bias.data[unit, :, None].split(len(down)))]


def _neurons(module: Any, unit: int) -> Float[Tensor, "F W"]:
    return torch.cat([part.double() for part in _parts(module, unit)], dim=1)


def _reorder(module: Any, unit: int, order: Int[Tensor, "F"]) -> None:
    for part in _parts(module, unit):
        part.copy_(part[order])


def _matching(wanted: Float[Tensor, "F W"], given: Float[Tensor, "F W"]) -> Int[Tensor, "F"]:
    """For each wanted neuron the given one that takes its place: the nearest pair first, then the nearest left."""
    distance = torch.cdist(wanted, given, compute_mode="donot_use_mm_for_euclid_dist")
    order = torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
    for _ in range(len(wanted)):
        place = int(distance.argmin())
        row, column = place // len(wanted), place % len(wanted)
        order[row] = column
        distance[row, :] = distance[:, column] = torch.inf
    return order
