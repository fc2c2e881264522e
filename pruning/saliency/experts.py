"""How much a mixture's experts do: scores of whole experts from the routing of calibration batches."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Progress, batch_size, evaluating, model_batches
from pruning.model_axes import axes_of
from pruning.saliency.record import AxisScores, Normalize, record

METHODS = ("frequency", "gate_norm")


def expert_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    method: Literal["frequency", "gate_norm"] = "gate_norm",
    normalize: Normalize = None,
    axes: Sequence[Axis] | None = None,
    progress: Progress = None,
) -> AxisScores:
    """Scores of the experts of every mixture layer, larger = more important.

    "gate_norm": mean of g_e(x) · ‖f_e(x)‖₂ over the tokens x that chose e, what the expert adds to the output (REAP,
    Lasby et al. 2025, arXiv:2510.13999); 0 for an expert that no token chose. "frequency": share of all assignments.
    batches: token ids or keyword dicts, run in evaluation mode. The layer is the axis' ``gate`` module: either it
    returns (y, routing) and holds ``experts.forward_one``, or it is called, as in transformers, with rows [T, D], their
    experts [T, K] and the weights [T, K].
    Raises: ValueError for another method, without batches, or if a layer does not run.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    chosen = axes_of(model, "expert", axes)
    sums = {axis.name: torch.zeros(2, axis.size, dtype=torch.float64) for axis in chosen}
    samples = 0
    with evaluating(model), torch.no_grad(), ExitStack() as hooks:
        for axis in chosen:
            hook = _counter(axis, sums[axis.name], norms=method == "gate_norm")
            hooks.callback(axis.gate_module(model).register_forward_hook(hook).remove)
        for batch in model_batches(model, batches, progress=progress):
            model(batch) if isinstance(batch, Tensor) else model(**batch)
            samples += batch_size(batch)
    for axis in chosen:
        if not sums[axis.name][0].any():
            raise ValueError(f"{axis.gate} routed no token in the calibration batches: give batches that reach it")
    values = {name: _score(count, total, method) for name, (count, total) in sums.items()}
    return record(chosen, values, method=f"expert {method}", samples=samples, normalize=normalize)


def _counter(axis: Axis, sums: Tensor, *, norms: bool) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """Adds the choices of each expert to sums[0], and what it contributed to sums[1]."""

    def hook(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        rows = arguments[0].flatten(0, -2)
        expert, token, weight = _assignments(arguments, output)
        sums[0] += torch.bincount(expert, minlength=axis.size).cpu()
        for one in expert.unique().tolist() if norms else []:
            taken = expert == one
            answers = _answers(layer, one, rows[token[taken]])
            sums[1, one] += (answers.double().norm(dim=-1) * weight[taken].double()).sum().cpu()

    return hook


def _assignments(arguments: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(expert, token, weight) of every assignment, [N] each."""
    if len(arguments) == 3:
        chosen, weights = arguments[1:]
        tokens = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)
        return chosen.flatten(), tokens.flatten(), weights.flatten()
    return output[1].expert, output[1].token, output[1].weight


def _answers(layer: Any, expert: int, rows: Tensor) -> Tensor:
    """f_e(rows) [n, D], unweighted."""
    if hasattr(layer, "experts"):
        return layer.experts.forward_one(expert, rows)
    # forward, not a call: the hooks of the layer are running
    return layer.forward(rows, rows.new_full((len(rows), 1), expert, dtype=torch.long), rows.new_ones(len(rows), 1))


def _score(count: Tensor, total: Tensor, method: str) -> Tensor:
    return count / count.sum() if method == "frequency" else total / count.clamp_min(1)
