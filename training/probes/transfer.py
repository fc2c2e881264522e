"""Masks that transfer: to another seed, another corpus, a deeper model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from pruning import Masks, erk, global_ranking, magnitude, prunable_weights, select_masks, shuffle_masks
from pruning.lottery import mask_distance, stretched, transferred
from training.config import RunConfig, from_dict
from training.corpora import torch_headers
from training.data import Data
from training.probes.lab import State, fit, fresh, make_trainer, put, state_of
from training.probes.runner import Lab
from training.probes.spec import Task
from training.records import Line
from training.run import load_data

TARGETS = {"seed": "Another seed", "corpus": "Another corpus", "depth": "A deeper model"}
DENSE = {name: Task("dense", "Dense", name) for name in ("seed", "corpus", "depth")}
ARMS = {
    "own": "Its own mask",
    "transferred": "Mask handed on",
    "shuffled": "… shuffled inside its matrices",
    "erk": "ERK, by chance",
}
STRETCHED = {
    "own": "Its own mask",
    "repeat": "Stretched, each layer repeated",
    "cycle": "Stretched, layers in turn",
    "shuffled": "… repeated, shuffled inside",
    "erk": "ERK, by chance",
}


@dataclass(frozen=True)
class Options:
    """sparsities: of the masks. layers: of the deeper model. other: the other corpus, as ``data.corpus`` names one; the
    C++ headers that torch brings if left out."""

    sparsities: tuple[float, ...]
    layers: int
    other: str | None = None


class Transfer:
    """The experiment (see :class:`training.probes.runner.Experiment`).

    Masks are the largest magnitudes of dense runs, one ranking over all. ``seed``: the mask of the next seed of the
    list. ``corpus``: the mask of the run of the same seed on the first text, for training on the other. ``depth``: the
    mask of the run of the same seed, stretched over more layers. All train from their own initial weights."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.options: Options = from_dict(Options, lab.probe.options, where=f"options of {lab.probe.name!r}")

    def stages(self) -> tuple[tuple[Task, ...], ...]:
        """The three dense models, then all masks."""
        masked = tuple(t for sparsity in self.options.sparsities for t in sparse_tasks(sparsity))
        return tuple(DENSE.values()), masked

    def train(self, task: Task, lr: float, seed: int) -> tuple[Line, State]:
        """One run from the target's own initial weights."""
        target = target_of(task)
        masks = None if task.arm == "dense" else self.masks(task, seed)
        config, data = self._config(target, lr, seed), self._data(target)
        model = fresh(config, data)
        result = fit(make_trainer(model, config, data, masks=masks))
        if masks is not None:
            own = self._own(target, task.sparsity, seed)
            result |= {"mask_sparsity": masks.sparsity, "distance": mask_distance(masks, own, relative=True)}
        return result, state_of(model)

    def extras(self) -> Iterator[tuple[str, Callable[[], Line]]]:
        """None."""
        return iter(())

    def masks(self, task: Task, seed: int) -> Masks:
        """The mask of an arm, for the model of its target."""
        target, sparsity = target_of(task), task.sparsity
        if task.arm == "own":
            return self._own(target, sparsity, seed)
        model = fresh(self._config(target, self.lab.probe.lrs[0], seed), self._data(target))
        draw = torch.Generator().manual_seed(seed)
        if task.arm == "erk":
            noise = {n: torch.rand(w.shape, generator=draw) for n, w in prunable_weights(model).items()}
            return select_masks(noise, sparsity=sparsity, allocation=erk)
        found = self._own("seed", sparsity, self._next(seed) if target == "seed" else seed)
        if target == "depth":
            moved = stretched(found, model, order="cycle" if task.arm == "cycle" else "repeat")
        else:
            moved = transferred(found, model)
        return shuffle_masks(moved, generator=draw) if task.arm == "shuffled" else moved

    def _own(self, target: str, sparsity: float, seed: int) -> Masks:
        """The largest magnitudes of the target's dense run."""
        model = fresh(self._config(target, self.lab.probe.lrs[0], seed), self._data(target))
        put(model, self.lab.state(DENSE[target], seed))
        scores = {name: magnitude(weight) for name, weight in prunable_weights(model).items()}
        return select_masks(scores, sparsity=sparsity, allocation=global_ranking)

    def _next(self, seed: int) -> int:
        seeds = self.lab.probe.seeds
        return seeds[(seeds.index(seed) + 1) % len(seeds)]

    def _config(self, target: str, lr: float, seed: int) -> RunConfig:
        changes: dict[str, dict[str, Any]] = {"model": {"layers": self.options.layers}} if target == "depth" else {}
        return self.lab.config(lr=lr, seed=seed, changes=changes)

    def _data(self, target: str) -> Data:
        return self._other if target == "corpus" else self.lab.data

    @cached_property
    def _other(self) -> Data:
        config = self.lab.config(lr=self.lab.probe.lrs[0], seed=self.lab.probe.seeds[0]).data
        if config.corpus == self.options.other:
            raise ValueError(f"options.other must be another corpus than data.corpus, got {self.options.other!r}")
        return load_data(replace(config, corpus=self.options.other or torch_headers()))


def sparse_tasks(sparsity: float) -> tuple[Task, ...]:
    """The arms of one sparsity, for all three targets."""
    return tuple(
        Task(arm, label, f"{target} {sparsity:.0%}", sparsity)
        for target in TARGETS
        for arm, label in (STRETCHED if target == "depth" else ARMS).items()
    )


def target_of(task: Task) -> str:
    """seed, corpus or depth."""
    return task.group.split()[0]
