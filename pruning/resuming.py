"""Whose state a checkpoint holds: states name their method, and what a run must not change when it goes on."""

from collections.abc import Collection, Mapping
from typing import Any

Setting = bool | int | float


def named(method: object, asked: Mapping[str, Setting] | None = None) -> dict[str, Any]:
    """What a state begins with: the method's name, and the settings that must be the same when it is loaded."""
    return {"method": type(method).__name__, "asked": dict(asked or {})}


def check_named(
    state: Mapping[str, Any],
    method: object,
    asked: Mapping[str, Setting] | None = None,
    *,
    unnamed: Collection[str] = (),
) -> None:
    """Look at the name and the settings of a state before anything is taken from it.

    unnamed: the keys of a state from before states were named, where no other method's had the same.
    Raises: ValueError for the state of another method, for one without a name whose keys are not ``unnamed``, and for
    the first setting that differs."""
    name = type(method).__name__
    if "method" not in state and unnamed and set(state) == set(unnamed):
        return
    if "method" not in state:
        raise ValueError(
            f"state must be one of {name}, got one that names no method, with {sorted(state)}: it may be another"
            " method's, from before states were named; start the run anew"
        )
    if state["method"] != name:
        raise ValueError(f"state must be one of {name}, got one of {state['method']}: go on with the method of before")
    for setting, now in (asked or {}).items():
        if state["asked"].get(setting) != now:
            before = state["asked"].get(setting)
            raise ValueError(f"{setting} must be {before}, with which the state of {name} was trained, got {now}")
