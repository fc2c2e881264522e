"""Sums over the rows that each matrix is multiplied with, taken by hooks while the model runs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.calibrated.targets import Inputs, hidden_rows, routed_rows


class Moments:
    """For each matrix, by label: Σ xᵀx [in, in] over its input rows (diagonal=True: Σ x² [in]), and their number.

    dtype: of the sums. real: False marks padding rows, for inputs with these leading dimensions; set for each batch."""

    def __init__(self, *, diagonal: bool, dtype: torch.dtype = torch.float32) -> None:
        self.diagonal, self.dtype = diagonal, dtype
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.real: Bool[Tensor, "B L"] | None = None
        self._last: tuple[Tensor, Tensor, int] | None = None

    def add(self, label: str, x: Float[Tensor, "... width"]) -> None:
        """Count the rows of x for this matrix. Matrices that get the very same tensor in turn share one product."""
        if self._last is None or self._last[0] is not x:
            # products that autocast rounds to half precision leave a Hessian that is no longer positive definite
            with torch.autocast(x.device.type, enabled=False):
                rows = self._rows(x)
                product = rows.square().sum(0) if self.diagonal else rows.mT @ rows
            self._last = (x, product, len(rows))
        _, product, count = self._last
        self.sums[label] = self.sums[label] + product if label in self.sums else product
        self.rows[label] = self.rows.get(label, 0) + count

    def forget(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _rows(self, x: Tensor) -> Float[Tensor, "rows width"]:
        x = x.detach()
        if self.real is not None and x.shape[:-1] == self.real.shape:
            x = x[self.real]
        return x.reshape(-1, x.shape[-1]).to(self.dtype)


@contextmanager
def recording(inputs: Sequence[Inputs], moments: Moments) -> Iterator[None]:
    """While inside, every call of these modules adds its rows to `moments`."""
    with ExitStack() as stack:
        for use in inputs:
            hook = _plain if "weight" in use.weights else _keys if "keys" in use.weights else _routed
            stack.callback(use.module.register_forward_pre_hook(partial(hook, use, moments), with_kwargs=True).remove)
            if hasattr(use.module, "forward_one"):
                stack.enter_context(_calls_of_one(use, moments))
        yield
    moments.forget()


def _plain(use: Inputs, moments: Moments, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    moments.add(use.weights["weight"][0].label, args[0] if args else kwargs["input"])


@torch.no_grad()
def _keys(use: Inputs, moments: Moments, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = module.matrix_inputs(args[0] if args else kwargs["x"])
    for matrix in use.weights["keys"]:
        moments.add(matrix.label, found[matrix.place])


@torch.no_grad()
def _routed(use: Inputs, moments: Moments, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for expert, rows in enumerate(routed_rows(module, (*args, *kwargs.values()))):
        _add_expert(use, moments, expert, rows)


@torch.no_grad()
def _add_expert(use: Inputs, moments: Moments, expert: int, rows: Float[Tensor, "rows width"]) -> None:
    if not len(rows):
        return
    if "up" in use.weights:
        moments.add(use.weights["up"][expert].label, rows)
    if "down" in use.weights:
        moments.add(use.weights["down"][expert].label, hidden_rows(use.module, expert, rows))


@contextmanager
def _calls_of_one(use: Inputs, moments: Moments) -> Iterator[None]:
    """A shared expert is called by `forward_one`, past the hooks of nn.Module."""
    original = use.module.forward_one

    def counted(expert: int, rows: Tensor) -> Tensor:
        _add_expert(use, moments, expert, rows)
        return original(expert, rows)

    vars(use.module)["forward_one"] = counted
    try:
        yield
    finally:
        del vars(use.module)["forward_one"]
