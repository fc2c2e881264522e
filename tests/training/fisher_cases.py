"""Runs under a Fisher penalty and a low-Fisher-first order that one process and two must train alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pruning import Masks, prunable_weights
from pruning.diagnostics import fisher_penalty
from pruning.learned import VariationalDropout
from pruning.saliency.products import twice_differentiable
from tests.training.distributed_cases import STEPS, Layout, make_trainer
from tests.training.models import small_data
from training.config import RunConfig, from_dict
from training.data import Batches
from training.fisher_control import PENALTY_SEED, in_order, make_penalties
from training.parallel import Parallel
from training.sparsity import make_sparsifiers
from training.trainer import Trainer
from transformer import Transformer

BATCH, STRENGTH, EVERY = 24, 0.05, 2
LOW = {"method": "static", "sparsity": 0.5, "curriculum": "low_fisher", "curriculum_pool": 12, "curriculum_begin": 1,
       "curriculum_end": 4, "curriculum_start": 0.25}  # fmt: skip
PENALISED = {**LOW, "fisher_penalty": STRENGTH, "fisher_every": EVERY}

NOISY = {"method": "variational", "strength": 300.0, "gate_lr": 100.0, "fisher_penalty": STRENGTH,
         "fisher_every": EVERY}  # fmt: skip


class Case(NamedTuple):
    """micro: micro-batches of each rank; alone: of the one process; parts: runs of rows that ranks take."""

    layout: Layout
    words: dict[str, Any]
    micro: int = 1
    alone: int = 1
    parts: int = 2


CASES = {
    # one process takes micro-batches of the rows that a rank does
    "dense": Case(Layout("dense"), PENALISED, micro=2, alone=4),
    "experts": Case(Layout("moe"), PENALISED),
    "shards": Case(Layout("dense", shard="fsdp"), PENALISED, micro=2, alone=4),
    "heads": Case(Layout("heads", shard="fsdp", heads=2), PENALISED, parts=1),
    # noise of the rows in the penalty's passes, whose levels it moves too
    "noise": Case(Layout("dense"), NOISY),
    # an order that looks at nothing
    "random": Case(Layout("moe", 2, "fsdp"), {**PENALISED, "curriculum": "random"}),
}


class InParts:
    """What the penalties of all ranks add, one after the other: a loop over their rows of the penalty's batch."""

    def __init__(self, model: Transformer, *, rows: int, parts: int, others: list[Any]) -> None:
        self.drawers = [one for one in others if isinstance(one, VariationalDropout)]
        self.model, self.parts, self.step, self.draw = model, parts, 0, torch.Generator().manual_seed(0)
        self.batches = Batches(small_data().train, batch=rows, length=16, seed=PENALTY_SEED)

    def contribute(self) -> None:
        if self.step % EVERY:
            return
        names = list(prunable_weights(self.model))
        masks = Masks({name: self.model.get_parameter(name).detach() != 0 for name in names})
        seeds = torch.randint(2**62, (self.parts,), generator=self.draw).tolist()
        self.model.eval()
        with twice_differentiable(self.model):
            batch = self.batches.next().keyed(seed=PENALTY_SEED, step=self.step)
            size = len(batch.inputs) // self.parts
            for part, seed in enumerate(seeds):
                draw, rows = torch.Generator().manual_seed(seed), batch.rows(part * size, (part + 1) * size)
                for drawer in self.drawers:
                    drawer.draw_from(rows.noise)
                value = fisher_penalty(self.model, rows.inputs, weights=names, masks=masks, generator=draw)
                (STRENGTH / self.parts * value).backward()
        self.model.train()

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        return True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.batches.load_state_dict(state["data"])
        self.draw.set_state(state["draw"])


def trainer_of(case: Case, out: Path, *, parallel: Parallel | None = None, **settings: Any) -> Trainer:
    """A short run of the words; in one process the penalty is :class:`InParts`."""
    micro = case.alone if parallel is None else case.micro
    train = {"steps": STEPS, "batch": BATCH, "accumulation": case.micro}
    config = from_dict(RunConfig, {"data": {"length": 16}, "train": train, "sparsify": case.words}, where="test")

    def sparsifiers(model: Transformer) -> list[Any]:
        held = make_sparsifiers(config.sparsify, model, steps=STEPS)
        if parallel is None:
            parts = InParts(model, rows=BATCH // case.micro, parts=case.parts, others=held)
            return [*held, *[parts] * ("fisher_penalty" in case.words)]
        return [*held, *make_penalties(config, model, small_data(), parallel=parallel, others=held)]

    trainer = make_trainer(case.layout.run, out, parallel=parallel, sparsifiers=sparsifiers, accumulation=micro,
                           optim={"eps": 1e-3}, **settings)  # fmt: skip
    trainer.batches = in_order(config, trainer)
    return trainer


def keep_rows(trainer: Trainer) -> list[Tensor]:
    """Will hold the rows that each pass of training reads here, in order."""
    found: list[Tensor] = []
    run_forward = trainer.parallel.forward

    def forward(model: Any, batch: Any, side: Any) -> Any:
        found.append(batch.inputs)
        return run_forward(model, batch, side)

    trainer.parallel.forward = forward  # type: ignore[method-assign]
    return found
