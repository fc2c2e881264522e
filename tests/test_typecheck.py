import pytest
from jaxtyping import TypeCheckError

from pruning.axes import Axis
from tests.typecheck import unchecked


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
