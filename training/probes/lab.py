"""What a probe trains with: one base run, masks held, and something looked at on the way."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import load_file, save
from torch import Tensor

from pruning import Masks
from training.config import RunConfig
from training.data import Batches, Data
from training.durable import replace_durably
from training.moments import Sparsifier
from training.records import Line
from training.run import make_model, seed_everything
from training.trainer import Trainer
from transformer import Transformer

State = dict[str, Tensor]
# step number → nothing: called before each step and after the last
Watch = Callable[[int], None]


class Held:
    """Masks that were found elsewhere, held while a model trains (a :class:`training.moments.Sparsifier`).

    Gradients of absent weights are set to 0 before they are clipped, the weights after every step."""

    def __init__(self, model: Transformer, masks: Masks) -> None:
        self._masks, self._model = masks, model
        own = dict(model.named_parameters())
        self._weights = {name: own[name] for name in masks.kept}
        masks.apply(model)

    def masks(self) -> Masks:
        """The masks."""
        return self._masks

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Clear the gradients of absent weights."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~self._masks.kept[name], 0)
        return True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set absent weights to 0."""
        self._masks.apply(self._model)

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return self._masks.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved masks."""
        self._masks = Masks.from_state_dict(dict(state))


def fresh(config: RunConfig, data: Data) -> Transformer:
    """The model of a run at its first step."""
    seed_everything(config.seed)
    return make_model(config, vocab_size=data.tokenizer.vocab_size)


def make_trainer(
    model: Transformer,
    config: RunConfig,
    data: Data,
    *,
    masks: Masks | None = None,
    extra: Sequence[Sparsifier] = (),
) -> Trainer:
    """A trainer of ``model`` on the run's text, under masks. extra: takes part in each step before the masks do."""
    held = [] if masks is None else [Held(model, masks)]
    return Trainer(
        model, data, out=config.out, length=config.data.length, optim=config.optim, train=config.train,
        seed=config.seed, sparsifiers=[*extra, *held],
    )  # fmt: skip


def fit(trainer: Trainer, *, watch: Watch | None = None) -> Line:
    """Train to the last step; held-out loss (nats a token) and bits a byte, and the mean loss of the last ten steps.

    Raises: NonFiniteError if a loss or gradient is not finite."""
    trainer.model.train()
    losses: list[float] = []
    while trainer.step < trainer.train.steps:
        if watch is not None:
            watch(trainer.step)
        losses.append(trainer.train_step()["loss"])
    if watch is not None:
        watch(trainer.step)
    found = trainer.evaluate()
    last = losses[-10:]
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss": found.loss,
        "train_loss": sum(last) / len(last),
        "tokens": trainer.tokens,
    }


def state_of(model: Transformer) -> State:
    """The parameters by name, copied."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def put(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Set the parameters. Raises: KeyError for one that is missing."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])


def save_state(folder: Path, key: str, state: State) -> None:
    """Keep the parameters of a finished cell, whole or not at all: others may be writing the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_durably(folder / f"{key}.safetensors", save(state))


def load_state(folder: Path, key: str) -> State | None:
    """What was kept, None if nothing was."""
    path = folder / f"{key}.safetensors"
    return load_file(path) if path.is_file() else None


def sequences(tokens: np.ndarray, *, length: int, count: int, seed: int) -> Int[Tensor, "count length"]:
    """``count`` windows of the text, drawn without repetition by ``seed``."""
    batches = Batches(tokens, batch=count, length=length, seed=seed)
    return batches.next().inputs
