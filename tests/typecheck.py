"""The type checker that the import hook of conftest.py applies to every function and record of the packages."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import isgeneratorfunction
from types import SimpleNamespace
from typing import Any, Self, TypeVar, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, config

F = TypeVar("F", bound=Callable[..., Any])
# is_pep484_tower: an int is a float, as for every other Python type checker.
_CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeCheckError)
_BY_JAXTYPING = jaxtyping.jaxtyped
_NAMES = _BY_JAXTYPING("context")  # in which one name of a dimension has one size


def install(packages: Sequence[str]) -> None:
    """Have every function and dataclass of packages that are not imported yet checked, by jaxtyping's import hook.

    The hook's code calls the decorator ``checked``: jaxtyping's own binds the arguments of every call to the signature
    and checks them twice, which costs more than one check."""
    jaxtyping.jaxtyped = lambda *, typechecker: typechecker
    jaxtyping.install_import_hook(list(packages), "tests.typecheck.checked")


def checked(decorated: Any) -> Any:
    """A function whose arguments and result beartype checks, as are those of a dataclass's ``__init__``, of methods
    and of properties; other classes as they are."""
    if isinstance(decorated, type):
        made = vars(decorated).get("__init__")
        if dataclasses.is_dataclass(decorated) and made is not None and not hasattr(made, "__wrapped__"):
            decorated.__init__ = _checked(made)  # type: ignore[misc]
        return decorated
    if isinstance(decorated, classmethod | staticmethod):
        return type(decorated)(_checked(decorated.__func__))
    if isinstance(decorated, property):
        parts = (decorated.fget, decorated.fset, decorated.fdel)
        return property(*(None if part is None else _checked(part) for part in parts))
    return _checked(decorated)


def _checked(function: F) -> F:
    hints = function.__annotations__
    function.__annotations__ = {name: _resolved(hint, function) for name, hint in hints.items()}
    if isgeneratorfunction(function):  # what beartype makes of it would look at its arguments at the first "next"
        return _BY_JAXTYPING(function, typechecker=beartype(conf=_CONF))
    inner = beartype(conf=_CONF)(function)
    function.__annotations__ = hints

    @wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _NAMES:
            return inner(*args, **kwargs)

    return outer


def _resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """Any where the hint is of what the module defines further down; and for ``Self``, which beartype must not meet:
    the hook decorates methods one by one, outside their class."""
    try:
        found = get_type_hints(
            SimpleNamespace(__annotations__={"hint": hint}), function.__globals__, include_extras=True
        )
    except Exception:  # noqa: BLE001  what evaluating a hint raises
        return Any
    return Any if found["hint"] is Self else found["hint"]


@contextmanager
def unchecked() -> Iterator[None]:
    """What a person meets, whose arguments nothing checks but the library itself: for tests of its error messages."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)
