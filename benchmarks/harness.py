"""Time several callables side by side and report each with its conditions, spread and ratios.

A benchmark has three steps: :func:`require_parity` (nothing is timed before the answers agree), :func:`interleaved`
(all contenders in every round, so that a busy machine slows all of them), :func:`row` (one printed line, one JSON
line).
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.conditions import processor


def require_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float) -> float:
    """Worst relative error max_name ‖actual − expected‖ / ‖expected‖ over the named tensors, in float64.

    Raises: ValueError if the names differ, or if any error exceeds ``tolerance`` or is NaN.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"names must be {sorted(expected)}, got {sorted(actual)}")
    worst = 0.0
    for name, reference in expected.items():
        wanted = reference.detach().double()
        error = float((actual[name].detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-300))
        if not error <= tolerance:
            raise ValueError(f"parity: relative error of {name} must be <= {tolerance:g}, got {error:g}")
        worst = max(worst, error)
    return worst


def interleaved(
    callables: Mapping[str, Callable[[], object]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each callable in each round; every round runs all of them, starting one further along each time.

    The rotation keeps a contender from always inheriting the caches of the same neighbour. On CUDA each run is
    bracketed by a synchronisation.
    Raises: ValueError if rounds < 1 or warmup < 0.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    if warmup < 0:
        raise ValueError(f"warmup must be >= 0, got {warmup}")
    names = list(callables)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        start = turn % max(len(names), 1)
        for name in names[start:] + names[:start]:
            elapsed = _seconds(callables[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def forward_only(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Without a graph."""

    def timed() -> Tensor:
        with torch.no_grad():
            return run()

    return timed


def forward_backward(run: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], object]:
    """Output and all gradients."""

    def timed() -> object:
        out = run()
        return torch.autograd.grad(out, inputs, grad.view_as(out), materialize_grads=True)

    return timed


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range of the seconds."""
    if len(seconds) < 2:
        return statistics.median(seconds), 0.0
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return statistics.median(seconds), high - low


def paired_ratio(seconds: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of seconds / other: contention that lasts a round cancels."""
    return statistics.median(a / b for a, b in zip(seconds, other, strict=True))


def row(
    name: str,
    conditions: Mapping[str, object],
    seconds: Sequence[float],
    *,
    versus: Mapping[str, Sequence[float]],
    parity: str,
    device: str = "cpu",
    path: str | Path | None = "runs/benchmarks.jsonl",
) -> dict[str, object]:
    """Print ``name conditions median= iqr= vs_X= parity=`` and append the same as a JSON line to ``path``.

    ``versus`` holds the seconds of peers from the same :func:`interleaved` call; vs_X < 1 means faster than X.
    ``parity`` says what the gate found ("pass 3e-07"), or why there is none ("drops 2.1% of assignments").
    """
    median, iqr = spread(seconds)
    ratios = {other: paired_ratio(seconds, times) for other, times in versus.items()}
    record: dict[str, object] = {
        "name": name,
        "conditions": dict(conditions),
        "median_s": median,
        "iqr_s": iqr,
        "min_s": min(seconds),
        "ratios": ratios,
        "min_ratios": {other: min(seconds) / min(times) for other, times in versus.items()},
        "parity": parity,
        "device": device,
        "processor": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "commit": commit(),
        "command": shlex.join(sys.orig_argv[1:]),
    }
    print(_line(name, conditions, device, median, iqr, ratios, parity), flush=True)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return record


def _line(
    name: str,
    conditions: Mapping[str, object],
    device: str,
    median: float,
    iqr: float,
    ratios: Mapping[str, float],
    parity: str,
) -> str:
    where = f"{device}{torch.get_num_threads()}" if device == "cpu" else device
    parts = [name, *(f"{key}={value}" for key, value in conditions.items()), where]
    parts += [f"median={median * 1e3:.2f}ms", f"iqr={iqr * 1e3:.2f}ms"]
    parts += [f"vs_{other}={ratio:.2f}" for other, ratio in ratios.items()]
    return " ".join([*parts, f"parity={parity}"])


def _seconds(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def commit() -> str:
    """Short hash of HEAD, "+" appended when tracked files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
