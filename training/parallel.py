"""What a training run asks of the processes it runs in, and the answer of a single one."""

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from training.checkpoint import Write, load_checkpoint, save_checkpoint
from training.data import Batch
from training.distributed.checkpoint import is_sharded, load_sharded
from training.finite import NOT_SEEN
from training.optim import Optimizers, clip, gradient_norm
from training.step import SideLosses, StepOutput, forward
from training.tokenizer import Tokenizer
from training.unsent import return_unsent
from transformer import Transformer


@runtime_checkable
class Parallel(Protocol):
    """One process among ``ranks`` that train one model; rank 0 writes the metrics.

    Whatever says "all" here is called by every process at the same point of the run.
    """

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        ...

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a batch are split: ``ranks``, unless some of them have the same rows."""
        ...

    def place(self, model: Transformer) -> None:
        """Give the model, which is on its device, the layout in which it is trained, in place. All, once."""
        ...

    def rows(self, batch: Batch) -> Batch:
        """This process's sequences of the whole batch."""
        ...

    def forward(self, model: Transformer, batch: Batch, side: SideLosses) -> StepOutput:
        """:func:`training.step.forward` through whatever ``place`` put around the model. All."""
        ...

    def micro_batch(self, *, last: bool, diagnose: bool = False) -> AbstractContextManager[object]:
        """Around the forward and backward pass of a micro-batch. Gradients are complete after the last one. All.

        diagnose: to find where numbers went wrong; gradients stay each process's own, where that is possible.
        """
        ...

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """L2 norm of the whole model's gradient, the same on every process. All."""
        ...

    def clip(self, parameters: Iterable[Tensor], norm: Tensor, *, limit: float) -> None:
        """Scale the gradients in place by min(1, limit/norm), but for what was clipped before compression. All."""
        ...

    def reduced(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of a step over all processes: ``loads`` and ``tokens_per_s`` summed, measurements averaged. All."""
        ...

    def highest(self, value: int) -> int:
        """The largest of the processes' values. All."""
        ...

    def gathered(self, text: str) -> list[str]:
        """The texts of every process by rank. All."""
        ...

    def refused(self, error: FloatingPointError) -> Exception | None:
        """What to raise where this process alone met numbers that are not finite; None: look for their origin."""
        ...

    def rest(self, model: Transformer) -> None:
        """Forward passes outside a step are over: free what they gathered. All."""
        ...

    def save(
        self, root: Path, *, step: int, model: Transformer, optimizers: Optimizers, tokenizer: Tokenizer,
        state: Mapping[str, Any], keep: int, write: Write,
    ) -> Path:  # fmt: skip
        """Write a checkpoint as :func:`training.checkpoint.save_checkpoint`. All."""
        ...

    def load(self, folder: Path, *, model: Transformer, optimizers: Optimizers) -> dict[str, Any]:
        """The inverse of :meth:`save`, as :func:`training.checkpoint.load_checkpoint`. All."""
        ...

    def finish(self, folder: Path, model: Transformer) -> None:
        """The run ends with the checkpoint ``folder``: it is complete, and a folder that from_pretrained reads. All."""
        ...

    def describe(self) -> str:
        """The layout, in a line that ends with a newline; nothing for one process."""
        ...


class Alone:
    """A run of one process."""

    rank, ranks, parts = 0, 1, 1

    def place(self, model: Transformer) -> None:
        """Nothing to do."""

    def rows(self, batch: Batch) -> Batch:
        """All of them."""
        return batch

    def forward(self, model: Transformer, batch: Batch, side: SideLosses) -> StepOutput:
        """The model's own."""
        return forward(model, batch, side=side)

    def micro_batch(self, *, last: bool, diagnose: bool = False) -> AbstractContextManager[object]:
        """Nothing to do."""
        return nullcontext()

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """:func:`training.optim.gradient_norm`."""
        return gradient_norm(parameters)

    def clip(self, parameters: Iterable[Tensor], norm: Tensor, *, limit: float) -> None:
        """:func:`training.optim.clip`."""
        clip(parameters, norm, limit=limit)

    def reduced(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The line as it is."""
        return dict(line)

    def highest(self, value: int) -> int:
        """The value."""
        return value

    def gathered(self, text: str) -> list[str]:
        """The text alone."""
        return [text]

    def refused(self, error: FloatingPointError) -> Exception | None:
        """None."""
        return None

    def rest(self, model: Transformer) -> None:
        """Nothing to do."""

    def save(
        self, root: Path, *, step: int, model: Transformer, optimizers: Optimizers, tokenizer: Tokenizer,
        state: Mapping[str, Any], keep: int, write: Write,
    ) -> Path:  # fmt: skip
        """:func:`training.checkpoint.save_checkpoint`."""
        return save_checkpoint(
            root, step=step, model=model, optimizers=optimizers, tokenizer=tokenizer, state=state, keep=keep,
            write=write,
        )  # fmt: skip

    def load(self, folder: Path, *, model: Transformer, optimizers: Optimizers) -> dict[str, Any]:
        """:func:`training.checkpoint.load_checkpoint`, or what many processes wrote."""
        if is_sharded(folder):
            state = load_sharded(
                folder, model=model, optimizers=optimizers, layouts={}, rank=0, tell=lambda text: [text]
            )
            return_unsent(model, state.get("compressor"), ranks=1)
            return state
        return load_checkpoint(folder, model=model, optimizers=optimizers)

    def finish(self, folder: Path, model: Transformer) -> None:
        """Nothing to do: every checkpoint is one."""

    def describe(self) -> str:
        """Nothing."""
        return ""


def blame(parallel: Parallel, where: str, *, finite: bool) -> str:
    """Where numbers went wrong, with the ranks that saw it: those whose own loss did, if any. All processes call it.

    where: what this process found; finite: whether its loss is.
    """
    if parallel.ranks == 1:
        return where
    told = [json.loads(text) for text in parallel.gathered(json.dumps([finite, where]))]
    seen = [rank for rank, (_, found) in enumerate(told) if found != NOT_SEEN]
    ranks = [rank for rank, (sound, _) in enumerate(told) if not sound] or seen
    return "; ".join(f"rank {rank}: {told[rank][1]}" for rank in ranks) or where
