"""FLOPs, bytes and an energy proxy of a whole training run, the dense passes that find a mask included."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.diagnostics.figure import axes_for, labelled

PJ_PER_FLOP = (3.7 + 0.9) / 2
PJ_PER_BYTE = 640 / 4


@dataclass(frozen=True)
class Densities:
    """Step → share of the prunable weights that each part of a step works with.

    forward: also of the backward pass to the inputs. gradient: of the weights that get one (1 where a method looks at
    dense gradients). moments: that have optimiser state."""

    forward: Callable[[int], float]
    gradient: Callable[[int], float]
    moments: Callable[[int], float]


@dataclass(frozen=True)
class Passes:
    """Products with every weight that is there, beyond those of training steps: ``forward`` of them on the way to a
    loss and ``backward`` on the way back, each of ``tokens`` tokens.

    A loss takes 1 forward, its gradient 2 backward (of the inputs, of the weights), and the gradient of something made
    of that gradient 6: two for each of the three products that it goes back through."""

    forward: int
    backward: int
    tokens: int


@dataclass(frozen=True)
class RunCost:
    """Of each step: FLOPs of the forward pass and of the backward one, bytes of weights, gradients and moments moved;
    and what a dense run of as many steps takes. Runs add up: ``search + final``. Passes beside the steps are entries of
    their own, behind the steps."""

    forward: Float[Tensor, "steps"]
    backward: Float[Tensor, "steps"]
    moved: Float[Tensor, "steps"]
    dense_flops: float
    dense_moved: float

    @property
    def flops(self) -> float:
        """All FLOPs of the run."""
        return float(self.forward.sum() + self.backward.sum())

    @property
    def bytes(self) -> float:
        """All bytes moved."""
        return float(self.moved.sum())

    @property
    def energy(self) -> float:
        """A proxy in joules: 2.3 pJ a FLOP and 160 pJ a byte from memory.

        32-bit multiply 3.7 pJ, add 0.9 pJ, 32 bits of DRAM 640 pJ in 45 nm (Horowitz 2014, ISSCC, "Computing's energy
        problem"). It orders methods; it is no measurement of any machine."""
        return (PJ_PER_FLOP * self.flops + PJ_PER_BYTE * self.bytes) * 1e-12

    @property
    def ratio(self) -> float:
        """FLOPs over those of a dense run of as many steps."""
        return self.flops / self.dense_flops

    def __add__(self, other: "RunCost") -> "RunCost":
        """The two runs one after the other."""
        forward, backward, moved = (torch.cat([getattr(self, n), getattr(other, n)])
                                    for n in ("forward", "backward", "moved"))  # fmt: skip
        return RunCost(forward, backward, moved, self.dense_flops + other.dense_flops,
                       self.dense_moved + other.dense_moved)  # fmt: skip

    def plot(self, *, ax: Any = None, label: str = "") -> Any:
        """FLOPs spent up to each step; returns the axes."""
        ax = axes_for(ax)
        ax.plot((self.forward + self.backward).cumsum(0).tolist(), label=label)
        return labelled(ax, x="step", y="training FLOPs so far", title=f"{self.ratio:.2f} of dense", legend=bool(label))


def run_cost(
    densities: Densities,
    *,
    steps: int,
    tokens: int,
    prunable_flops: float,
    other_flops: float,
    prunable_weights: int,
    other_weights: int,
    weight_bytes: int = 4,
    index_bytes: int = 0,
    attack_steps: int = 0,
    extra_flops: Callable[[int], float] = lambda step: 0.0,
    passes: Callable[[int], Sequence[Passes]] = lambda step: (),
) -> RunCost:
    """The cost of ``steps`` steps of ``tokens`` tokens each.

    prunable_flops, other_flops: forward FLOPs a token of the dense model inside the prunable weights and outside them;
    a dense step takes three times as much: forward, gradient of the inputs, gradient of the weights (Evci et al. 2020,
    arXiv:1911.11134, appendix H: static 3 f_S; RigL (3 f_S ΔT + 2 f_S + f_D)/(ΔT + 1)).
    With densities d (forward), w (gradient) and m (moments) of the prunable part, and 1 of the other:

        forward = d f + o;   backward = (d + w) f + 2 o
        weights moved = 2 d (both passes) + 2 w (gradient out and in) + 6 m (two moments and the weight, in and out)

    times weight_bytes, and index_bytes more for every sparse weight read (2 d). Activations are not counted.
    attack_steps: passes to the inputs and back that look for the worst embeddings before each step, each of them
    d f + o forward and backward, and 2 d weights moved. extra_flops: step → FLOPs a token of the backward pass for what
    is no weight, such as NeST's bridging gradients. passes: step → what it does besides, at its d: each product takes
    (d f + o) a token of its own and moves one matrix of the shape of each weight, read or written.
    Raises: ValueError for counts below 0 (steps, tokens below 1), and a density outside [0, 1]."""
    _check_least({"steps": steps, "tokens": tokens, "weight_bytes": weight_bytes}, 1)
    _check_least({"index_bytes": index_bytes, "attack_steps": attack_steps}, 0)
    _check_least({"prunable_flops": prunable_flops, "other_flops": other_flops, "prunable_weights": prunable_weights,
                  "other_weights": other_weights}, 0)  # fmt: skip
    d, w, m = (_table(name, rule, steps) for name, rule in vars(densities).items())
    once = tokens * (d * prunable_flops + other_flops)
    forward = (1 + attack_steps) * once
    extra = torch.tensor([extra_flops(step) for step in range(steps)], dtype=torch.float64)
    backward = tokens * ((d + w) * prunable_flops + 2 * other_flops + extra) + attack_steps * once
    moved = weight_bytes * ((2 * d + 2 * w + 6 * m) * prunable_weights + 10 * other_weights)
    moved = moved + weight_bytes * attack_steps * 2 * (d * prunable_weights + other_weights)
    moved = moved + index_bytes * 2 * d * prunable_weights
    dense_moved = weight_bytes * 10.0 * (prunable_weights + other_weights) * steps
    run = RunCost(forward, backward, moved, 3.0 * tokens * (prunable_flops + other_flops) * steps, dense_moved)
    besides = search_cost(
        [(float(d[step]), each) for step in range(steps) for each in passes(step)],
        prunable_flops=prunable_flops, other_flops=other_flops, prunable_weights=prunable_weights,
        other_weights=other_weights, weight_bytes=weight_bytes,
    )  # fmt: skip
    return run + besides


def search_cost(
    found: Sequence[tuple[float, Passes]],
    *,
    prunable_flops: float,
    other_flops: float,
    prunable_weights: int,
    other_weights: int,
    weight_bytes: int = 4,
) -> RunCost:
    """The cost of passes that are no training steps, each at a density d of the prunable weights: what looks for a mask
    before the first step. Added to a run's, the dense run that they are compared with stays that of the run.

        forward, backward = (their number) · tokens · (d f + o);  moved = weight_bytes · (their number) · (d w + o')

    f, o: forward FLOPs a token, w, o': numbers of the prunable weights and of the others, which count as if each got
    a gradient. Raises: ValueError for counts below 0, weight_bytes below 1, and a density outside [0, 1]."""
    _check_least({"weight_bytes": weight_bytes}, 1)
    _check_least({"prunable_flops": prunable_flops, "other_flops": other_flops, "prunable_weights": prunable_weights,
                  "other_weights": other_weights}, 0)  # fmt: skip
    d = _table("search", lambda n: found[n][0], len(found))
    forward, backward, tokens = (torch.tensor([getattr(each, name) for _, each in found], dtype=torch.float64)
                                 for name in ("forward", "backward", "tokens"))  # fmt: skip
    each = tokens * (d * prunable_flops + other_flops)
    moved = weight_bytes * (forward + backward) * (d * prunable_weights + other_weights)
    return RunCost(forward * each, backward * each, moved, 0.0, 0.0)


def dense_run() -> Densities:
    """All weights in every step."""
    return Densities(lambda step: 1.0, lambda step: 1.0, lambda step: 1.0)


def static_run(density: float, *, sparse_moments: bool = False) -> Densities:
    """One density throughout: static, SET, DSR, DeepR, a ticket. sparse_moments: with :class:`SparseAdamW`."""
    return Densities(lambda step: density, lambda step: density, lambda step: density if sparse_moments else 1.0)


def rigl_run(density: float, *, every: int, stop: int | None = None, sparse_moments: bool = False) -> Densities:
    """Dense gradients at each update: steps every, 2·every, … before ``stop``."""

    def gradient(step: int) -> float:
        due = step > 0 and step % every == 0 and (stop is None or step < stop)
        return 1.0 if due else density

    return Densities(lambda step: density, gradient, static_run(density, sparse_moments=sparse_moments).moments)


def momentum_run(density: float) -> Densities:
    """SNFS: dense gradients in every step. Its own dense mean of them is not counted in the bytes."""
    return Densities(lambda step: density, lambda step: 1.0, lambda step: 1.0)


def top_kast_run(density: float, *, backward_density: float) -> Densities:
    """Top-KAST: the forward set, and gradients of the wider backward set."""
    return Densities(lambda step: density, lambda step: backward_density, lambda step: 1.0)


def gradual_run(schedule: Callable[[int], float]) -> Densities:
    """Magnitude pruning along a schedule step → sparsity (:mod:`pruning.schedules`): a dense start is paid for."""

    def density(step: int) -> float:
        return 1 - schedule(step)

    return Densities(density, density, lambda step: 1.0)


def feedback_run(schedule: Callable[[int], float]) -> Densities:
    """A masked forward pass whose gradient reaches every weight: feedback, discovered wirings, movement."""
    return Densities(lambda step: 1 - schedule(step), lambda step: 1.0, lambda step: 1.0)


def recorded_run(
    history: Sequence[tuple[int, float]], *, dense_gradients: Callable[[int], bool] = lambda step: False
) -> Densities:
    """A run by its own record of (first step, density from then on), ascending, the first of step 0.

    dense_gradients: at which steps the method looks at the gradients of absent weights. Raises: ValueError for a record
    that does not begin at step 0."""
    if not history or history[0][0] != 0:
        raise ValueError(f"history must begin at step 0, got {history[0][0] if history else 'nothing'}")
    steps = [step for step, _ in history]

    def density(step: int) -> float:
        return history[bisect.bisect_right(steps, step) - 1][1]

    return Densities(density, lambda step: 1.0 if dense_gradients(step) else density(step), lambda step: 1.0)


def _check_least(values: dict[str, float], least: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def _table(name: str, rule: Callable[[int], float], steps: int) -> Float[Tensor, "steps"]:
    values = torch.tensor([rule(step) for step in range(steps)], dtype=torch.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        wrong = values[(values < 0) | (values > 1) | values.isnan()][0]
        raise ValueError(f"density of {name} must be in [0, 1], got {float(wrong)}")
    return values
