"""Designed graphs between inputs and outputs: which connections stand before anything is learnt."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pruning.structure import unstructured

# (outputs, inputs, connections to keep, generator) → mask [outputs, inputs] with exactly so many connections
Topology = Callable[[int, int, int, torch.Generator], Any]


def banded(outputs: int, inputs: int, kept: int, generator: torch.Generator) -> Bool[Tensor, "out in"]:
    """The ``kept`` pairs nearest the diagonal: output i sits at (i + ½)/outputs, input j at (j + ½)/inputs.

    One width for the whole band, so that outputs at the two ends have fewer inputs. The generator is not used.
    Raises: ValueError if kept is outside [0, outputs · inputs]."""
    _check(outputs, inputs, kept)
    rows, columns = torch.arange(outputs)[:, None], torch.arange(inputs)
    # whole numbers: equal distances are equal, whatever the sizes
    distance = ((2 * columns + 1) * outputs - (2 * rows + 1) * inputs).abs()
    return unstructured(-distance.double(), outputs * inputs - kept)


def locally_connected(outputs: int, inputs: int, kept: int, generator: torch.Generator) -> Bool[Tensor, "out in"]:
    """Every output sees one run of neighbouring inputs around its own place, moved inside at the two ends.

    All fan-ins are ⌊kept/outputs⌋ or one more. The generator is not used. Raises: as :func:`banded`."""
    _check(outputs, inputs, kept)
    widths = _even(kept, outputs)
    centres = (2 * torch.arange(outputs) + 1) * inputs
    starts = ((centres - widths * outputs) // (2 * outputs)).clamp(min=0).minimum(inputs - widths)
    columns = torch.arange(inputs)
    return (columns >= starts[:, None]) & (columns < (starts + widths)[:, None])


def block_diagonal(outputs: int, inputs: int, kept: int, generator: torch.Generator) -> Bool[Tensor, "out in"]:
    """As many equal diagonal blocks as still hold ``kept`` connections; what they hold beyond it goes at random.

    Inputs and outputs fall into groups that do not see each other, as in a grouped layer. Raises: as :func:`banded`."""
    _check(outputs, inputs, kept)
    for blocks in range(min(outputs, inputs), 0, -1):
        inside = _groups(outputs, blocks)[:, None] == _groups(inputs, blocks)
        if int(inside.sum()) >= kept:
            break
    noise = torch.rand(outputs, inputs, generator=generator).masked_fill(~inside, -1.0)
    return unstructured(noise, outputs * inputs - kept)


def small_world(rewire: float = 0.1) -> Topology:
    """Watts & Strogatz 1998 between two layers: a ring of neighbours, of which a share moves anywhere.

    Each output starts with a run of neighbouring inputs on a ring (fan-ins as in :func:`locally_connected`); every
    connection is moved, with probability ``rewire``, to an input of the same output that was free, drawn at random.
    Raises: ValueError unless rewire is in [0, 1]; as :func:`banded`."""
    if not 0 <= rewire <= 1:
        raise ValueError(f"rewire must be in [0, 1], got {rewire}")

    def topology(outputs: int, inputs: int, kept: int, generator: torch.Generator) -> Bool[Tensor, "out in"]:
        _check(outputs, inputs, kept)
        widths = _even(kept, outputs)
        starts = ((2 * torch.arange(outputs) + 1) * inputs - widths * outputs) // (2 * outputs)
        ring = (torch.arange(inputs) - starts[:, None]) % max(inputs, 1) < widths[:, None]
        asked = ring & (torch.rand(ring.shape, generator=generator) < rewire)
        moves = asked.sum(1).minimum((~ring).sum(1))
        gone = _first(asked, moves, torch.rand(ring.shape, generator=generator))
        made = _first(~ring, moves, torch.rand(ring.shape, generator=generator))
        return (ring & ~gone) | made

    return topology


def _check(outputs: int, inputs: int, kept: int) -> None:
    if not 0 <= kept <= outputs * inputs:
        raise ValueError(f"kept must be in [0, outputs*inputs={outputs * inputs}], got {kept}")


def _even(total: int, parts: int) -> Int[Tensor, "parts"]:
    """``total`` in ``parts`` whole numbers that differ by at most one, the larger ones spread evenly."""
    ends = torch.arange(parts + 1) * total // max(parts, 1)
    return ends.diff()


def _groups(size: int, groups: int) -> Int[Tensor, "size"]:
    return torch.arange(size) * groups // size


def _first(among: Tensor, counts: Tensor, noise: Tensor) -> Bool[Tensor, "out in"]:
    """In each row ``counts`` of the places ``among``, those of least noise."""
    order = noise.masked_fill(~among, torch.inf).argsort(1).argsort(1)
    return among & (order < counts[:, None])
