"""Trainings in other regimes than the study's own, each with its own sweep of rates: few batches, random labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pruning import Masks
from pruning.batches import Batch
from pruning.diagnostics import mean_loss, memorisation
from training.config import RunConfig
from training.records import Line
from training.study.fitting import Fit
from training.study.measures import FEW, Ended

HELD_OUT = 8  # batches
EVERY = 15  # steps between looks at the held-out loss
SLACK = 0.005  # of sparsity, that a look may be below the end's


@dataclass(frozen=True)
class Regime:
    """take: the numbers of a run, by its settings. score: which of them chooses the rate, the lowest best. said: what
    the page says of it."""

    take: Callable[[RunConfig], Line]
    score: str
    said: str


def few_batches(config: RunConfig) -> Line:
    """Loss in nats a token of a run that reads its first FEW batches over and over.

    ``best``: the lowest held-out loss of the looks, one each EVERY steps and one at the end, at which the model was as
    sparse as it ends (within SLACK); ``best_step`` and ``best_train`` are that look's. ``last``, ``last_train``: at the
    end. ``best_gap``, ``last_gap``: held out less trained on. ``chance``: ln vocabulary, of a uniform guess."""
    ended = Ended(config, config.out)
    model, seen, held = ended.fresh(), ended.seen(FEW), ended.held_out(HELD_OUT)
    steps, looks = config.train.steps, list[tuple[float, int, float, float]]()

    def look(step: int, trained: nn.Module) -> None:
        if step % EVERY == 0 or step == steps:
            losses = mean_loss(trained, held), mean_loss(trained, seen)
            looks.append((losses[0], step, losses[1], Masks.of(trained).sparsity))

    Fit(config, steps=steps, watch=look)(model, seen)
    last = looks[-1]
    best = min(one for one in looks if one[3] >= last[3] - SLACK)
    return {
        "best": best[0], "best_step": best[1], "best_train": best[2], "best_gap": best[0] - best[2],
        "last": last[0], "last_train": last[2], "last_gap": last[0] - last[2],
        "chance": math.log(ended.data.tokenizer.vocab_size),
    }  # fmt: skip


def random_labels(config: RunConfig) -> Line:
    """A run on FEW batches whose next tokens are drawn at random: what of them it gives back.

    ``forgotten``: 1 − the share that the trained model predicts; ``loss`` in nats a token, ``chance`` = ln
    vocabulary."""
    ended = Ended(config, config.out)
    vocab, generator = ended.data.tokenizer.vocab_size, torch.Generator().manual_seed(config.seed)
    fit, batches = Fit(config, steps=config.train.steps), list[Batch](ended.seen(FEW))
    found = memorisation(ended.fresh, fit, batches, vocab_size=vocab, shares=(1.0,), generator=generator)
    return {"loss": found.losses[0], "forgotten": 1 - found.random_accuracy[0], "chance": math.log(vocab)}


REGIMES = {
    "few_batches": Regime(
        few_batches,
        "best",
        f"{FEW} batches, read over and over; the rate by the lowest held-out loss of any look (every {EVERY} steps, "
        f"and at the end, on {HELD_OUT} held-out batches) at which the model is as sparse as it ends",
    ),
    "random_labels": Regime(
        random_labels,
        "forgotten",
        f"{FEW} batches whose next tokens are random; the rate by the smallest share forgotten",
    ),
}


def check_regimes(names: Sequence[str]) -> None:
    """Raises: ValueError for a name that is none of REGIMES."""
    for name in names:
        if name not in REGIMES:
            raise ValueError(f"regimes must be of {', '.join(REGIMES)}, got {name!r}")
