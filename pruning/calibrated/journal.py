"""Where finished blocks are kept, so that a run which was ended goes on behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibrated.report import MatrixReport


@dataclass(frozen=True)
class Finished:
    """One pruned matrix: its report, its new values as stored in the model but laid out [out, in], what was kept."""

    report: MatrixReport
    weight: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]


@runtime_checkable
class Journal(Protocol):
    """Keeps what `prune_calibrated` has finished: the blocks in order, and after them the weights outside blocks.

    A block that `read` gives back is not pruned again: its matrices take the values kept, and the blocks after it see
    what the pruned block puts out, so that the result is that of a run never ended, to the bit on the same machine."""

    def read(self, index: int) -> Sequence[Finished] | None:
        """The matrices of block `index`; None if it is not finished."""

    def write(self, index: int, matrices: Sequence[Finished]) -> None:
        """Keep the matrices of block `index`."""
