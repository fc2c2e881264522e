"""A pruned model trains on, its zeros held: towards its dense parent's outputs, or on text."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pruning import Masks, add_adapters, merge_adapters
from pruning.batches import after_prefix, next_token_loss, prefix_targets
from training.distill import distillation_loss, hidden_loss
from training.prune_arguments import PruneArguments
from training.prune_encoder import Encoder

WARM = 0.1  # share of the steps in which the rate rises; after that it falls to 0 in a line
MAX_NORM = 1.0
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Lesson:
    """How to recover. by: "distill" (the dense parent's outputs) or "retrain" (the next token). rate: the highest of
    AdamW. rank: of low-rank adapters that are trained alone and merged, None trains all parameters. batch: sequences a
    step. seed: of the order of the text, and of the adapters."""

    steps: int
    by: str
    rate: float
    rank: int | None
    batch: int
    seed: int


def recover(
    model: nn.Module,
    whole: nn.Module,
    lessons: Int[Tensor, "N L"],
    plan: Lesson,
    *,
    masks: Masks | None,
    encoder: Encoder | None,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> list[float]:
    """plan.steps steps of AdamW, in place; the loss of each. `whole` is the dense parent, which does not change.

    The loss is a mean over tokens: of a causal model KL(parent ‖ model) of the next token (`distillation_loss`), or
    under "retrain" its cross-entropy; of an encoder 1 − cos of each passage's two embeddings plus `hidden_loss` of the
    last hidden states. All zeros that the prunable weights have (`Masks.of`), whichever run made them, are held: set
    back after every step, or by the adapters (`add_adapters`). masks: applied first; adapters go on the weights that it
    names, None: on all prunable ones. Weights in half precision are trained in float32, in which small steps are not
    lost, and rounded back at the end. Gradients are clipped to norm 1, and a batch goes in parts that keep its logits
    in bounds.
    Raises: ValueError for a loss that is not finite, and as `add_adapters`."""
    known = lessons.to(next(model.parameters()).device)
    losses: list[float] = []
    with _in_float32(model):
        held = _held(model, masks)
        trained = _trained(model, plan, held, None if masks is None else list(masks.kept))
        optimizer = torch.optim.AdamW(trained, lr=plan.rate, weight_decay=0.0)
        for step, ids in enumerate(progress(list(_batches(known, plan)))):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * rate_at(step, plan.steps)
            losses.append(_gradients(model, whole, ids, plan.by, encoder))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"loss of recovery step {step} must be finite, got {losses[-1]}: lower --recover-rate")
            nn.utils.clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if plan.rank is None:
                held.apply(model)
        if plan.rank is not None:
            merge_adapters(model)
    return losses


def rate_at(step: int, steps: int) -> float:
    """The share of the highest rate: up in a line over the first tenth, then down to 0 behind the last step.

    >>> [round(rate_at(step, 4), 2) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    rising = math.ceil(WARM * steps)
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising + 1)


def _held(model: nn.Module, masks: Masks | None) -> Masks:
    """All zeros that the model's prunable weights have under `masks`."""
    if masks is not None:
        masks.apply(model)
    return Masks.of(model)


def _trained(model: nn.Module, plan: Lesson, held: Masks, adapted: list[str] | None) -> list[nn.Parameter]:
    if plan.rank is None:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(plan.seed)
    return add_adapters(model, held, rank=plan.rank, weights=adapted, generator=generator)


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters in half precision are float32 inside; buffers stay as they are."""
    half = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 4}
    for parameter in half:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in half.items():
            parameter.data = parameter.data.to(dtype)


def _batches(lessons: Int[Tensor, "N L"], plan: Lesson) -> Iterator[Int[Tensor, "B L"]]:
    """The sequences of every step: all of the text in an order drawn anew each time it is through."""
    draw = torch.Generator().manual_seed(plan.seed)
    rounds = math.ceil(plan.steps * plan.batch / len(lessons))
    order = torch.cat([torch.randperm(len(lessons), generator=draw) for _ in range(rounds)])
    for step in range(plan.steps):
        yield lessons[order[step * plan.batch : (step + 1) * plan.batch].to(lessons.device)]


def _gradients(model: nn.Module, whole: nn.Module, ids: Int[Tensor, "B L"], by: str, encoder: Encoder | None) -> float:
    """Gradients of the mean loss, part by part; the loss."""
    vocabulary = cast(int, cast(Any, model.config).vocab_size)
    rows = max(1, LOGITS_AT_ONCE // (ids.shape[1] * vocabulary)) if encoder is None else len(ids)
    total = 0.0
    for part in ids.split(rows):
        loss = _loss(model, whole, part, by, encoder) * (len(part) / len(ids))
        loss.backward()
        total += float(loss.detach())
    return total


def _loss(
    model: nn.Module, whole: nn.Module, ids: Int[Tensor, "B L"], by: str, encoder: Encoder | None
) -> Float[Tensor, ""]:
    if encoder is not None:
        states = encoder.states(model, ids)
        with torch.no_grad():
            wanted = encoder.states(whole, ids)
        cosines = F.cosine_similarity(encoder.pooled(states), encoder.pooled(wanted), dim=-1)
        return (1 - cosines).mean() + hidden_loss([states], [wanted])
    if by == "retrain":
        return next_token_loss(model, ids) / len(ids)
    with torch.no_grad():
        goal = whole(ids).logits
    after = after_prefix(model, ids) if prefix_targets(model) else None
    return distillation_loss(model(ids).logits, goal, mask=after)


def lesson_of(arguments: PruneArguments) -> Lesson:
    """What the arguments of `prune` say of it."""
    return Lesson(arguments.recover, arguments.recover_by, arguments.recover_rate, arguments.recover_rank,
                  arguments.batch, arguments.seed)  # fmt: skip


def smoothed(losses: Sequence[float], share: float = 0.05) -> list[float]:
    """The mean over a window of that share of the steps that ends at each: what a noisy line is drawn as.

    >>> smoothed([4.0, 2.0, 3.0], share=0.6)
    [4.0, 3.0, 2.5]
    """
    width = max(1, round(share * len(losses)))
    return [sum(losses[max(0, at + 1 - width) : at + 1]) / min(at + 1, width) for at in range(len(losses))]
