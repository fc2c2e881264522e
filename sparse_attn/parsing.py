"""Pattern expressions as text, for config files: the inverse of ``str(pattern)``."""

import ast
from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature

from sparse_attn.patterns import Pattern, causal, full, sinks, sliding_window

PATTERNS: dict[str, Callable[..., Pattern]] = {
    function.__name__: function for function in (full, causal, sliding_window, sinks)
}


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` writes: calls with integer arguments, ``&``, ``|`` and parentheses.

    >>> parse_pattern("causal() & (sliding_window(256) | sinks(4))") == causal() & (sliding_window(256) | sinks(4))
    True

    The text is parsed, never evaluated. ``parse_pattern(str(p)) == p`` for every pattern.
    Raises: ValueError naming the offending part; an unknown name comes with the nearest known one.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        raise ValueError(
            f"pattern must be an expression such as 'causal() & sliding_window(256)', got {text!r}"
        ) from error
    return _build(tree.body)


def _build(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
            return _build(left) & _build(right)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _build(left) | _build(right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call(name, args, keywords)
        case ast.Name(id=name) if name in PATTERNS:
            raise ValueError(f"pattern {name!r} must be called: write {name}(...)")
        case ast.Name(id=name):
            raise ValueError(_unknown(name))
    raise ValueError(f"a pattern may hold calls, & and | only, got {ast.unparse(node)!r}")


def _call(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Pattern:
    if name not in PATTERNS:
        raise ValueError(_unknown(name))
    named = {keyword.arg or "**": _integer(keyword.value) for keyword in keywords}
    values = [_integer(arg) for arg in args]
    names = list(signature(PATTERNS[name]).parameters)
    given = names[: len(values)] + list(named)
    if len(values) > len(names) or sorted(given) != sorted(names):
        got = ", ".join([*map(str, values), *(f"{key}={value}" for key, value in named.items())])
        raise ValueError(f"{name} takes ({', '.join(names)}), got ({got})")
    return PATTERNS[name](*values, **named)


def _integer(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
    raise ValueError(f"pattern arguments must be integers, got {ast.unparse(node)!r}")


def _unknown(name: str) -> str:
    nearest = get_close_matches(name, PATTERNS, n=1, cutoff=0.0)
    return f"unknown pattern {name!r}, did you mean {nearest[0]!r}? Known: {', '.join(sorted(PATTERNS))}"
