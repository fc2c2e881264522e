"""A pruned model learns from its dense parent."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pruning.batches import IGNORED, Batch, after_prefix, evaluating, prefix_targets, to_device
from pruning.masking import Masks


def distillation_loss(
    student_logits: Float[Tensor, "*tokens V"],
    teacher_logits: Float[Tensor, "*tokens V"],
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """T² · mean over tokens of KL(softmax(teacher / T) ‖ softmax(student / T)), in float32 or wider.

    Hinton et al. 2015 (arXiv:1503.02531); T² keeps the gradient's size as T changes. The teacher gets no gradient.
    mask: 0 marks padding, which does not count. Raises: ValueError for a temperature that is not positive, logits of
    different shapes, or a mask that leaves no token."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    _check_shapes("teacher_logits", student_logits, teacher_logits)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(wide) / temperature, -1)
    teacher = F.log_softmax(teacher_logits.detach().to(wide) / temperature, -1)
    return temperature**2 * _mean((teacher.exp() * (teacher - student)).sum(-1), mask)


def hidden_loss(
    student: Sequence[Float[Tensor, "..."]],
    teacher: Sequence[Float[Tensor, "..."]],
    *,
    mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the pairs of mean ‖student − teacher‖² / mean ‖teacher‖², over the tokens: 0 equal, 1 a student of
    zeros. The teacher gets no gradient. Raises: ValueError for other numbers or shapes of states, or none."""
    if len(student) != len(teacher) or not student:
        raise ValueError(f"student and teacher must have equally many states, got {len(student)} and {len(teacher)}")
    losses = []
    for own, wanted in zip(student, teacher, strict=True):
        _check_shapes("teacher", own, wanted)
        wide = torch.promote_types(own.dtype, torch.float32)
        target = wanted.detach().to(wide)
        size = _mean(target.square().sum(-1), mask).clamp_min(torch.finfo(wide).tiny)
        losses.append(_mean((own.to(wide) - target).square().sum(-1), mask) / size)
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Distilled:
    """One step: the loss minimised, and its parts before their weights (0 where a part is off)."""

    loss: float
    kl: float
    next_token: float
    hidden: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    temperature: float = 1.0,
    next_token: float = 0.0,
    hidden: float = 0.0,
    masks: Masks | None = None,
    max_norm: float = 1.0,
) -> list[Distilled]:
    """One optimiser step a batch on KL + next_token · next-token loss + hidden · `hidden_loss`; the losses by step.

    Own and Hugging Face causal models, in token ids [B, L] or keyword dicts; the teacher runs in evaluation mode and
    changes in nothing. hidden > 0 compares the states before the output head, of equal width. masks: applied after each
    step, so that pruned weights stay 0 whatever the optimiser does; adapters keep their zeros without.

    >>> adapters = add_adapters(model, masks)
    >>> distill(model, dense, batches, torch.optim.AdamW(adapters, lr=1e-3), temperature=2.0)

    Raises: ValueError as the losses, for one batch instead of an iterable, and for a loss that is not finite."""
    if isinstance(batches, Tensor | Mapping):
        raise ValueError(f"batches must be an iterable of batches, got one {type(batches).__name__}; pass [batch]")
    device = next(student.parameters()).device
    record: list[Distilled] = []
    for given in batches:
        batch = to_device(given, device)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = _losses(student, teacher, batch, temperature, next_token, hidden)
        if not torch.isfinite(loss):
            raise ValueError(f"loss of step {len(record)} must be finite, got {loss.item()}")
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        torch.clear_autocast_cache()  # an autocast around this call would go on with the weights of the first step
        if masks is not None:
            masks.apply(student)
        record.append(parts)
    return record


def _losses(
    student: nn.Module, teacher: nn.Module, batch: Batch, temperature: float, next_token: float, hidden: float
) -> tuple[Tensor, Distilled]:
    mask = _counted(student, batch)
    with evaluating(teacher), torch.no_grad():
        wanted, states = _run(teacher, batch, hidden > 0)
    logits, own = _run(student, batch, hidden > 0)
    kl = distillation_loss(logits, wanted, temperature=temperature, mask=mask)
    zero = kl.new_zeros(())
    ce = _next_token(logits, batch, after_prefix(student, batch)) if next_token else zero
    near = hidden_loss(own, states, mask=mask) if hidden else zero
    loss = kl + next_token * ce + hidden * near
    return loss, Distilled(*(float(part.detach()) for part in (loss, kl, ce, near)))


def _run(model: nn.Module, batch: Batch, with_states: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the states before the output head."""
    keywords = {"input_ids": batch} if isinstance(batch, Tensor) else {k: v for k, v in batch.items() if k != "labels"}
    config = getattr(model, "config", None)
    stock = hasattr(config, "output_hidden_states")
    output = model(**keywords, **({"output_hidden_states": True} if stock and with_states else {}))
    if not with_states:
        return output.logits, []
    return output.logits, [output.hidden_states[-1] if stock else output.hidden]


def _counted(student: nn.Module, batch: Batch) -> Bool[Tensor, "B L"] | None:
    """The tokens whose outputs are compared: real ones, which have not seen the next one as a prefix; None: all."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    if not prefix_targets(student):
        return None if mask is None else mask.bool()
    after = after_prefix(student, batch)
    return after if mask is None else after & mask.bool()


def _next_token(logits: Float[Tensor, "B L V"], batch: Batch, after: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the targets ``after`` a prefix; without labels, over the pairs of which both are real."""
    keywords = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    labels, mask = keywords.get("labels"), keywords.get("attention_mask")
    targets = (keywords["input_ids"] if labels is None else labels)[:, 1:]
    if labels is None and mask is not None:
        targets = targets.masked_fill(~(mask[:, 1:].bool() & mask[:, :-1].bool()), IGNORED)
    wide = torch.promote_types(logits.dtype, torch.float32)
    targets = targets.masked_fill(~after[:, :-1], IGNORED)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), targets.flatten(), ignore_index=IGNORED)


def _mean(values: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    if not mask.any():
        raise ValueError("mask must leave at least one token, got none")
    return values[mask.bool()].mean()


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{name} must have the student's shape {list(student.shape)}, got {list(teacher.shape)}")
