"""Two ways to keep the Fisher trace low while a model trains: low samples first, and a penalty."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pruning import Masks, prunable_weights
from pruning.agreement import averaged, follow_first
from pruning.diagnostics import FisherCurriculum, fisher_penalty, low_fisher_first
from pruning.saliency.products import twice_differentiable
from pruning.sharding import as_parts_of, as_wholes, own_part, sharded_as, spread_layouts
from training.config import RunConfig
from training.data import Batch, Batches, Data, Stream
from training.distributed.export import in_parts, whole_copy
from training.finite import NonFiniteError
from training.moments import Reader, Sparsifier, draw_from, evaluating, parametrised
from training.parallel import Alone, Parallel
from training.sparsify_config import curriculum_end
from training.trainer import Trainer
from transformer import Transformer

# what is drawn for the penalty and for the pool is not what the run trains on at the same time
PENALTY_SEED, POOL_SEED = 1000, 2000


class Admitted:
    """Batches of a stream; between two steps only from samples of a pool, lowest Fisher trace first.

    The pool is ranked once, with the model as it is at step ``begin``; the lowest share ``start`` of it is open then,
    and more each step, all of it just before ``end``. lowest=False opens it in a random order: the control, with as
    few samples and as many repetitions. weights, masks: of which the trace is; masks None: those that are not 0.
    within: a context for the ranking (:func:`training.moments.parametrised`). Ranks have the same order, by rank 0's
    traces, and draw the same batches, of which each then takes its rows. Where they hold a part of the weights, each
    gathers all for the ranking.
    Raises: ValueError unless 0 ≤ begin < end; as :meth:`FisherCurriculum.admitted`."""

    def __init__(
        self,
        stream: Stream,
        model: Transformer,
        pool: Int[Tensor, "n length"],
        *,
        begin: int,
        end: int,
        start: float,
        lowest: bool,
        weights: list[str],
        masks: Masks | None = None,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        seed: int,
    ) -> None:
        if not 0 <= begin < end:
            raise ValueError(f"begin must be in [0, end={end}), got {begin}")
        self.stream, self.model, self.pool, self.weights, self.masks = stream, model, pool, weights, masks
        self.begin, self.end, self.start, self.lowest, self.within = begin, end, start, lowest, within
        self._draw = torch.Generator().manual_seed(seed)
        self._order: FisherCurriculum | None = None
        self._step = 0

    def next(self) -> Batch:
        """The next batch: from the stream, or drawn from what the pool has open."""
        step, self._step = self._step, self._step + 1
        whole = self.stream.next()
        if not self.begin <= step < self.end:
            return whole
        if self._order is None:
            self._order = self._ranked()
        # the targets are the window's own tokens one later
        open_now = self._order.admitted(step - self.begin, steps=self.end - self.begin, start=self.start)
        chosen = open_now[torch.randint(len(open_now), (len(whole.inputs),), generator=self._draw)]
        rows = self.pool[chosen]
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, the step, the generator and the order of the pool once there is one."""
        found = {"step": self._step, "draw": self._draw.get_state()}
        if self._order is not None:
            found |= {"order": self._order.order, "traces": self._order.traces}
        return {**self.stream.state_dict(), "curriculum": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``. Raises: ValueError for a state without a curriculum; as the stream."""
        if "curriculum" not in state:
            raise ValueError("the checkpoint was trained without a curriculum, this run has sparsify.curriculum:"
                             " resume without it, or start a new --out")  # fmt: skip
        self.stream.load_state_dict(state)
        found = state["curriculum"]
        self._step = found["step"]
        self._draw.set_state(found["draw"].cpu())
        self._order = FisherCurriculum(found["order"], found["traces"]) if "order" in found else None

    def _ranked(self) -> FisherCurriculum:
        count = len(self.pool)
        if not self.lowest:
            return FisherCurriculum(torch.randperm(count, generator=self._draw), torch.zeros(count, dtype=torch.double))
        pool = self.pool[:, : self.model.config.max_length].to(next(self.model.parameters()).device)
        with self.within():
            model = _whole(self.model)
            masks = present(model, self.weights) if self.masks is None else self.masks
            found = low_fisher_first(model, [pool], weights=self.weights, masks=masks, generator=self._draw)
        # what ranks compute alike may differ in the last digits, and so may an order
        follow_first([found.traces])
        return FisherCurriculum(found.traces.argsort(stable=True), found.traces)


class Penalised:
    """λ · :func:`pruning.diagnostics.fisher_penalty` in every ``every``-th step, on batches of a stream of its own.

    Of the weights that the masks keep, None: that are not 0. The passes are those of evaluation: no dropout, nothing
    that routers count. A :class:`training.moments.Contributor`.
    parallel: ranks that each penalise their own rows of the batch, with labels of their own draw: the mean over R of
    them is added. They estimate the same trace as one process on the whole batch, in R parts. FSDP2's gradients cannot
    be differentiated again, as no graph joins a shard with the weight that it gathers: where ranks hold a part of the
    weights, each gathers all of them for these passes, and has a whole gradient. others: the sparsifiers of the run, of
    which some draw for the rows of a pass, and have parameters that it reads.
    Raises: ValueError unless strength > 0 and every ≥ 1."""

    def __init__(
        self,
        model: Transformer,
        batches: Stream,
        *,
        strength: float,
        every: int,
        weights: list[str],
        masks: Masks | None = None,
        seed: int,
        parallel: Parallel | None = None,
        others: Sequence[Sparsifier] = (),
    ) -> None:
        if not strength > 0:
            raise ValueError(f"strength must be > 0, got {strength}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.model, self.batches, self.strength, self.every = model, batches, strength, every
        self.weights, self.masks = weights, masks
        self.parallel: Parallel = parallel or Alone()
        self.seed, self.others = seed, others
        self._draw = torch.Generator().manual_seed(seed)
        self._step = 0

    def contribute(self) -> None:
        """Add the penalty's gradient, if it is time. Ranks call it together, their batch's gradients reduced.

        Raises: NonFiniteError, on all of them, where it is not finite on one; ValueError for a model that is
        differentiable once, and for a batch that they do not divide."""
        if self._step % self.every:
            return
        batch = self.batches.next().keyed(seed=self.seed + PENALTY_SEED, step=self._step)
        batch = self.parallel.rows(batch).to(next(self.model.parameters()).device)
        model = _whole(self.model)
        masks = present(model, self.weights) if self.masks is None else self.masks
        draw_from(self.others, batch.noise)
        with evaluating(model), twice_differentiable(model):
            value = fisher_penalty(model, batch.inputs, weights=self.weights, masks=masks, generator=self._generator())
            self._require_finite(value.detach())
            self._add_gradients(self.strength * value, model)
        draw_from(self.others, None)

    def before_step(self, optimizer: torch.optim.Optimizer) -> bool:
        """True: every step is taken."""
        return True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the step."""
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """The step, the position in the text and the generator."""
        return {"step": self._step, "data": self.batches.state_dict(), "draw": self._draw.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        self._step = state["step"]
        self.batches.load_state_dict(state["data"])
        self._draw.set_state(state["draw"].cpu())

    def _generator(self) -> torch.Generator:
        """Of the labels of this process's rows: the run's own, or one of as many as there are parts, which it seeds."""
        if self.parallel.ranks == 1:
            return self._draw
        parts = self.parallel.parts
        seeds = torch.randint(2**62, (parts,), generator=self._draw)
        return torch.Generator().manual_seed(int(seeds[self.parallel.rank * parts // self.parallel.ranks]))

    def _require_finite(self, value: Float[Tensor, ""]) -> None:
        ranks = self.parallel.ranks
        values = torch.zeros(ranks, dtype=torch.double, device=value.device)
        values[self.parallel.rank] = value
        if ranks > 1:
            values = averaged({"": values})[""] * ranks
        for rank, found in enumerate(values.tolist()):
            if not math.isfinite(found):
                where = f" on rank {rank}" if ranks > 1 else ""
                raise NonFiniteError(
                    f"step {self._step + 1}: the Fisher penalty{where} is {found}; nothing was updated:"
                    " lower sparsify.fisher_penalty or optim.lr"
                )

    def _add_gradients(self, value: Float[Tensor, ""], model: Transformer) -> None:
        """To the parameters of this process, of which ``model`` has the whole ones."""
        if self.parallel.ranks == 1:
            value.backward()
            return
        own = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        wholes = [model.get_parameter(name) for name in own]
        read = [parameter for one in self.others if isinstance(one, Reader) for parameter in one.pass_parameters()]
        # accumulates nothing, so that no hook of DistributedDataParallel runs
        found = torch.autograd.grad(value, [*wholes, *read], allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(read, found[len(wholes) :], strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        likes = as_wholes({name: parameter.detach() for name, parameter in own.items()}, spread_layouts(self.model))
        for (name, parameter), gradient in zip(own.items(), found, strict=False):
            part = own_part(sharded_as(averaged({name: gradient})[name], likes[name]))
            part = as_parts_of({name: part}, own)[name]
            parameter.grad = part if parameter.grad is None else parameter.grad + part


def _whole(model: Transformer) -> Transformer:
    return whole_copy(model) if in_parts(model) else model


def make_penalties(
    config: RunConfig,
    model: Transformer,
    data: Data,
    *,
    parallel: Parallel | None = None,
    others: Sequence[Sparsifier] = (),
) -> list[Penalised]:
    """The Fisher penalty of a run's [sparsify] section, none if it asks for none; estimated on a micro-batch, that of
    all ranks together."""
    sparsify, train = config.sparsify, config.train
    if not sparsify.fisher_penalty:
        return []
    stream = Batches(
        data.train, batch=train.batch // train.accumulation, length=config.data.length, seed=config.seed + PENALTY_SEED
    )
    return [Penalised(model, stream, strength=sparsify.fisher_penalty, every=sparsify.fisher_every,
                      weights=trained(model), seed=config.seed, parallel=parallel, others=others)]  # fmt: skip


def in_order(config: RunConfig, trainer: Trainer) -> Stream:
    """The trainer's batches in the order that a [sparsify] section asks for; as they are if it asks for none.

    Raises: ValueError for a pool of more sequences than the text has."""
    sparsify, length = config.sparsify, config.data.length
    if sparsify.curriculum == "none":
        return trainer.batches
    text, count = trainer.data.train, sparsify.curriculum_pool
    most = (len(text) - 1) // length
    if count > most:
        raise ValueError(f"sparsify.curriculum_pool must be at most {most}, the sequences of data.length={length} in"
                         f" the text, got {count}")  # fmt: skip
    drawn = Batches(text, batch=count, length=length, seed=config.seed + POOL_SEED).next()
    return Admitted(
        trainer.batches,
        trainer.model,
        torch.cat([drawn.inputs, drawn.targets[:, -1:]], dim=1),
        begin=sparsify.curriculum_begin,
        end=curriculum_end(sparsify, config.train.steps),
        start=sparsify.curriculum_start,
        lowest=sparsify.curriculum == "low_fisher",
        weights=trained(trainer.model),
        within=lambda: parametrised(trainer.sparsifiers),
        seed=config.seed,
    )


def trained(model: Transformer) -> list[str]:
    """Names of the prunable weights that train."""
    return [name for name, weight in prunable_weights(model).items() if weight.requires_grad]


def present(model: Transformer, names: list[str]) -> Masks:
    """The weights of these names that are not 0."""
    return Masks({name: model.get_parameter(name).detach() != 0 for name in names})
