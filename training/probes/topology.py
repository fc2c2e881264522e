"""Layer-wise ratios against topology, and how early the ranking of weights is what it will be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pruning import Masks, erk, global_ranking, magnitude, prunable_weights, select_masks, shuffle_masks, uniform
from pruning.allocation import Allocation
from pruning.diagnostics import magnitudes, ranking_stability
from training.config import from_dict
from training.probes.lab import State, fit, fresh, make_trainer, put, state_of
from training.probes.runner import Lab
from training.probes.spec import Task
from training.records import Line

DENSE = Task("dense", "Dense", "dense")
RATIOS: dict[str, Allocation] = {"uniform": uniform, "erk": erk, "global": global_ranking}
RATIO_LABELS = {"uniform": "Uniform ratios", "erk": "ERK ratios", "global": "Magnitude's own ratios"}
TOPOLOGIES = {"random": "random places", "magnitude": "largest weights"}
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Options:
    """sparsities: of the masks. snapshot_every: steps between rankings. samples: weights of a kind that are ranked.
    ranking_model: changes to the ``[model]`` table for the rankings alone: layers of experts among dense ones, at the
    same mean depth, so that a kind is no other word for a place."""

    sparsities: tuple[float, ...]
    snapshot_every: int
    samples: int
    ranking_model: dict


class Topology:
    """The experiment (see :class:`training.probes.runner.Experiment`).

    A dense run ranks the weights. Every mask then trains from the dense run's initial weights: three ways to share the
    weights among matrices, each with the places of the largest trained weights and, in the same numbers, with places by
    chance."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.options: Options = from_dict(Options, lab.probe.options, where=f"options of {lab.probe.name!r}")

    def stages(self) -> tuple[tuple[Task, ...], ...]:
        """Dense, then all masks, and the runs whose rankings are followed."""
        masked = tuple(task for sparsity in self.options.sparsities for task in sparse_tasks(sparsity))
        return (DENSE,), masked + ranking_tasks()

    def train(self, task: Task, lr: float, seed: int) -> tuple[Line, State]:
        """One run; a ranking run keeps a snapshot of the magnitudes every few steps."""
        if task.group == "ranking":
            return self._ranking(task, lr, seed)
        masks = None if task.arm == "dense" else self.masks(task, seed)
        config = self.lab.config(lr=lr, seed=seed)
        model = fresh(config, self.lab.data)
        result = fit(make_trainer(model, config, self.lab.data, masks=masks))
        if masks is not None:
            result |= {"mask_sparsity": masks.sparsity, "densities": densities(masks)}
        return result, state_of(model)

    def extras(self) -> Iterator[tuple[str, Callable[[], Line]]]:
        """None."""
        return iter(())

    def masks(self, task: Task, seed: int) -> Masks:
        """Ratios by their allocation over the trained dense magnitudes; places by them, or shuffled in each matrix."""
        ratio, topology = task.arm.split()
        model = fresh(self.lab.config(lr=self.lab.probe.lrs[0], seed=seed), self.lab.data)
        put(model, self.lab.state(DENSE, seed))
        scores = {name: magnitude(weight) for name, weight in prunable_weights(model).items()}
        masks = select_masks(scores, sparsity=task.sparsity, allocation=RATIOS[ratio])
        if topology == "magnitude":
            return masks
        return shuffle_masks(masks, generator=torch.Generator().manual_seed(seed))

    def _ranking(self, task: Task, lr: float, seed: int) -> tuple[Line, State]:
        changes: dict[str, dict[str, Any]] = {
            "model": self.options.ranking_model, "optim": {"schedule": task.arm},
        }  # fmt: skip
        config = self.lab.config(lr=lr, seed=seed, changes=changes)
        model = fresh(config, self.lab.data)
        snapshots: dict[int, dict[str, Tensor]] = {}

        def watch(step: int) -> None:
            if step % self.options.snapshot_every == 0:
                snapshots[step] = magnitudes(prunable_weights(model))

        result = fit(make_trainer(model, config, self.lab.data), watch=watch)
        found = ranking_stability(
            snapshots, samples=self.options.samples, generator=torch.Generator().manual_seed(seed)
        )
        rankings = {"steps": list(found.steps), "kendall": found.kendall, "spearman": found.spearman}
        return result | {"ranking": rankings}, state_of(model)


def sparse_tasks(sparsity: float) -> tuple[Task, ...]:
    """The six masks of one sparsity."""
    return tuple(
        Task(f"{ratio} {topology}", f"{RATIO_LABELS[ratio]}, {words}", f"{sparsity:.0%}", sparsity)
        for ratio in RATIOS
        for topology, words in TOPOLOGIES.items()
    )


def ranking_tasks() -> tuple[Task, ...]:
    """The runs whose rankings are followed, under each schedule of rates, at the dense run's best rate."""
    return tuple(Task(schedule, f"{schedule} rate", "ranking", rate_of=DENSE) for schedule in SCHEDULES)


def densities(masks: Masks) -> dict[str, float]:
    """Share of the weights that each matrix keeps."""
    return {name: float(mask.float().mean()) for name, mask in masks.kept.items()}
