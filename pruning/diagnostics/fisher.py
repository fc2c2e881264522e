"""The trace of the Fisher information: measured, and controlled by a curriculum or a penalty."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pruning.batches import Batch, Loss, batch_size, model_batches, next_token_loss, prefix_targets
from pruning.diagnostics.figure import axes_for, labelled
from pruning.diagnostics.kept import kept_of
from pruning.masking import Masks
from pruning.saliency.products import check_twice_differentiable
from pruning.saliency.second_order import hessian_diagonal


@dataclass(frozen=True)
class FisherTrace:
    """Parameter name → its part of the trace. labels: "model" drawn from the predictions (the Fisher), "data" the
    text's own (the empirical Fisher, another quantity: Kunstner et al. 2019, arXiv:1905.12558)."""

    parts: dict[str, float]
    labels: Literal["model", "data"]

    @property
    def total(self) -> float:
        """The trace over all parameters."""
        return sum(self.parts.values())

    def plot(self, *, ax: Any = None) -> Any:
        """One bar a parameter; returns the axes."""
        ax = axes_for(ax)
        ax.barh(list(self.parts), list(self.parts.values()))
        return labelled(ax, x="trace of the Fisher", y="", title=f"labels of the {self.labels}")


@dataclass(frozen=True)
class FisherHistory:
    """Traces during training: step → trace."""

    traces: dict[int, FisherTrace]

    def peak(self) -> tuple[int, float]:
        """(step, trace) of the largest."""
        return max(((step, trace.total) for step, trace in self.traces.items()), key=lambda pair: pair[1])

    def plot(self, *, ax: Any = None, label: str = "") -> Any:
        """The trace against the step; returns the axes."""
        ax = axes_for(ax)
        ax.plot(list(self.traces), [trace.total for trace in self.traces.values()], marker="o", label=label)
        return labelled(ax, x="step", y="trace of the Fisher", title="Fisher trace over training", legend=bool(label))


@dataclass(frozen=True)
class FisherCurriculum:
    """Samples in ascending order of their Fisher trace. order: places among the samples; traces: in their own order."""

    order: Int[Tensor, "n"]
    traces: Float[Tensor, "n"]

    def admitted(self, step: int, *, steps: int, start: float = 0.2) -> Int[Tensor, "m"]:
        """Places that training may draw from at ``step``: the lowest ⌈n · (start + (1 − start) · step/steps)⌉ samples,
        all from ``steps`` on. Raises: ValueError unless 0 < start ≤ 1 and steps ≥ 1."""
        if not 0 < start <= 1:
            raise ValueError(f"start must be in (0, 1], got {start}")
        if steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        share = min(1.0, start + (1 - start) * step / steps)
        return self.order[: math.ceil(share * len(self.order) - 1e-9)]

    def plot(self, *, ax: Any = None) -> Any:
        """The traces in the order of the curriculum; returns the axes."""
        ax = axes_for(ax)
        ax.plot(self.traces[self.order].tolist())
        return labelled(ax, x="sample, in the order of the curriculum", y="trace of the Fisher", title="curriculum")


def fisher_trace(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weights: Sequence[str] | None = None,
    masks: Masks | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> FisherTrace:
    """tr F = E_x mean_t E_{y ~ p(·|x)} ‖∇ log p(y_t | x)‖², with labels drawn from the model's own predictions.

    An unbiased estimate for next-token prediction: the draws at the T positions of a sample are independent and their
    gradients have mean 0, so that T · ‖∇ mean_t log p‖² has the mean of the single ones' as its expectation.
    weights: parameter names, None all that train; masks: count only the weights that are there. draws: of labels for
    each sample, from ``generator``. Raises: as :func:`hessian_diagonal`; ValueError for unknown names, and for masks of
    other parameters or shapes than the model's."""
    chosen, kept = _chosen(model, weights), kept_of(masks, model)
    diagonal = hessian_diagonal(model, chosen, batches, estimator="fisher", draws=draws, generator=generator)
    return FisherTrace(_sums(diagonal, kept), "model")


def empirical_fisher_trace(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weights: Sequence[str] | None = None,
    masks: Masks | None = None,
    loss: Loss | None = None,
) -> FisherTrace:
    """E_(x, y) ‖∇ loss(x, y)‖² over samples, with the labels of the text: the mean squared gradient of a sample's loss.

    It goes to 0 where the model fits its data, as the Fisher need not. loss: a sum over samples; None next-token loss.
    Raises: as :func:`fisher_trace`."""
    chosen, kept = _chosen(model, weights), kept_of(masks, model)
    diagonal = hessian_diagonal(model, chosen, batches, estimator="empirical_fisher", loss=loss)
    return FisherTrace(_sums(diagonal, kept), "data")


def low_fisher_first(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    weights: Sequence[str] | None = None,
    masks: Masks | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> FisherCurriculum:
    """The trace of each sample of ``batches`` under the present model, and their order: low ones first, so that early
    training, which fixes the basin, is not led by the samples of steepest predictions. masks: count only the weights
    that are there. Raises: as :func:`fisher_trace`."""
    chosen, kept, traces = _chosen(model, weights), kept_of(masks, model), []
    for batch in model_batches(model, batches):
        for sample in range(batch_size(batch)):
            one = _sample(batch, sample)
            diagonal = hessian_diagonal(model, chosen, [one], estimator="fisher", draws=draws, generator=generator)
            traces.append(sum(_sums(diagonal, kept).values()))
    found = torch.tensor(traces, dtype=torch.float64)
    return FisherCurriculum(found.argsort(stable=True), found)


def fisher_penalty(
    model: nn.Module,
    batch: Batch,
    *,
    weights: Sequence[str] | None = None,
    masks: Masks | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """T/B · ‖∇ Σ_b mean_t −log p(ŷ_bt | x_b)‖², ŷ drawn from the model: an estimate of tr F that can be minimised.

    The Fisher penalty of Jastrzebski et al. 2021 (arXiv:2012.14193), there on every tenth batch: add λ times it to the
    loss. Differentiable twice, as the model must be: run both passes under
    :func:`pruning.saliency.products.twice_differentiable`, which sees to attention, experts and memories. In
    expectation over ŷ it is :func:`fisher_trace`, under masks too: the gradients of absent weights count for nothing.
    Raises: ValueError for padding, labels of one's own, fewer than two tokens, unknown names, masks of other parameters
    or shapes than the model's, and a function that is differentiable once only, by name."""
    chosen, kept = _chosen(model, weights), kept_of(masks, model)
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    if not isinstance(batch, Tensor) and set(batch) != {"input_ids"}:
        raise ValueError(f"a Fisher penalty draws all labels and takes input_ids alone, got {sorted(batch)}")
    least = 2 + prefix_targets(model)
    if ids.shape[1] < least:
        raise ValueError(f"a Fisher penalty needs input_ids [B, L] with L >= {least}, got {list(ids.shape)}")
    with torch.no_grad():
        output = model(ids)
        logits = output if isinstance(output, Tensor) else output.logits
        chances = logits[:, :-1].float().softmax(-1).flatten(0, 1).cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).view(len(ids), -1).to(ids.device)
    loss = next_token_loss(model, {"input_ids": ids, "labels": torch.cat([ids[:, :1], drawn], dim=1)})
    check_twice_differentiable(loss)
    found = torch.autograd.grad(
        loss, list(chosen.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    squares = [
        (g.square() * kept[name].to(g.device) if name in kept else g.square()).sum()
        for name, g in zip(chosen, found, strict=True)
    ]
    return torch.stack(squares).sum() * ((drawn.shape[1] - prefix_targets(model)) / len(ids))


def _chosen(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    own = dict(model.named_parameters())
    if names is None:
        return {name: parameter for name, parameter in own.items() if parameter.requires_grad}
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ValueError(f"weights must name parameters of the model, got {unknown[0]!r}")
    return {name: own[name] for name in names}


def _sums(diagonal: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, float]:
    return {n: float((d * kept[n].to(d.device) if n in kept else d).double().sum()) for n, d in diagonal.items()}


def _sample(batch: Batch, index: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    return {k: v[index : index + 1] if isinstance(v, Tensor) else v for k, v in batch.items()}
