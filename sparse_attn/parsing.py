"""Pattern expressions as text, for config files: the inverse of ``str(pattern)``."""

import ast
from collections.abc import Callable
from difflib import get_close_matches
from functools import reduce
from inspect import Parameter, Signature, signature
from operator import and_, or_
from typing import Any

from sparse_attn import patterns
from sparse_attn.patterns import Pattern

PATTERNS: dict[str, Callable[..., Pattern]] = {
    name: getattr(patterns, name) for name in patterns.__all__ if name not in ("Pattern", "PerHead")
}

# characters of a text that an error shows
SHOWN = 200


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` writes: calls with integers or lists of them, ``&``, ``|``, ``~`` and parentheses.

    >>> parse_pattern("causal() & (sliding_window(256) | sinks(4))") == causal() & (sliding_window(256) | sinks(4))
    True

    The text is parsed, never evaluated. ``parse_pattern(str(p)) == p`` for every pattern that Python's own parser can
    read: of more than some thousand parts, or nested some hundred deep, it cannot.
    Raises: ValueError naming the offending part; an unknown name comes with the nearest known one.
    """
    if not isinstance(text, str):
        raise TypeError(f"pattern must be text such as 'causal()', got {text!r}")
    try:
        return _build(_parsed(text.strip()))
    except (RecursionError, MemoryError) as error:  # MemoryError: the parser's own stack
        raise ValueError(
            f"pattern must have fewer parts, and be nested less deeply, for Python's parser; got {_short(text)}"
        ) from error


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        raise ValueError(
            f"pattern must be an expression such as 'causal() & sliding_window(256)', got {_short(text)}"
        ) from error


def _short(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}… of {len(text)} characters"


def _build(node: ast.expr) -> Pattern:
    match node:
        case ast.BinOp(op=ast.BitAnd()):
            return reduce(and_, map(_build, _chain(node, ast.BitAnd)))
        case ast.BinOp(op=ast.BitOr()):
            return reduce(or_, map(_build, _chain(node, ast.BitOr)))
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return ~_build(operand)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call(name, args, keywords)
        case ast.Name(id=name) if name in PATTERNS:
            raise ValueError(f"pattern {name!r} must be called: write {name}(...)")
        case ast.Name(id=name):
            raise ValueError(_unknown(name))
    raise ValueError(f"a pattern may hold calls, &, | and ~ only, got {ast.unparse(node)!r}")


def _chain(node: ast.expr, op: type[ast.operator]) -> list[ast.expr]:
    """a, b, c of ``a op b op c``, without a call for each: a chain may be longer than the stack."""
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, op):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _call(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Pattern:
    if name not in PATTERNS:
        raise ValueError(_unknown(name))
    values = [_build(arg) if name == "per_head" else _value(arg) for arg in args]
    named = {keyword.arg or "**": _value(keyword.value) for keyword in keywords}
    # what is keyword-only (a generator) cannot be written as text
    known = [p for p in signature(PATTERNS[name]).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    try:
        Signature(known).bind(*values, **named)
    except TypeError as error:
        got = ", ".join([*map(str, values), *(f"{key}={value}" for key, value in named.items())])
        raise ValueError(f"{name} takes ({', '.join(map(_shown, known))}), got ({got})") from error
    try:
        return PATTERNS[name](*values, **named)
    except TypeError as error:  # a list where a number belongs
        raise ValueError(f"{name}: {error}") from error


def _shown(parameter: Parameter) -> str:
    stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
    default = "" if parameter.default is parameter.empty else f"={parameter.default}"
    return f"{stars}{parameter.name}{default}"


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
    raise ValueError(f"pattern arguments must be integers or lists of them, got {ast.unparse(node)!r}")


def _unknown(name: str) -> str:
    nearest = get_close_matches(name, PATTERNS, n=1, cutoff=0.0)
    return f"unknown pattern {name!r}, did you mean {nearest[0]!r}? Known: {', '.join(sorted(PATTERNS))}"
