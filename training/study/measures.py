"""What can be measured of a cell's model when it has ended, each by one of :mod:`pruning.diagnostics`."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pruning import Masks
from pruning.diagnostics import adversarial_robustness, data_hunger, mean_loss, memorisation, transfer_curve
from training.config import RunConfig
from training.corpora import load_corpus, torch_headers
from training.data import Batches, Data, held_out_batches, tokenise
from training.records import Line
from training.run import load_data, make_model, seed_everything
from training.study.fitting import Fit
from training.study.retraining import retraining
from transformer import Transformer

SAMPLE = 32  # batches that losses are measured on
FEW = 8  # batches in memorisation, and in the attacks
COUNTS = (4, 8, 32)  # batches of the runs with less data
RETRAINING = 320  # batches that retraining goes through
RADII = (0.03, 0.1)
TRANSFER_STEPS = 60
Ids = Int[Tensor, "B L"]


@dataclass(frozen=True)
class Ended:
    """A cell that has ended: its run, and where its model was saved."""

    config: RunConfig
    checkpoint: Path

    @cached_property
    def model(self) -> Transformer:
        """The trained model, its zeros in the weights."""
        return Transformer.from_pretrained(self.checkpoint)

    @cached_property
    def data(self) -> Data:
        """The text that it was trained on."""
        return load_data(self.config.data)

    def fresh(self) -> Transformer:
        """The model as it was before training."""
        seed_everything(self.config.seed)
        return make_model(self.config, vocab_size=self.data.tokenizer.vocab_size)

    def seen(self, count: int) -> list[Ids]:
        """The first batches of the training, [B, L] each."""
        train, length = self.config.train, self.config.data.length
        stream = Batches(self.data.train, batch=train.batch, length=length, seed=self.config.seed)
        return [stream.next().inputs for _ in range(count)]

    def held_out(self, count: int) -> list[Ids]:
        """The first whole batches of the held-out text."""
        return _whole(self.data, self.data.held_out, count, self.config)


def take_measures(names: Sequence[str], config: RunConfig, checkpoint: Path) -> dict[str, Line]:
    """Measurement by its name. Raises: ValueError for a name that is not one."""
    for name in names:
        if name not in MEASURES:
            raise ValueError(f"measures must be of {', '.join(MEASURES)}, got {name!r}")
    ended = Ended(config, checkpoint)
    return {name: MEASURES[name](ended) for name in names}


def gap(ended: Ended) -> Line:
    """Loss in nats a token on the first batches that it was trained on, on held-out text, and the difference."""
    seen, held = mean_loss(ended.model, ended.seen(SAMPLE)), mean_loss(ended.model, ended.held_out(SAMPLE))
    return {"train": seen, "held_out": held, "gap": held - seen}


def less_data(ended: Ended) -> Line:
    """The same training with fewer batches, over and over: ``batches_8`` has its losses and their difference."""
    fit = Fit(ended.config, steps=ended.config.train.steps)
    found = data_hunger(ended.fresh, fit, ended.seen(max(COUNTS)), ended.held_out(SAMPLE), counts=COUNTS)
    rows = zip(COUNTS, found.train_losses, found.held_out, found.gaps(), strict=True)
    return {f"batches_{n}": {"train": train, "held_out": held, "gap": gap} for n, train, held, gap in rows}


def random_labels(ended: Ended) -> Line:
    """The same training on few batches whose next tokens are drawn at random: what of them it gives back.

    forgotten: 1 − the share that the trained model predicts; loss in nats a token, of ``chance`` = ln vocabulary."""
    vocab, generator = ended.data.tokenizer.vocab_size, torch.Generator().manual_seed(ended.config.seed)
    fit = Fit(ended.config, steps=ended.config.train.steps)
    found = memorisation(ended.fresh, fit, ended.seen(FEW), vocab_size=vocab, shares=(1.0,), generator=generator)
    return {"loss": found.losses[0], "forgotten": 1 - found.random_accuracy[0], "chance": math.log(vocab)}


def transfer(ended: Ended) -> Line:
    """Loss on C++, the headers that torch brings: of the model as it is, and after training there, its zeros held."""
    corpus = load_corpus(torch_headers(), held_out=0.1)
    cache, tokenizer = ended.config.data.cache, ended.data.tokenizer
    train, held = (tokenise(texts, tokenizer, cache=cache) for texts in (corpus.train, corpus.held_out))
    stream = Batches(train, batch=ended.config.train.batch, length=ended.config.data.length, seed=ended.config.seed)
    batches = [stream.next().inputs for _ in range(TRANSFER_STEPS)]
    fit = Fit(ended.config, steps=TRANSFER_STEPS, hold=True)
    found = transfer_curve(
        {Masks.of(ended.model).sparsity: ended.model}, fit, batches, _whole(ended.data, held, SAMPLE, ended.config)
    )
    return {"before": found.before[0], "after": found.after[0]}


def robustness(ended: Ended) -> Line:
    """What the worst small change of the embeddings adds to the held-out loss: ``radius_10`` by PGD within 0.1 RMS."""
    found = adversarial_robustness(ended.model, ended.held_out(FEW), radii=RADII)
    added = {f"radius_{round(100 * r)}": gap for r, gap in zip(found.radii, found.gaps(), strict=True)}
    return {"clean": found.clean, **added}


def retrained(ended: Ended) -> Line:
    """Its weights pruned by each criterion and retrained a little and much: :func:`training.study.retraining`."""
    return retraining(ended.model, ended.seen(RETRAINING), ended.held_out(SAMPLE), config=ended.config)


MEASURES: dict[str, Callable[[Ended], Line]] = {
    "gap": gap,
    "less_data": less_data,
    "random_labels": random_labels,
    "transfer": transfer,
    "robustness": robustness,
    "retraining": retrained,
}


def _whole(data: Data, tokens: np.ndarray, count: int, config: RunConfig) -> list[Ids]:
    batches = held_out_batches(tokens, batch=config.train.batch, length=config.data.length,
                               padding_id=data.tokenizer.eos_id)  # fmt: skip
    return [batch.inputs for batch in itertools.islice(batches, count) if batch.mask is None]
