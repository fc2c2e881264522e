"""What a model learns from how much: random labels, less data, another corpus. Training is the caller's."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from pruning.batches import Batch, Loss, after_prefix, batch_size, evaluating, model_batches
from pruning.diagnostics.curve import mean_loss
from pruning.diagnostics.figure import axes_for, labelled

Make = Callable[[], nn.Module]
# (model, batches): trains in place, holding the model's own masks if it has any
Fit = Callable[[nn.Module, Sequence[Batch]], Any]


@dataclass(frozen=True)
class Memorisation:
    """How well training labels are learnt when a share of them is random.

    losses: mean training loss a sample. random_accuracy: share of the random labels that the trained model gives back
    (none at share 0: nan). plain_accuracy: of the others (nan at share 1). chance: 1 / vocabulary."""

    shares: tuple[float, ...]
    losses: tuple[float, ...]
    random_accuracy: tuple[float, ...]
    plain_accuracy: tuple[float, ...]
    chance: float

    def plot(self, *, ax: Any = None, label: str = "") -> Any:
        """Accuracy on random labels against their share; returns the axes."""
        ax = axes_for(ax)
        ax.plot(self.shares, self.random_accuracy, marker="o", label=f"{label} random labels".strip())
        ax.plot(self.shares, self.plain_accuracy, marker="o", linestyle="--", label=f"{label} true labels".strip())
        ax.axhline(self.chance, color="grey", linestyle=":")
        return labelled(ax, x="share of random labels", y="accuracy in training", title="memorisation", legend=True)


@dataclass(frozen=True)
class DataCurve:
    """Losses after training on so many samples."""

    samples: tuple[int, ...]
    train_losses: tuple[float, ...]
    held_out: tuple[float, ...]

    def gaps(self) -> tuple[float, ...]:
        """Held-out minus training loss."""
        return tuple(h - t for h, t in zip(self.held_out, self.train_losses, strict=True))

    def plot(self, *, ax: Any = None, label: str = "") -> Any:
        """Both losses against the number of samples; returns the axes."""
        ax = axes_for(ax)
        ax.semilogx(self.samples, self.held_out, marker="o", label=f"{label} held out".strip())
        ax.semilogx(self.samples, self.train_losses, marker="o", linestyle="--", label=f"{label} training".strip())
        return labelled(ax, x="training samples", y="loss (nats)", title="data hunger", legend=True)


@dataclass(frozen=True)
class TransferCurve:
    """Loss on another corpus by sparsity: of the model as it is, and after training there."""

    sparsities: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    def plot(self, *, ax: Any = None) -> Any:
        """Both against sparsity; returns the axes."""
        ax = axes_for(ax)
        ax.plot(self.sparsities, self.before, marker="o", linestyle="--", label="as it is")
        ax.plot(self.sparsities, self.after, marker="o", label="after training there")
        return labelled(ax, x="sparsity", y="loss on the other corpus (nats)", title="transfer", legend=True)


@dataclass(frozen=True)
class Relabelled:
    """Batches of input_ids and labels [B, L], and where a label is random."""

    batches: tuple[dict[str, Tensor], ...]
    random: tuple[Bool[Tensor, "B L"], ...]


def random_labels(batches: Sequence[Batch], *, share: float, vocab_size: int, generator: torch.Generator) -> Relabelled:
    """Each label replaced by a uniform token with probability ``share`` (Zhang et al. 2017, arXiv:1611.03530), drawn
    once: the same wrong labels in every epoch. Labels default to input_ids; −100 stays.

    Raises: ValueError for a share outside [0, 1] or vocab_size < 2."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be >= 2, got {vocab_size}")
    made, where = [], []
    for batch in batches:
        keywords: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        given = keywords.get("labels")
        given = keywords["input_ids"] if given is None else given
        chosen = (torch.rand(given.shape, generator=generator) < share).to(given.device) & (given != -100)
        drawn = torch.randint(vocab_size, given.shape, generator=generator).to(given)
        made.append({**keywords, "labels": torch.where(chosen, drawn, given)})
        where.append(chosen)
    return Relabelled(tuple(made), tuple(where))


def memorisation(
    make: Make,
    train_fn: Fit,
    batches: Sequence[Batch],
    *,
    vocab_size: int,
    shares: Sequence[float] = (0.0, 0.5, 1.0),
    generator: torch.Generator,
) -> Memorisation:
    """Train a new model (``make()``) on each share of random next-token labels, and ask it for them again.

    train_fn(model, batches) trains in place on dicts with input_ids and labels (aligned as the model shifts them).
    Raises: ValueError without shares; as :func:`random_labels`."""
    if not shares:
        raise ValueError("shares must hold at least one value, got none")
    losses, wrong, plain = [], [], []
    for share in shares:
        data, model = random_labels(batches, share=share, vocab_size=vocab_size, generator=generator), make()
        train_fn(model, data.batches)
        losses.append(mean_loss(model, data.batches))
        hits = [_hits(model, batch) for batch in data.batches]
        asked = [after_prefix(model, batch)[:, :-1].cpu() for batch in data.batches]
        wrong.append(_share(hits, data, asked, of_random=True))
        plain.append(_share(hits, data, asked, of_random=False))
    return Memorisation(tuple(shares), tuple(losses), tuple(wrong), tuple(plain), 1 / vocab_size)


def data_hunger(
    make: Make,
    train_fn: Fit,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    counts: Sequence[int],
    loss: Loss | None = None,
) -> DataCurve:
    """Train a new model on the first ``n`` batches, for each n of ``counts``, and measure it on them and held out.

    How long is train_fn's choice: equal steps, or equal epochs. Raises: ValueError unless 1 ≤ n ≤ len(batches)."""
    wrong = [n for n in counts if not 1 <= n <= len(batches)]
    if wrong or not counts:
        raise ValueError(f"counts must be in [1, {len(batches)}], got {wrong[0] if wrong else 'none'}")
    samples, trained, held = [], [], []
    for n in counts:
        model, part = make(), batches[:n]
        train_fn(model, part)
        samples.append(sum(batch_size(batch) for batch in part))
        trained.append(mean_loss(model, part, loss=loss))
        held.append(mean_loss(model, held_out, loss=loss))
    return DataCurve(tuple(samples), tuple(trained), tuple(held))


def transfer_curve(
    models: Mapping[float, nn.Module],
    train_fn: Fit,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    loss: Loss | None = None,
) -> TransferCurve:
    """Sparsity → model, each measured on ``held_out`` of another corpus and, a copy, after train_fn on ``batches``.

    Raises: ValueError without models."""
    if not models:
        raise ValueError("models must hold at least one, got none")
    before, after = [], []
    for model in models.values():
        before.append(mean_loss(model, held_out, loss=loss))
        copied = copy.deepcopy(model)
        train_fn(copied, batches)
        after.append(mean_loss(copied, held_out, loss=loss))
    return TransferCurve(tuple(models), tuple(before), tuple(after))


@torch.no_grad()
def _hits(model: nn.Module, batch: Mapping[str, Tensor]) -> Bool[Tensor, "B L"]:
    """Where the most likely next token is the label; the first place, which nothing predicts, is False."""
    with evaluating(model):
        (one,) = model_batches(model, [dict(batch)])
        assert isinstance(one, dict)
        output = model(**{k: v for k, v in one.items() if k != "labels"})
    logits = output if isinstance(output, Tensor) else output.logits
    right = (logits[:, :-1].argmax(-1) == one["labels"][:, 1:]).cpu()
    return torch.cat([torch.zeros(len(right), 1, dtype=torch.bool), right], dim=1)


def _share(hits: Sequence[Tensor], data: Relabelled, asked: Sequence[Tensor], *, of_random: bool) -> float:
    """Of the labels that the model is ``asked`` for, token by token, the share that it gives."""
    right = count = 0
    for hit, batch, chosen, some in zip(hits, data.batches, data.random, asked, strict=True):
        where = (chosen.cpu() == of_random) & (batch["labels"].cpu() != -100)
        where[:, 0] = False
        where[:, 1:] &= some
        right, count = right + int((hit & where).sum()), count + int(where.sum())
    return right / count if count else float("nan")
