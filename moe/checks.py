"""Numbers that callers give, checked in one way."""

import math


def at_least(name: str, value: object, least: int) -> None:
    """Raises: ValueError unless ``value`` is an int (True is none) of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def within(name: str, value: object, least: int, most: int, *, most_name: str) -> None:
    """Raises: ValueError unless ``value`` is an int in [least, most]; ``most_name`` says what bounds it."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most_name}={most}], got {value!r}")


def whole(name: str, value: object) -> None:
    """Raises: ValueError unless ``value`` is an int, which True is not."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises: ValueError listing the allowed values if ``value`` is none of them."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def magnitude(name: str, value: object) -> None:
    """Raises: ValueError unless ``value`` is a number >= 0, which NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0.0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")


def positive(name: str, value: object) -> None:
    """Raises: ValueError unless ``value`` is a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def not_negative(name: str, value: object) -> None:
    """Raises: ValueError unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def below_one(name: str, value: object) -> None:
    """Raises: ValueError unless ``value`` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
