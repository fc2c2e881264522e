"""Two ways to compute the same, dense and sparse, timed in turns on the calls of a module that runs anyway."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from torch import Tensor

Way = Literal["dense", "sparse"]

# timed calls of either way, after one that starts threads and makes tables
CALLS = 5
# the sparse way keeps a second copy of the weights, for which it must save a twentieth
WORTH_A_COPY = 0.95


@dataclass(frozen=True)
class Timing:
    """Median seconds of the two ways to compute one product."""

    dense: float
    sparse: float

    @property
    def fastest(self) -> Way:
        """sparse if it took at most WORTH_A_COPY of the dense time."""
        return "sparse" if self.sparse <= WORTH_A_COPY * self.dense else "dense"


@dataclass
class Race:
    """Calls take turns between the ways and are timed, until each had CALLS; then the faster way takes them all.

    What is timed is what runs: real operands, weights as cold as the other layers leave them, and the search for zeros.
    chosen: None while the ways take turns. timing: None until that is over, and where the choice was given.
    """

    chosen: Way | None = None
    timing: Timing | None = None
    seconds: dict[Way, list[float]] = field(default_factory=lambda: {"dense": [], "sparse": []})

    def run(self, dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Tensor:
        """The result of the way whose turn it is, or that was chosen."""
        way = self.chosen
        if way is None:
            way = "dense" if len(self.seconds["dense"]) == len(self.seconds["sparse"]) else "sparse"
            start = time.perf_counter()
        y = dense() if way == "dense" else sparse()
        if self.chosen is None:
            self.seconds[way].append(time.perf_counter() - start)
            if len(self.seconds["sparse"]) > CALLS:
                self.timing = Timing(median(self.seconds["dense"][1:]), median(self.seconds["sparse"][1:]))
                self.chosen = self.timing.fastest
        return y
