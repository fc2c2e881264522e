from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import pytest
import torch
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

from pruning.axes import Axis
from tests.typecheck import checked, unchecked


def _axis(**changed):
    return Axis(**{"kind": "head", "layer": 0, "name": "a", "size": 4, "width": 1, "gate": "", "slices": (),
                   "resize": print, **changed})  # fmt: skip


def test_the_packages_are_checked():
    with pytest.raises(TypeCheckError, match="kind"):
        _axis(kind=3)


def test_unchecked_meets_the_librarys_own_errors_and_ends():
    with unchecked(), pytest.raises(ValueError, match="groups must divide size=4"):
        _axis(kind=3, groups=3)
    with pytest.raises(TypeCheckError):
        _axis(kind=3)


@checked
def _picked(x: Float[Tensor, "T D"], index: Int[Tensor, "N"], *, wide: bool = False) -> Float[Tensor, "N D"]:
    return x[index, :1].expand(-1, 2 * x.shape[1]) if wide else x[index]


@checked
def _rows(x: Float[Tensor, "T D"], y: Float[Tensor, "T"]) -> Iterator[Tensor]:
    yield from x * y[:, None]


@checked
@dataclass(frozen=True)
class _Pair:
    x: Float[Tensor, "T D"]
    y: Float[Tensor, "T"]

    @checked
    @classmethod
    def of(cls, size: int) -> Self:
        return cls(torch.ones(size, 2), torch.ones(size))

    @checked
    @staticmethod
    def doubled(number: float) -> float:
        return number * 2 if number > 0 else "none"

    @checked
    @property
    def column(self) -> Float[Tensor, "T 1"]:
        return self.x[:, :1] if self.x.shape[1] == 2 else self.x

    @checked
    def joined(self, other: "_Pair") -> "_Pair":
        return _Pair(_picked(self.x, torch.tensor([0])), other.y[:1])


X, Y, PLACES = torch.ones(3, 2), torch.ones(3), torch.tensor([2, 0])


def test_a_name_has_one_size_in_a_call_and_another_in_the_next():
    assert _picked(X, PLACES).shape == (2, 2) and _picked(torch.ones(5, 7), PLACES).shape == (2, 7)
    assert len(list(_rows(X, Y))) == 3
    assert _Pair.of(4).joined(_Pair.of(3)).x.shape == (1, 2) and _Pair.doubled(2) == 4
    assert _Pair(X, Y).column.shape == (3, 1)
    with unchecked():
        assert _picked(X, PLACES, wide=True).shape == (2, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _picked(X.long(), PLACES),
        lambda: _picked(X, PLACES.float()),
        lambda: _picked(X, index=PLACES[None]),
        lambda: _picked(X, PLACES, wide=1),
        lambda: _picked(X, PLACES, wide=True),
        lambda: _rows(X, Y[:2]),
        lambda: _Pair(X, Y[:2]),
        lambda: _Pair.of("three"),
        lambda: _Pair.doubled(-1.0),
        lambda: _Pair(torch.ones(3, 4), Y).column,
    ],
    ids=["type", "integers", "dimensions", "flag", "result", "generator", "record", "class", "static", "property"],
)
def test_what_does_not_fit_is_refused_at_the_call(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_call_with_the_wrong_number_of_arguments_is_pythons_own_error():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'index'"):
        _picked(X)
