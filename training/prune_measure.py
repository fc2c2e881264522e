"""What a model takes: parameters, bytes, and the time of a forward pass beside another's."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pruning import count_parameters

ROUNDS, MOST_ROUNDS, SECONDS = 9, 99, 1.0


@dataclass(frozen=True)
class Size:
    """parameters: tied ones once; nonzeros: those that are not 0; bytes: of tensor data, dense."""

    parameters: int
    nonzeros: int
    bytes: int


@dataclass(frozen=True)
class Speed:
    """Medians and interquartile ranges of a forward pass over `shape` tokens, in seconds, over `rounds` rounds in
    which both models ran in turn."""

    before_s: float
    after_s: float
    before_iqr_s: float
    after_iqr_s: float
    shape: tuple[int, int]
    rounds: int


def size_of(model: nn.Module) -> Size:
    """Counted from the tensors."""
    parameters, size = count_parameters(model)
    return Size(parameters, sum(int(parameter.count_nonzero()) for parameter in model.parameters()), size)


def bytes_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@torch.no_grad()
def forward_speed(before: nn.Module, after: nn.Module, ids: Int[Tensor, "B L"]) -> Speed:
    """Both models on the same tokens, in turn, after one pass each that does not count: at least ROUNDS times, short
    passes more often, until SECONDS have gone by."""
    models = {"before": before, "after": after}
    for model in models.values():
        timed(model, ids)
    times: dict[str, list[float]] = {name: [] for name in models}
    began, rounds = time.monotonic(), 0
    while rounds < ROUNDS or (time.monotonic() - began < SECONDS and rounds < MOST_ROUNDS):
        for name in sorted(models, reverse=rounds % 2 == 0):
            times[name].append(timed(models[name], ids))
        rounds += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    spreads = {name: _spread(values) for name, values in times.items()}
    return Speed(medians["before"], medians["after"], spreads["before"], spreads["after"],
                 (ids.shape[0], ids.shape[1]), rounds)  # fmt: skip


def timed(model: nn.Module, ids: Int[Tensor, "B L"]) -> float:
    """Seconds of a pass, with all that a GPU does of it."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    model(ids)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def _spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
