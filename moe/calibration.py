"""Thresholds for activation dropping, from calibration batches: by sparsity, by output error, by perplexity.

Calibrate on text of its own: thresholds chosen on the evaluation rows flatter the evaluation.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe.recorded import evaluating, recorded_inputs
from moe.sparsified import FeedForwardSite, feedforward_sites, sparsify_activations
from moe.thresholded import ThresholdedFeedForward, Thresholds, activate_gate, activate_up

CalibratedMethod = Literal["hard", "cats", "teal", "cett"]
Allocation = Literal["uniform", "greedy", "equal_error"]
Levels = Mapping[str, float]
# a level of sparsity is found to this accuracy; finer steps move fewer neurons than calibration can tell apart
LEVEL_STEP = 1 / 1024


def feedforward_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rows: int = 1024,
    generator: torch.Generator | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """For each feed-forward network, by name, ``rows`` of its input rows (all, if there are fewer), drawn uniformly.

    run(model, batch) is the forward pass; by default model(**batch) for mappings, else model(batch). The rows of tokens
    that the batch's "attention_mask" marks 0 are left out. generator: a CPU generator for the draw.
    The model runs in evaluation mode without gradients, and is then put back. One with Mixture-of-Depths layers runs
    sequence by sequence, and ``run`` gets those: there is no filling then that could pass for tokens.
    Raises: ValueError for rows < 1, a model without feed-forward networks, or batches that give no rows.
    """
    sites = feedforward_sites(model)
    if not sites:
        raise ValueError("model must hold feed-forward networks (see feedforward_sites), got none")
    modules = {name: site.module for name, site in sites.items()}
    return recorded_inputs(model, modules, batches, rows=rows, generator=generator, run=run)


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: CalibratedMethod = "teal",
    sparsity: float | None = None,
    error: float | None = None,
    allocation: Allocation = "uniform",
    rows: int = 1024,
    generator: torch.Generator | None = None,
    run: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Thresholds]:
    """Thresholds of each feed-forward network for ``sparsify_activations``, from a sample of calibration inputs.

    sparsity: share of values at most the threshold, in [0, 1): of the inputs of each projection for teal, of the
    neurons for the others. error: instead, in each network the largest sparsity whose output differs from the dense
    output by at most that, as the mean over tokens of ‖y − y_dense‖ / ‖y_dense‖; with method "cett" this is CETT of
    the Sparsing Law (arXiv:2411.02335). allocation, with a sparsity:

    - "uniform": every network, and every projection in it, gets that sparsity;
    - "greedy", for teal: the same share of weight reads of each network is saved, but spread over its projections by
      TEAL's Algorithm 1 (arXiv:2408.14690): a step at a time, where it adds the least error, each to 1 - LEVEL_STEP
      at most;
    - "equal_error": the mean over the networks, by size, is the sparsity, and all have the same output error, as the
      Sparsing Law spreads it.

    The inputs are those of the dense model. Other options: see :func:`feedforward_inputs`.
    Raises: ValueError unless exactly one of sparsity and error is given, in its range; for greedy with another method,
    or an allocation other than uniform with an error.
    """
    check_target(sparsity, error, allocation, method)
    inputs = feedforward_inputs(model, batches, rows=rows, generator=generator, run=run)
    return thresholds_from_inputs(model, inputs, method=method, sparsity=sparsity, error=error, allocation=allocation)


def thresholds_from_inputs(
    model: nn.Module,
    inputs: Mapping[str, Float[Tensor, "_ _"]],
    *,
    method: CalibratedMethod = "teal",
    sparsity: float | None = None,
    error: float | None = None,
    allocation: Allocation = "uniform",
) -> dict[str, Thresholds]:
    """As :func:`calibrate_thresholds`, from rows that :func:`feedforward_inputs` gave: one forward pass, many targets.

    Raises: as there, and ValueError if inputs name other networks than the model has.
    """
    check_target(sparsity, error, allocation, method)
    sites = feedforward_sites(model)
    if inputs.keys() != sites.keys():
        raise ValueError(f"inputs must name {', '.join(sites)}, got {', '.join(inputs) or 'none'}")
    with torch.no_grad():
        if allocation == "equal_error" and sparsity is not None:
            return _equal_error_thresholds({n: _sample(site, inputs[n], method) for n, site in sites.items()}, sparsity)
        return {
            name: _site_thresholds(_sample(site, inputs[name], method), sparsity, error, allocation)
            for name, site in sites.items()
        }


def check_target(sparsity: float | None, error: float | None, allocation: str, method: str) -> None:
    """Raises: ValueError for targets that do not go together; see :func:`calibrate_thresholds`."""
    if (sparsity is None) == (error is None):
        raise ValueError(f"exactly one of sparsity and error must be given, got sparsity={sparsity}, error={error}")
    if sparsity is not None and not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if error is not None and not error >= 0.0:
        raise ValueError(f"error must be >= 0, got {error}")
    if method not in ("hard", "cats", "teal", "cett"):
        raise ValueError(f"method must be 'hard', 'cats', 'teal' or 'cett', got {method!r}")
    if allocation not in get_args(Allocation):
        raise ValueError(f"allocation must be 'uniform', 'greedy' or 'equal_error', got {allocation!r}")
    if allocation == "greedy" and (method != "teal" or sparsity is None):
        raise ValueError(f"allocation 'greedy' must come with method='teal' and a sparsity, got {method!r}, {sparsity}")
    if allocation == "equal_error" and sparsity is None:
        raise ValueError(f"allocation 'equal_error' must come with a sparsity, got error={error}")


@dataclass(frozen=True)
class _Sample:
    """A network, its calibration rows and their dense output, and per place the sorted magnitudes compared there."""

    site: FeedForwardSite
    method: CalibratedMethod
    x: Tensor
    dense: Tensor
    magnitudes: Mapping[str, Tensor]

    def thresholds(self, levels: Levels) -> Thresholds:
        """The threshold at each place up to which a share ``levels[place]`` of the magnitudes lies: their quantile."""
        return Thresholds(**{place: quantile(values, levels[place]) for place, values in self.magnitudes.items()})

    def at(self, level: float) -> Thresholds:
        """One level at all places."""
        return self.thresholds(dict.fromkeys(self.magnitudes, level))

    def error(self, thresholds: Thresholds) -> float:
        """See :func:`output_error`."""
        return output_error(self.site, self.x, self.method, thresholds, self.dense)

    def error_at(self, level: float) -> float:
        """The error with one level at all places."""
        return self.error(self.at(level))


def _sample(site: FeedForwardSite, x: Float[Tensor, "T D"], method: CalibratedMethod) -> _Sample:
    compared = compared_magnitudes(site, x, method)
    # gate and up see one input: it is sorted once
    ordered = {id(values): values.flatten().sort().values for values in compared.values()}
    dense = site.down(_neurons(site, x))
    return _Sample(site, method, x, dense, {place: ordered[id(values)] for place, values in compared.items()})


def _site_thresholds(sample: _Sample, sparsity: float | None, error: float | None, allocation: str) -> Thresholds:
    if allocation == "greedy" and sparsity is not None:
        return sample.thresholds(_greedy_levels(sample, sparsity))
    if sparsity is not None:
        return sample.at(sparsity)
    return sample.at(_largest_level(sample.error_at, float(error or 0.0)))


def _equal_error_thresholds(samples: Mapping[str, _Sample], sparsity: float) -> dict[str, Thresholds]:
    """One output error for all, found by bisection, so that the levels' mean by size is the sparsity."""
    errors = {name: functools.cache(sample.error_at) for name, sample in samples.items()}
    sizes = {name: s.site.up.weight.numel() for name, s in samples.items()}

    def levels_at(error: float) -> dict[str, float]:
        return {name: _largest_level(of, error) for name, of in errors.items()}

    def excess(levels: Mapping[str, float]) -> float:
        return sum(levels[name] * size for name, size in sizes.items()) / sum(sizes.values()) - sparsity

    low, high = 0.0, max(of(1.0 - LEVEL_STEP) for of in errors.values())
    best = levels_at(low)
    # levels come in steps: bisection ends where the error no longer moves any of them
    for _ in range(30):
        middle = (low + high) / 2
        levels = levels_at(middle)
        best = min(best, levels, key=lambda found: abs(excess(found)))
        low, high = (middle, high) if excess(levels) <= 0.0 else (low, middle)
    return {name: sample.at(best[name]) for name, sample in samples.items()}


def _largest_level(error_at: Callable[[float], float], allowed: float) -> float:
    """The largest level in [0, 1), found by bisection, whose error, taken to grow, is allowed. 0 if none is."""
    low, high = 0.0, 1.0
    while high - low > LEVEL_STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if error_at(middle) <= allowed else (low, middle)
    return low


def _neurons(site: FeedForwardSite, x: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
    up = activate_up(site.up(x), site.activation)
    return up if site.gate is None else activate_gate(site.gate(x), site.activation) * up


def compared_magnitudes(site: FeedForwardSite, x: Float[Tensor, "T D"], method: CalibratedMethod) -> dict[str, Tensor]:
    """What the thresholds of each place are compared with, [T, D] or [T, F].

    Raises: ValueError for cats and a network without a gate.
    """
    if method == "cats":
        if site.gate is None:
            raise ValueError("method 'cats' must have a gate projection, got a network without")
        return {"gate": activate_gate(site.gate(x), site.activation).abs()}
    h = _neurons(site, x).abs()
    if method == "teal":
        size = x.abs()
        return ({} if site.gate is None else {"gate": size}) | {"up": size, "down": h}
    return {"down": h * torch.linalg.vector_norm(site.down.weight, dim=0) if method == "cett" else h}


def quantile(ordered: Tensor, share: float) -> float:
    """The value up to which that share of the ordered values lies; 0 where it is none of them."""
    count = round(share * ordered.numel())
    return float(ordered[count - 1]) if count else 0.0


def output_error(
    site: FeedForwardSite,
    x: Float[Tensor, "T D"],
    method: CalibratedMethod,
    thresholds: Thresholds,
    dense: Float[Tensor, "T D"],
) -> float:
    """Mean over the rows of ‖y − y_dense‖ / ‖y_dense‖; a row whose dense output is zero counts only if y is not."""
    layer = ThresholdedFeedForward.from_linear(
        site.gate,
        site.up,
        site.down,
        activation=site.activation,
        method=method,
        threshold=thresholds,
        execution="dense",
    )
    lost = torch.linalg.vector_norm((layer(x) - dense).float(), dim=-1)
    whole = torch.linalg.vector_norm(dense.float(), dim=-1)
    return float((lost / whole.clamp_min(torch.finfo(torch.float32).tiny)).mean())


def _greedy_levels(sample: _Sample, sparsity: float) -> dict[str, float]:
    """TEAL's Algorithm 1: raise one projection's level a step at a time, until the network saves enough reads."""
    levels = dict.fromkeys(sample.magnitudes, 0.0)
    # the three matrices are of one size, so a step of any of them saves as many reads
    step = 0.05
    while sum(levels.values()) / len(levels) < sparsity - 1e-9:
        left = sparsity * len(levels) - sum(levels.values())
        raised = {place: min(level + min(step, left), 1.0 - LEVEL_STEP) for place, level in levels.items()}
        trials = {place: levels | {place: level} for place, level in raised.items() if level > levels[place]}
        if not trials:
            break
        errors = {place: sample.error(sample.thresholds(trial)) for place, trial in trials.items()}
        levels = trials[min(errors, key=lambda place: errors[place])]
    return levels


@dataclass(frozen=True)
class PerplexityCalibration:
    """Thresholds found by :func:`calibrate_to_perplexity`, the output error behind them, and what they cost."""

    thresholds: dict[str, Thresholds]
    error: float
    perplexity: float
    dense_perplexity: float


def calibrate_to_perplexity(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    loss: Callable[[nn.Module, Any], float | Tensor],
    percent: float = 1.0,
    method: CalibratedMethod = "cett",
    largest_error: float = 1.0,
    steps: int = 8,
    rows: int = 1024,
    generator: torch.Generator | None = None,
) -> PerplexityCalibration:
    """PPL-p%: the largest output error, one for all networks, at which perplexity is at most p percent above dense.

    Sparsing Law (arXiv:2411.02335). loss(model, batch) is the mean cross-entropy in nats of a batch; batches count
    alike. The error is found by ``steps`` bisections of [0, largest_error]; the model is dense again afterwards.
    Raises: ValueError for no batches, percent < 0, largest_error <= 0 or steps < 1; FloatingPointError if the dense
    loss is not finite.
    """
    for name, value, least in (("batches", len(batches), 1), ("percent", percent, 0.0), ("steps", steps, 1)):
        if not value >= least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not largest_error > 0.0:
        raise ValueError(f"largest_error must be > 0, got {largest_error}")
    inputs = feedforward_inputs(model, batches, rows=rows, generator=generator, run=loss)
    dense = _mean_loss(model, batches, loss)
    if not math.isfinite(dense):
        raise FloatingPointError(f"loss of the dense model must be finite, got {dense}")
    with torch.no_grad():
        samples = {name: _sample(site, inputs[name], method) for name, site in feedforward_sites(model).items()}

    def measured(error: float) -> tuple[dict[str, Thresholds], float]:
        with torch.no_grad():
            limits = {name: _site_thresholds(sample, None, error, "uniform") for name, sample in samples.items()}
        sparse = sparsify_activations(model, method=method, thresholds=limits, execution="dense")
        try:
            return limits, _mean_loss(model, batches, loss)
        finally:
            sparse.restore()

    allowed = dense + math.log1p(percent / 100.0)
    low, high = 0.0, largest_error
    best, at_best = measured(low)
    for _ in range(steps):
        middle = (low + high) / 2
        limits, value = measured(middle)
        if value <= allowed:
            low, best, at_best = middle, limits, value
        else:
            high = middle
    return PerplexityCalibration(best, low, math.exp(at_best), math.exp(dense))


def _mean_loss(model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], float | Tensor]) -> float:
    with evaluating(model):
        return sum(float(loss(model, batch)) for batch in batches) / len(batches)
