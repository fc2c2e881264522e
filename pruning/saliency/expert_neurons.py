"""How much the neurons inside a mixture's experts do."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.axes import Axis
from pruning.batches import Batch, Progress, batch_size, evaluating, row_batches
from pruning.calibrated.blocks import run_model
from pruning.calibrated.targets import hidden_rows
from pruning.model_axes import axes_of
from pruning.saliency.products import replaced_method
from pruning.saliency.record import AxisScores, Normalize, record


def expert_neuron_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    normalize: Normalize = None,
    axes: Sequence[Axis] | None = None,
    progress: Progress = None,
) -> AxisScores:
    """What each neuron inside each expert adds to its layer's output, mean over tokens; larger = more important.

    s_ef = Σ_t g_e(x_t) · abs(h_ef(x_t)) · ‖down_e[:, f]‖₂ / T over the tokens t that chose e, of the T that calibration
    has: the rule by which `expert_importance` ranks experts (REAP, Lasby et al. 2025, arXiv:2510.13999), a neuron at a
    time, and not divided by how often the expert is chosen, so that layers compare. 0 for the neurons of an expert that
    no token chose. A shared expert has gate 1 and every token. [E·F] for each axis, float64.
    batches: token ids or keyword dicts, run in evaluation mode; padding under ``attention_mask`` does not count.
    Raises: ValueError without batches, for axes that are not of stacked experts, and if a layer does not run."""
    chosen = axes_of(model, "expert_neuron", axes)
    seen = {axis.name: _Seen(model, axis) for axis in chosen}
    samples = 0
    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for one in seen.values():
            stack.enter_context(one.watching())
        for batch in row_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            for one in seen.values():
                one.real = None if mask is None else mask.bool().flatten()
            run_model(model, batch)
            samples += batch_size(batch)
    values = {name: one.mean() for name, one in seen.items()}
    return record(chosen, values, method="expert neuron contribution", samples=samples, normalize=normalize)


class _Seen:
    """Σ over tokens of g · abs(h) [E, F] of one axis, on the CPU, float64."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        if not axis.stacked:
            raise ValueError(f"axis {axis.name!r} must be of stacked experts, got kind {axis.kind!r}")
        self.axis, self.module = axis, cast(Any, axis.gate_module(model))
        self.columns = model.get_parameter(axis.slices[-1].parameter)
        self.total = torch.zeros(axis.groups, axis.group_size, dtype=torch.float64)
        self.tokens = 0
        self.real: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the context every pass counts. A shared expert is called past the hooks of nn.Module."""
        with ExitStack() as stack:
            stack.callback(self.module.register_forward_pre_hook(self._routed, with_kwargs=True).remove)
            if hasattr(self.module, "forward_one"):
                shared = self._shared(cast(Callable[[int, Tensor], Tensor], self.module.forward_one))
                stack.enter_context(replaced_method(self.module, "forward_one", shared))
            yield

    def mean(self) -> Float[Tensor, "units"]:
        """The scores. Raises: ValueError if no token came by."""
        if not self.tokens:
            raise ValueError(f"{self.axis.gate} saw no token of the calibration batches: give batches that reach it")
        columns = self.columns.detach().movedim(self.axis.slices[-1].dim, 1).flatten(2).double().norm(dim=-1).cpu()
        return (self.total * columns / self.tokens).flatten()

    def _routed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        real = self._of_rows(given[0])
        self.tokens += int(real.sum())
        token, expert, weight = _assignments(given)
        for one in range(self.axis.groups):
            mine = (expert == one) & real[token]
            self._add(one, given[0][token[mine]], weight[mine])

    def _shared(self, original: Callable[[int, Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
        def forward_one(expert: int, rows: Tensor) -> Tensor:
            real = self._of_rows(rows)
            self.tokens += int(real.sum())
            self._add(expert, rows[real], torch.ones(int(real.sum()), device=rows.device))
            return original(expert, rows)

        return forward_one

    def _of_rows(self, rows: Tensor) -> Bool[Tensor, "T"]:
        if self.real is not None and len(self.real) == len(rows):
            return self.real
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)

    def _add(self, expert: int, rows: Float[Tensor, "n D"], weight: Float[Tensor, "n"]) -> None:
        hidden = hidden_rows(self.module, expert, rows).abs().double()
        self.total[expert] += (weight.double() @ hidden).cpu()


def _assignments(given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(token, expert, weight) of every assignment, from what a stack of experts is called with: rows and a routing, or
    as in transformers rows [T, D], experts [T, K] and weights [T, K]."""
    if isinstance(given[1], Tensor):
        chosen, weights = given[1], given[2]
        tokens = torch.arange(len(chosen), device=chosen.device)[:, None].expand_as(chosen)
        return tokens.flatten(), chosen.flatten(), weights.flatten()
    return given[1].token, given[1].expert, given[1].weight
