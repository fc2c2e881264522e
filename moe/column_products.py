"""A linear map of mostly-zero inputs in decoding: the columns to read, from a kept copy, where that is faster."""

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe.activation import ColumnTable, column_table, nonzeros, sparse_matvec
from moe.race import Race

Execution = Literal["auto", "dense", "sparse"]
# decoding batches; with more rows, few weights are left that no row needs
DECODE_ROWS = 4
# with fewer zeros than this there is nothing to save
WORTH_TIMING = 0.95
# among the names of races: the layer's, which follows those of its products
WHOLE = "layer"
# calls for which a choice holds, where nothing was timed and where it was; each time after, for twice as many
UNTIMED_CALLS, TIMED_CALLS, MOST_CALLS = 32, 1024, 1 << 16
# cases that a layer tells apart; beyond, the oldest is forgotten
MOST_CASES = 64

Made = TypeVar("Made")


@dataclass(eq=False)
class Kept(Generic[Made]):
    """What was made from a weight, and that weight: holding it keeps its address from being used again.

    version: -1 once an optimiser has stepped on the weight, which fused ones do without counting it as a change."""

    source: Tensor
    version: int
    made: Made


_all_kept: WeakSet[Kept[Any]] = WeakSet()


def _outdate(optimizer: Optimizer, *_: object) -> None:
    """After each step of any optimiser."""
    if not _all_kept:
        return
    stepped = {_memory(p) for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor)}
    for one in _all_kept:
        if _memory(one.source) in stepped:
            one.version = -1


def _memory(x: Tensor) -> int:
    """Where the numbers lie, whichever part of them x is; 0 for what has no memory of its own (DTensor)."""
    return x.untyped_storage().data_ptr() if type(x) in (Tensor, nn.Parameter) else 0


register_optimizer_step_post_hook(_outdate)


def kept(
    store: MutableMapping[str, Kept[Made]],
    name: str,
    weight: Float[Tensor, "O F"],
    make: Callable[[Float[Tensor, "O F"]], Made],
) -> Made:
    """``make(weight)`` from ``store``, made anew after any change that torch counts and any step of an optimiser (not
    after writes through ``.data``); for each call from a weight of ``torch.inference_mode``, which counts no change."""
    weight = weight.detach()
    if weight.is_inference():
        return make(weight)
    known = store.get(name)
    if known is None or known.version != weight._version or known.source.data_ptr() != weight.data_ptr():
        known = store[name] = Kept(weight, weight._version, make(weight))
        _all_kept.add(known)
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


@dataclass
class Verdict:
    """The way that a layer takes for ``left`` of ``calls`` calls."""

    dense: bool
    calls: int
    left: int


class DecodesSparsely(nn.Module):
    """A module whose products in decoding leave out what meets zeros, where that is faster, with what this needs.

    execution: "sparse" does so always, "dense" never, "auto" where a :class:`Race` found it faster, of each product and
    then of the whole layer. What was found holds for TIMED_CALLS calls, and each time it is found again for twice as
    many: inputs may become sparser or denser, and weights be loaded. races: by case, and weight or WHOLE. Copies and
    pickles of the module find out for themselves.
    """

    execution: Execution

    def __init__(self) -> None:
        super().__init__()
        self.start_anew()

    def start_anew(self) -> None:
        """Drop the tables for decoding and what was found out about times."""
        self._tables: dict[str, Kept[ColumnTable]] = {}
        self.races: dict[Case, dict[str, Race]] = {}
        self._verdicts: dict[Case, Verdict] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without copies of the weights and times of this machine."""
        return self.__dict__ | {"_tables": {}, "races": {}, "_verdicts": {}}

    def forget_tables(self) -> None:
        """Drop the decode path's copies of the weights; it makes them again when it needs them."""
        self._tables.clear()

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; training drops the decode tables, and what was measured."""
        if mode:
            self.start_anew()
        return super().train(mode)

    def decided(self, case: Case, *, dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> Tensor:
        """The layer's output the dense way or the sparse one, in which :meth:`faster` chooses for each product.

        Once those choices are made the two ways race too: what the choosing itself costs may not be worth it.
        """
        if self.execution == "sparse":
            return sparse()
        verdict = self._verdicts.get(case)
        if verdict is not None and verdict.left:
            verdict.left -= 1
            if not verdict.left:
                self.races.pop(case, None)
            return dense() if verdict.dense else sparse()
        races = self._races_of(case)
        whole = races.get(WHOLE)
        if whole is None:
            y = sparse()
            ways = {race.chosen for race in races.values()}
            if None not in ways:
                races[WHOLE] = whole = Race("dense" if ways == {"dense"} else None)
        else:
            y = whole.run(dense, sparse)
        if whole is not None and whole.chosen is not None:
            calls = TIMED_CALLS if any(race.timing for race in races.values()) else UNTIMED_CALLS
            if verdict is not None:
                calls = min(max(calls, 2 * verdict.calls), MOST_CALLS)
            self._verdicts[case] = Verdict(whole.chosen == "dense", calls, calls)
            self._drop_unread()
        return y

    def _races_of(self, case: Case) -> dict[str, Race]:
        if case not in self.races and len(self.races) >= MOST_CASES:
            oldest = next(iter(self.races))
            del self.races[oldest]
            self._verdicts.pop(oldest, None)
        return self.races.setdefault(case, {})

    def _drop_unread(self) -> None:
        """Drop the tables that no case reads, or may come to read."""
        read = set[str]()
        for case, races in self.races.items():
            verdict = self._verdicts.get(case)
            if verdict is None or not (verdict.dense and verdict.left):
                read |= {name for name, race in races.items() if race.chosen != "dense"}
        for name in self._tables.keys() - read:
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
            found = nonzeros(x)
            if self.execution == "auto" and len(found.columns) >= WORTH_TIMING * x.numel():
                return F.linear(x, weight, bias)
            y = sparse_matvec(found, kept(self._tables, name, weight, column_table))
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
        races = self._races_of(case)
        if name not in races:
            races[name] = Race("dense" if density() >= WORTH_TIMING else None)
        return races[name].run(dense, sparse)
