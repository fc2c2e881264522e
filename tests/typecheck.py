"""The type checker that the import hook of conftest.py applies to every function and record of the packages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import config

F = TypeVar("F", bound=Callable[..., Any])
# is_pep484_tower: an int is a float, as for every other Python type checker.
_CONF = BeartypeConf(is_pep484_tower=True)


def checked(function: F) -> F:
    """beartype, which must not meet ``Self``: the hook decorates methods one by one, outside their class."""
    hints = getattr(function, "__annotations__", {})
    for name in [name for name, hint in hints.items() if hint is Self]:
        hints[name] = Any
    return beartype(conf=_CONF)(function)


@contextmanager
def unchecked() -> Iterator[None]:
    """What a person meets, whose arguments nothing checks but the library itself: for tests of its error messages."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
