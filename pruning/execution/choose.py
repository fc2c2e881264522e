"""Which execution of each matrix is the fastest on this machine: measured, swapped where it pays, and said."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pruning.execution.linear import SparseLinear, check_execution
from pruning.formats.encoded import parse_format
from pruning.weights import is_conv1d, prunable_weights

DENSE = "dense"


@dataclass(frozen=True)
class Choice:
    """What was measured of one matrix. seconds: execution → median for each batch size; empty where nothing was run.

    density: share of entries that are not 0; chosen: an execution or "dense"; why: in words."""

    name: str
    shape: tuple[int, ...]
    density: float
    seconds: dict[str, tuple[float, ...]]
    chosen: str
    why: str


@dataclass(frozen=True)
class ExecutionReport:
    """One choice for each weight that was looked at; batch: the numbers of rows measured; threads: of torch."""

    choices: tuple[Choice, ...]
    batch: tuple[int, ...]
    threads: int

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the weights that no longer run dense."""
        return tuple(choice.name for choice in self.choices if choice.chosen != DENSE)

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for choice in self.choices for name in choice.seconds))
        width = max([len(choice.name) for choice in self.choices], default=6)
        cells = max([13, 9 * len(self.batch), *map(len, names)])
        sizes = ", ".join(map(str, self.batch))
        lines = [f"ms of each execution at {sizes} rows, {self.threads} threads",
                 f"{'weight':<{width}}  {'shape':<11} density  " + "".join(f"{name:>{cells}}  " for name in names)
                 + "chosen"]  # fmt: skip
        for choice in self.choices:
            times = "".join(f"{_milliseconds(choice.seconds.get(name)):>{cells}}  " for name in names)
            shape = "x".join(map(str, choice.shape))
            lines.append(
                f"{choice.name:<{width}}  {shape:<11} {choice.density:>7.2%}  {times}{choice.chosen}: {choice.why}"
            )
        lines.append(f"{len(self.swapped)} of {len(self.choices)} run sparse")
        return "\n".join(lines)


def _milliseconds(seconds: tuple[float, ...] | None) -> str:
    return "-" if seconds is None else " ".join(f"{value * 1e3:.3f}" for value in seconds)


def choose_execution(
    model: nn.Module,
    *,
    batch: int | Sequence[int] = 1,
    candidates: Sequence[str] = ("csr", "block 32x32"),
    rounds: int = 7,
    margin: float = 0.05,
    weights: Sequence[str] | None = None,
) -> ExecutionReport:
    """Measure each Linear (and Conv1D) of `model` dense and as each candidate, and swap those that are faster sparse,
    in place.

    A matrix is swapped for the candidate that takes the least of the dense time, averaged over the batch sizes, if at
    every one of them it takes at most 1 − margin of the dense time; all others stay dense. Every round runs all
    executions of all matrices in turn, so that a busy machine slows all alike and weights come from where they lie when
    the model runs: give a whole model, not a layer that fits a cache. Each candidate stands in memory beside the dense
    weights meanwhile.
    batch: rows of a product (sequences times tokens), one or several. weights: parameter names; None is
    `prunable_weights`. The model is then for inference; `restore_dense` undoes it, before saving or pruning again.
    Not covered, and kept dense: stacks of experts, weights that several modules share, Linear subclasses.
    Raises: ValueError for a batch size or rounds below 1, a margin outside [0, 1), and unknown candidates."""
    sizes = (batch,) if isinstance(batch, int) else tuple(batch)
    _check(sizes, rounds, margin, candidates)
    chosen = prunable_weights(model, weights)
    linears = {name: owner for name in chosen if (owner := _linear(model, name)) is not None}
    runs = {name: _executions(owner, candidates) for name, owner in linears.items()}
    times = _measure(linears, runs, sizes, rounds)
    choices = [_choice(name, weight, times.get(name), margin, candidates) for name, weight in chosen.items()]
    for choice in choices:
        if choice.chosen != DENSE:
            _replace(model, choice.name, runs[choice.name][choice.chosen])
    return ExecutionReport(tuple(choices), sizes, torch.get_num_threads())


def restore_dense(model: nn.Module) -> list[str]:
    """Make every SparseLinear an nn.Linear (or the Conv1D that it was) again, in place, its parameters without
    requires_grad; returns their names.

    The weights are those that were swapped out, −0 as 0."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    for name, module in found:
        dense = _empty(module)
        held = module.dense_weight()
        dense.weight = nn.Parameter(held.mT.contiguous() if module.turned else held, requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.clone(), requires_grad=False)
        model.set_submodule(name, dense.train(module.training))
    return [name for name, _ in found]


def _empty(module: SparseLinear) -> nn.Module:
    if not module.turned:
        return nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        return Conv1D(module.out_features, module.in_features)


def _check(sizes: Sequence[int], rounds: int, margin: float, candidates: Sequence[str]) -> None:
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch must be >= 1, got {list(sizes)}")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be in [0, 1), got {margin}")
    for candidate in candidates:
        check_execution(candidate, torch.float32)


def _linear(model: nn.Module, name: str) -> nn.Module | None:
    """The one nn.Linear or Conv1D that owns this weight, if nothing else does."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = module.get_parameter(attribute)
    uses = [m for m in model.modules() for p in m.parameters(recurse=False) if p is weight]
    names = [key for key, p in model.named_parameters(remove_duplicate=False) if p is weight]
    known = type(module) is nn.Linear or is_conv1d(module)
    return module if known and len(uses) == len(names) == 1 and owner else None


def _executions(dense: nn.Module, candidates: Sequence[str]) -> dict[str, nn.Module]:
    runs, turned = {DENSE: dense}, is_conv1d(dense)
    weight, bias = dense.get_parameter("weight"), dict(dense.named_parameters()).get("bias")
    matrix = weight.mT if turned else weight
    for candidate in candidates:
        if _works(candidate, weight):
            runs[candidate] = SparseLinear(matrix, bias, execution=candidate, turned=turned).train(dense.training)
    return runs


def _works(candidate: str, weight: Tensor) -> bool:
    return parse_format(candidate)[0] != "csr" or weight.dtype in (torch.float32, torch.float64)


def _measure(
    linears: dict[str, nn.Module], runs: dict[str, dict[str, nn.Module]], sizes: Sequence[int], rounds: int
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Medians by matrix and execution, one for each size."""
    seconds: dict[tuple[str, str, int], list[float]] = {}
    with torch.no_grad():
        for size in sizes:
            inputs = {name: _rows(owner, size) for name, owner in linears.items()}
            for turn in range(1 + rounds):
                for execution in _rotated(runs, turn):
                    for name in (name for name in runs if execution in runs[name]):
                        elapsed = _seconds(runs[name][execution], inputs[name])
                        if turn:
                            seconds.setdefault((name, execution, size), []).append(elapsed)
    return {
        name: {e: tuple(statistics.median(seconds[name, e, size]) for size in sizes) for e in executions}
        for name, executions in runs.items()
    }


def _rows(dense: nn.Module, count: int) -> Tensor:
    weight = dense.get_parameter("weight")
    return torch.randn(count, weight.shape[0 if is_conv1d(dense) else 1]).to(weight)


def _rotated(runs: dict[str, dict[str, nn.Module]], turn: int) -> list[str]:
    names = list(dict.fromkeys(execution for executions in runs.values() for execution in executions))
    start = turn % max(len(names), 1)
    return names[start:] + names[:start]


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start = time.perf_counter()
    run(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _choice(
    name: str,
    weight: Tensor,
    seconds: dict[str, tuple[float, ...]] | None,
    margin: float,
    candidates: Sequence[str],
) -> Choice:
    density = int((weight.detach() != 0).sum()) / max(weight.numel(), 1)
    if seconds is None:
        why = "a stack of matrices is not covered" if weight.ndim > 2 else "no Linear or Conv1D of its own"
        return Choice(name, tuple(weight.shape), density, {}, DENSE, why)
    shares = {e: [t / d for t, d in zip(seconds[e], seconds[DENSE], strict=True)] for e in seconds if e != DENSE}
    faster = {e: statistics.mean(s) for e, s in shares.items() if max(s) <= 1 - margin}
    if faster:
        best = min(faster, key=lambda e: faster[e])
        return Choice(name, tuple(weight.shape), density, seconds, best, f"{faster[best]:.2f} of the dense time")
    missing = [e for e in candidates if e not in seconds]
    why = f"no execution works on {weight.dtype}: {', '.join(missing)}"
    if shares:
        near = min(shares, key=lambda e: max(shares[e]))
        why = f"the best, {near}, takes {max(shares[near]):.2f} of the dense time"
    return Choice(name, tuple(weight.shape), density, seconds, DENSE, why)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    model.set_submodule(name.rpartition(".")[0], module)
