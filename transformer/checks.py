"""What the config records ask of their fields."""

import dataclasses
import types
import typing
from typing import Any


def check_fields(record: Any) -> None:
    """Every field has its declared type. Raises: ValueError naming the first that has not."""
    for f in dataclasses.fields(record):
        _check_type(f.name, getattr(record, f.name), f.type)


def _check_type(name: str, value: object, declared: Any) -> None:
    allowed = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    generic = (typing.get_origin(t) or t for t in allowed)
    plain = tuple(t for t in generic if isinstance(t, type))
    if not plain or dataclasses.is_dataclass(plain[0]):
        return
    fits = isinstance(value, plain) or (float in plain and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in plain):
        raise ValueError(f"{name} must be {' or '.join(t.__name__ for t in plain)}, got {value!r}")
