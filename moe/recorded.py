"""Samples of what modules of a model see while it runs over calibration batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Run = Callable[[nn.Module, Any], object]


def recorded_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    rows: int = 1024,
    generator: torch.Generator | None = None,
    run: Run | None = None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """For each of the modules, by name, ``rows`` of its input rows (all, if there are fewer), drawn uniformly.

    run(model, batch) is the forward pass; by default model(**batch) for mappings, else model(batch). The rows of tokens
    that the batch's "attention_mask" marks 0 are left out. generator: a CPU generator for the draw. A model that
    gathers rows (Mixture-of-Depths) runs sequence by sequence: see :func:`single_sequences`.
    Raises: ValueError for rows < 1, or batches that give a module no rows.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    kept = {name: _Reservoir(rows, generator) for name in modules}
    mask: list[Tensor | None] = [None]
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, into=kept[name]: into.add(inputs[0], mask[0]))
        for name, module in modules.items()
    ]
    run_observed(model, batches, handles, mask, run=run)
    empty = [name for name, reservoir in kept.items() if reservoir.sample is None]
    if empty:
        raise ValueError(f"batches must give every layer rows, got none for {', '.join(empty)}")
    return {name: reservoir.sample for name, reservoir in kept.items() if reservoir.sample is not None}


def run_observed(
    model: nn.Module,
    batches: Iterable[Any],
    handles: Iterable[RemovableHandle],
    mask: list[Tensor | None],
    *,
    run: Run | None = None,
) -> None:
    """The model over all batches, evaluating, ``mask[0]`` being that of the batch at hand; then the hooks go away.

    Of a model that gathers rows, the sequences of the batches one by one.
    """
    apart = any(getattr(module, "gathers_rows", False) for module in model.modules())
    try:
        with evaluating(model):
            for batch in (one for whole in batches for one in (single_sequences(whole) if apart else [whole])):
                mask[0] = _mask_of(batch)
                (run or _run_batch)(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients; every module's mode is put back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, before in training.items():
            module.training = before


def _mask_of(batch: Any) -> Tensor | None:
    """The batch's "attention_mask", if it has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def single_sequences(batch: Any) -> Iterator[Any]:
    """The samples of a batch, each a batch of one, less those that its "attention_mask" marks as padding alone.

    Where a block is given gathered rows, shorter sequences are filled up and a mask of the batch's shape is not one of
    the rows' places; one sequence alone has no filling, and its mask fits only where every token is real and passes.
    B is the size of "input_ids" or of the first tensor; tensors [B, ...] in mappings, tuples and lists are cut, all
    else goes with each sample.
    """
    count = _sample_count(batch)
    for index in range(count or 0):
        one = _sample(batch, index, count)
        mask = _mask_of(one)
        if not isinstance(mask, Tensor) or mask.any():
            yield one
    if count is None:
        yield batch


def _sample_count(batch: Any) -> int | None:
    """None for a batch without tensors."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        parts = [batch["input_ids"]] if "input_ids" in batch else list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, tuple | list) else []
    return next((count for part in parts if (count := _sample_count(part)) is not None), None)


def _sample(batch: Any, index: int, count: int | None) -> Any:
    if isinstance(batch, Tensor):
        return batch[index : index + 1] if batch.shape[:1] == (count,) else batch
    if isinstance(batch, Mapping):
        return {key: _sample(value, index, count) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts: Sequence[Any] = [_sample(part, index, count) for part in batch]
        return batch._make(parts) if hasattr(batch, "_make") else type(batch)(parts)
    return batch


def _run_batch(model: nn.Module, batch: Any) -> object:
    """model(**batch) for mappings, else model(batch)."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def real_rows(x: Float[Tensor, "*batch D"], mask: Tensor | None) -> Float[Tensor, "T D"]:
    """The rows of x, less those that a mask of their shape marks 0."""
    fits = mask is not None and mask.shape == x.shape[:-1]
    return x[mask.bool()] if mask is not None and fits else x.reshape(-1, x.shape[-1])


class _Reservoir:
    """A uniform sample of rows: those with the smallest of random keys."""

    def __init__(self, rows: int, generator: torch.Generator | None) -> None:
        self.rows, self.generator = rows, generator
        self.sample: Tensor | None = None
        self.keys = torch.empty(0)

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        new = real_rows(x, mask)
        if new.shape[0] == 0:
            return
        keys = torch.cat([self.keys, torch.rand(new.shape[0], generator=self.generator)])
        pool = new if self.sample is None else torch.cat([self.sample, new])
        best = keys.argsort()[: self.rows]
        self.keys, self.sample = keys[best], pool[best.to(pool.device)].detach()
