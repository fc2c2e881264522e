"""Weights between neurons that rise and fall together."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pruning.batches import Batch, Progress, evaluating, row_batches
from pruning.calibrated.blocks import run_model
from pruning.calibrated.targets import Inputs, find_inputs, hidden_rows, routed_rows
from pruning.saliency.products import replaced_method

# label of a matrix → its input rows [rows, in], whenever it is multiplied
Seen = Callable[[str, Tensor], None]


class _Covariance:
    """Σx, Σxxᵀ and the number of rows of each matrix' input, float64."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.real: Bool[Tensor, "B L"] | None = None

    def add(self, label: str, x: Float[Tensor, "... width"]) -> None:
        """Count the rows of x for this matrix; padding left out where x still has the batch's shape."""
        if self.real is not None and x.shape[:-1] == self.real.shape:
            x = x[self.real]
        rows = x.reshape(-1, x.shape[-1]).double()
        self.sums[label] = self.sums.get(label, 0) + rows.sum(0)
        self.products[label] = self.products.get(label, 0) + rows.mT @ rows
        self.rows[label] = self.rows.get(label, 0) + len(rows)

    def of(self, label: str) -> Float[Tensor, "in in"]:
        """The covariance matrix of the inputs."""
        mean = self.sums[label] / self.rows[label]
        return self.products[label] / self.rows[label] - torch.outer(mean, mean)


@torch.no_grad()
def correlation_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch], *, progress: Progress = None
) -> dict[str, Float[Tensor, "..."]]:
    """abs(corr(x_j, y_i)) for each weight w_ij of y = Wx: between the neurons that it connects, over all tokens.

    Sun, Wang & Tang 2016 (arXiv:1512.01891): connections between weakly correlated neurons go first. y before its bias
    and activation, so that with C the covariance of the inputs corr = (CWᵀ)_ji / √(C_jj · (WCWᵀ)_ii); 0 where a neuron
    is constant. Float64; memory holds in² numbers for each matrix. Padding under ``attention_mask`` does not count.
    Raises: ValueError without batches, for weights of unknown modules, and for a matrix that no row reaches."""
    inputs, seen = find_inputs(model, weights), _Covariance()
    with evaluating(model), _watching(inputs, seen.add):
        for batch in row_batches(model, batches, progress=progress):
            mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
            seen.real = None if mask is None else mask.bool()
            run_model(model, batch)
    scores = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for matrix in (one for use in inputs for part in use.weights.values() for one in part):
        if not seen.rows.get(matrix.label):
            raise ValueError(f"calibration must reach {matrix.label}, got no row of input: give more batches")
        found = _correlation(matrix.view(matrix.parameter.detach()).double(), seen.of(matrix.label))
        matrix.view(scores[matrix.name]).copy_(found)
    return scores


def _correlation(weight: Float[Tensor, "out in"], covariance: Float[Tensor, "in in"]) -> Float[Tensor, "out in"]:
    joint = weight @ covariance
    spreads = (joint * weight).sum(1, keepdim=True) * covariance.diagonal()
    # rounding leaves a constant neuron a variance of this order
    alive = spreads > 1e-24 * spreads.max().clamp_min(1e-300)
    return torch.where(alive, joint.abs() / spreads.clamp_min(1e-300).sqrt(), 0.0)


@contextmanager
def _watching(inputs: Iterable[Inputs], seen: Seen) -> Iterator[None]:
    with ExitStack() as stack:
        for use in inputs:
            hook = _plain if "weight" in use.weights else _keys if "keys" in use.weights else _routed
            stack.callback(use.module.register_forward_pre_hook(partial(hook, use, seen), with_kwargs=True).remove)
            if hasattr(use.module, "forward_one"):
                # a shared expert is called past the hooks of nn.Module
                counted = partial(_counted, use, seen, cast(Callable[[int, Tensor], Tensor], use.module.forward_one))
                stack.enter_context(replaced_method(use.module, "forward_one", counted))
        yield


def _plain(use: Inputs, seen: Seen, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen(use.weights["weight"][0].label, args[0] if args else kwargs["input"])


def _keys(use: Inputs, seen: Seen, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = module.matrix_inputs(args[0] if args else kwargs["x"])
    for matrix in use.weights["keys"]:
        seen(matrix.label, found[matrix.place])


def _routed(use: Inputs, seen: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for expert, rows in enumerate(routed_rows(module, (*args, *kwargs.values()))):
        _expert(use, seen, expert, rows)


def _expert(use: Inputs, seen: Seen, expert: int, rows: Float[Tensor, "rows width"]) -> None:
    if "up" in use.weights:
        seen(use.weights["up"][expert].label, rows)
    if "down" in use.weights:
        seen(use.weights["down"][expert].label, hidden_rows(use.module, expert, rows))


def _counted(use: Inputs, seen: Seen, original: Callable[[int, Tensor], Tensor], expert: int, rows: Tensor) -> Tensor:
    _expert(use, seen, expert, rows)
    return original(expert, rows)
