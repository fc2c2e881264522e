"""Decoding through thresholded layers: runs to time, their check against dense arithmetic, and what layers chose."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import require_parity
from moe.race import Timing
from moe.sparsified import SparsifiedActivations

NEW_TOKENS = 16


def sharing_copy(model: nn.Module) -> Any:
    """Another module tree over the same weights."""
    return copy.deepcopy(model, memo={id(weight): weight for weight in [*model.parameters(), *model.buffers()]})


def decoder(model: Any, prompt: Tensor, prepare: Callable[[], object]) -> Callable[..., Tensor]:
    """A run that decodes NEW_TOKENS greedily after the prompt, whose cache is made beforehand; gives the first step's
    logits: later ones follow other tokens once two candidates tie."""
    from transformers import DynamicCache

    prepare()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        first = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1:]

    @torch.inference_mode()
    def run(tokens: int = NEW_TOKENS) -> Tensor:
        prepare()
        if surplus := cache.get_seq_length() - prompt.shape[1]:
            cache.crop(-surplus)
        step = after = model(input_ids=first.argmax(-1), past_key_values=cache, use_cache=True).logits
        for _ in range(tokens - 1):
            step = model(input_ids=step.argmax(-1), past_key_values=cache, use_cache=True).logits
        return after

    return run


def processor_seconds(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, list[float]]:
    """As :func:`benchmarks.harness.interleaved`, in seconds that this process had of a processor.

    For one thread on a machine that others use too. Raises: ValueError if torch has more threads, whose seconds would
    be added up."""
    if torch.get_num_threads() != 1:
        raise ValueError(f"threads must be 1 for processor seconds, got {torch.get_num_threads()}")
    names, seconds = list(runs), {name: list[float]() for name in runs}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def setter(sparse: SparsifiedActivations, attribute: str, values: Mapping[str, object]) -> Callable[[], None]:
    """Sets that attribute of every layer, by the layer's name."""

    def prepare() -> None:
        for name, layer in sparse.layers.items():
            setattr(layer, attribute, values[name])

    return prepare


def parity(
    sparse: SparsifiedActivations, runs: Mapping[str, Callable[..., Tensor]], settings: Mapping[float, object]
) -> str:
    """The first step's logits of the fast path against those of the masked dense arithmetic, at every setting."""
    worst = 0.0
    for level in settings:
        last: dict[str, Tensor] = {}
        for way in ("dense", "sparse", "auto"):
            for layer in sparse.layers.values():
                layer.execution = way  # type: ignore[assignment]
            last[way] = runs[str(level)](tokens=1)
        for way in ("sparse", "auto"):
            worst = max(worst, require_parity({"logits": last[way]}, {"logits": last["dense"]}, tolerance=1e-2))
    return f"pass {worst:.0e}"


def choices(sparse: SparsifiedActivations) -> list[dict[str, object]]:
    """For each projection medians, over the layers, of what they measured, and how many chose which way."""
    found: dict[str, list[tuple[str, Timing | None]]] = {}
    for layer in sparse.layers.values():
        for case, races in layer.races.items():
            if case.rows == 1 and case.dropped == (layer.thresholds, layer.top_k, layer.predictor):
                for name, race in races.items():
                    found.setdefault(name, []).append((race.chosen or "none yet", race.timing))
    rows: list[dict[str, object]] = []
    for name, made in found.items():
        timed = [timing for _, timing in made if timing is not None]
        ways = {way: sum(chosen == way for chosen, _ in made) for way in ("dense", "sparse")}
        medians = {
            f"{way}_s": statistics.median(getattr(timing, way) for timing in timed) if timed else None for way in ways
        }
        rows.append({"projection": name, **ways, **medians})
    return rows
