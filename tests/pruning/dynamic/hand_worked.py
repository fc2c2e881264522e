"""One 4×4 layer with known weights, gradients and draws, on which every method is worked by hand.

All numbers are whole numbers of sixteenths and the optimiser is SGD with learning rate 1, so that every weight can be
followed on paper and is exact in float32: w − g. The magnitudes of the weights, and of each gradient, are distinct.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Table = tuple[tuple[float, ...], ...]

WEIGHT: Table = ((-35, 21, -31, -6), (-10, 39, 29, -25), (12, -27, -32, -4), (-38, -30, -14, 34))
# the mask that a method is given at the start, unless it lays out or chooses its own
START = ".### #... ##.. ##.."
G1: Table = ((-4, -16, -3, -18), (-21, -2, -23, -20), (14, 19, 10, 13), (-1, -24, 8, 7))
G2: Table = ((-22, -24, -12, -7), (18, 19, 17, -8), (-3, -16, 20, -13), (15, 23, -5, 4))
ZERO: Table = ((0,) * 4,) * 4
# what torch.rand gives: while a method is made (highest at START), in its first update, in its second
U0: Table = ((0.2, 0.9, 0.9, 0.9), (0.9, 0.2, 0.7, 0.2), (0.9, 0.9, 0.7, 0.2), (0.9, 0.9, 0.7, 0.2))
U1: Table = ((0.51, 0.09, 0.69, 0.93), (0.39, 0.21, 0.81, 0.45), (0.27, 0.15, 0.75, 0.33), (0.63, 0.03, 0.87, 0.57))
U2: Table = ((0.33, 0.63, 0.03, 0.45), (0.39, 0.21, 0.69, 0.09), (0.51, 0.75, 0.87, 0.15), (0.27, 0.93, 0.57, 0.81))
# what torch.randn gives in the first update and in the second
N1: Table = ((-1, -1, 0, 1), (2, 3, 0, 1), (-4, 2, -1, 2), (3, -1, -2, 1))
N2: Table = ((2, -3, 4, -1), (0, 4, -3, -1), (4, 1, 1, -1), (4, 1, 0, 2))


@dataclass(frozen=True)
class Draws:
    """What a step's draws give, for every matrix alike; multinomial: the numbers that torch.multinomial gives."""

    uniform: Table
    normal: Table = ZERO
    multinomial: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Masks of the layer (and of its companion) after each step; weights [4, 4] after the last, in sixteenths."""

    method: Any
    masks: list[str]
    companion: list[str] = field(default_factory=list)
    weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Worked:
    """A method, and what comes out by hand: masks after the first and the second update, weights after the second."""

    run: Callable[[], Trace]
    masks: tuple[str, str]
    weights: Table | None = None
    companion: tuple[str, str] | None = None
    companion_weights: Table | None = None

    def check(self) -> Trace:
        """Run it, and compare all that was worked out."""
        trace = self.run()
        assert tuple(trace.masks) == self.masks, f"masks must be {self.masks}, got {trace.masks}"
        if self.companion is not None:
            assert tuple(trace.companion) == self.companion, f"must be {self.companion}, got {trace.companion}"
        for found, wanted in zip(trace.weights, (self.weights, self.companion_weights), strict=False):
            if wanted is not None:
                rows = tuple(tuple(row) for row in found.tolist())
                assert rows == wanted, f"weights must be {wanted}, got {rows}"
        return trace


def tensor(table: Table) -> Tensor:
    """A table of sixteenths, as numbers."""
    return torch.tensor(table, dtype=torch.float32) / 16


def half_turned(values: Tensor) -> Tensor:
    """Turned by 180° and halved: what the companion has where the layer has ``values``."""
    return torch.rot90(values, 2) / 2


def layer() -> nn.Module:
    """The layer alone."""
    made = nn.Linear(4, 4, bias=False)
    made.weight.data.copy_(tensor(WEIGHT))
    return made


def pair() -> nn.Module:
    """The layer, and a companion with half its weights, turned, for methods that share among matrices:

     17   −7    −15   −19
     −2   −16   −13.5   6
    −12.5  14.5  19.5  −5
     −3   −15.5  10.5 −17.5
    """
    made = nn.Sequential(layer(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for parameter in list(made.parameters())[1:]:
            parameter.copy_(half_turned(tensor(WEIGHT)))
    return made


def picture(mask: Tensor) -> str:
    """Four rows of four, # where a connection is."""
    return " ".join("".join("#" if on else "." for on in row) for row in mask.tolist())


def follow(
    make: Callable[[nn.Module], Any],
    gradients: Sequence[Table],
    *,
    model: Callable[[], nn.Module] = layer,
    draws: Mapping[int, Draws] | None = None,
    at: Sequence[int] = (-2, -1),
    after: Callable[[Any, int], None] = lambda method, step: None,
) -> Trace:
    """Train under a method, a gradient for each step; the masks after the steps ``at``.

    draws: by step; a method that draws in another step, or without a generator, fails."""
    built = model()
    with drawing(Draws(U0)):
        method = make(built)
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0)
    for group in getattr(method, "parameter_groups", list)():
        optimizer.add_param_group(group)
    masks: list[list[str]] = []
    for step, table in enumerate(gradients):
        optimizer.zero_grad()
        for parameter, gradient in zip(built.parameters(), (tensor(table), half_turned(tensor(table))), strict=False):
            parameter.grad = gradient
        with drawing((draws or {}).get(step)):
            if method.before_step(optimizer):
                optimizer.step()
            method.after_step(optimizer)
        after(method, step)
        masks.append([picture(mask) for mask in method.masks().kept.values()])
    first, *others = ([masks[step][n] for step in at] for n in range(len(masks[0])))
    weights = tuple(parameter.detach() * 16 for parameter in built.parameters())
    return Trace(method, first, others[0] if others else [], weights)


@contextmanager
def drawing(draws: Draws | None) -> Iterator[None]:
    """Inside, torch's random numbers are those of ``draws`` for whoever brings a generator; None: nobody may draw."""

    def table(name: str) -> Callable[..., Tensor]:
        def drawn(*size: Any, generator: torch.Generator) -> Tensor:
            assert draws is not None and size in ((4, 4), ((4, 4),))
            return torch.tensor(getattr(draws, name), dtype=torch.float32)

        return drawn

    def multinomial(chances: Tensor, count: int, *, replacement: bool, generator: torch.Generator) -> Tensor:
        assert draws is not None and replacement and count == len(draws.multinomial)
        assert chances.tolist() == [16, 16]
        return torch.tensor(draws.multinomial)

    with (
        mock.patch.object(torch, "rand", table("uniform")),
        mock.patch.object(torch, "randn", table("normal")),
        mock.patch.object(torch, "multinomial", multinomial),
    ):
        yield
