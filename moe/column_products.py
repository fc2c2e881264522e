"""A linear map of mostly-zero inputs in decoding: the columns to read, from a kept copy, where that is faster."""

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.activation import ColumnTable, column_table, nonzeros, sparse_matvec
from moe.race import Race

Execution = Literal["auto", "dense", "sparse"]
# decoding batches; with more rows, few weights are left that no row needs
DECODE_ROWS = 4
# with fewer zeros than this there is nothing to save
WORTH_TIMING = 0.95

Made = TypeVar("Made")


@dataclass(frozen=True)
class Kept(Generic[Made]):
    """What was made from a weight, and that weight: holding it keeps its address from being used again."""

    source: Tensor
    version: int
    made: Made


def kept(
    store: MutableMapping[str, Kept[Made]],
    name: str,
    weight: Float[Tensor, "O F"],
    make: Callable[[Float[Tensor, "O F"]], Made],
) -> Made:
    """``make(weight)`` from ``store``, made anew after any change that torch counts (not through ``.data``)."""
    weight = weight.detach()
    version = 0 if weight.is_inference() else weight._version
    known = store.get(name)
    if known is None or known.version != version or known.source.data_ptr() != weight.data_ptr():
        known = store[name] = Kept(weight, version, make(weight))
    return known.made


def decodes(x: Tensor, width: int, *, execution: Execution, training: bool) -> bool:
    """Whether x is a decoding batch: a few rows of ``width`` on the CPU, in evaluation, no gradient, no autocast."""
    # a DTensor has parts elsewhere
    quiet = type(x) is Tensor and not torch.is_grad_enabled() and not training and execution != "dense"
    small = 0 < x.numel() <= DECODE_ROWS * width and x.device.type == "cpu"
    return quiet and small and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


class Case(NamedTuple):
    """What a choice holds for: rows of x and their type, threads of torch, and what the layer drops."""

    rows: int
    dtype: torch.dtype
    threads: int
    dropped: Hashable


class DecodesSparsely(nn.Module):
    """A module whose products in decoding leave out what meets zeros, where that is faster, with what this needs.

    execution: "sparse" does so always, "dense" never, "auto" where a :class:`Race` found it faster. races: those, by
    case and weight.
    """

    execution: Execution

    def __init__(self) -> None:
        super().__init__()
        self.start_anew()

    def start_anew(self) -> None:
        """Drop the tables for decoding and what was found out about times."""
        self._tables: dict[str, Kept[ColumnTable]] = {}
        self.races: dict[Case, dict[str, Race]] = {}
        self._over: dict[Case, bool] = {}

    def forget_tables(self) -> None:
        """Drop the decode path's copies of the weights; it makes them again when it needs them."""
        self._tables.clear()

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; training drops the decode tables, and what was measured."""
        if mode:
            self.start_anew()
        return super().train(mode)

    def all_dense(self, case: Case) -> bool:
        """Whether dense was found to be the faster way for every product in this case."""
        return self.execution == "auto" and self._over.get(case, False)

    def settle(self, case: Case) -> None:
        """Note, after a pass through all products, whether all races are over; tables that none needs are dropped."""
        if self.execution != "auto" or case in self._over:
            return
        ways = {race.chosen for race in self.races[case].values()}
        if None not in ways:
            self._over[case] = ways == {"dense"}
            needed = {name for races in self.races.values() for name, race in races.items() if race.chosen != "dense"}
            for name in self._tables.keys() - needed:
                del self._tables[name]

    def times_nonzeros(
        self,
        name: str,
        x: Float[Tensor, "n F"],
        weight: Float[Tensor, "O F"],
        bias: Float[Tensor, "O"] | None,
        case: Case,
    ) -> Float[Tensor, "n O"]:
        """x Wᵀ + b, without reading the columns of W that meet zeros only where that is wanted or faster."""

        def sparse() -> Tensor:
            y = sparse_matvec(nonzeros(x), kept(self._tables, name, weight, column_table))
            return y if bias is None else y.add_(bias.detach())

        return self.faster(
            name, case, dense=lambda: F.linear(x, weight, bias), sparse=sparse,
            density=lambda: x.count_nonzero().item() / x.numel(),
        )  # fmt: skip

    def faster(
        self,
        name: str,
        case: Case,
        *,
        dense: Callable[[], Tensor],
        sparse: Callable[[], Tensor],
        density: Callable[[], float],
    ) -> Tensor:
        """One of the two, by ``execution``; dense without a race where the first call has hardly a zero."""
        if self.execution == "sparse":
            return sparse()
        races = self.races.setdefault(case, {})
        if name not in races:
            races[name] = Race("dense" if density() >= WORTH_TIMING else None)
        return races[name].run(dense, sparse)
