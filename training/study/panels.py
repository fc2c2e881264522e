"""Panels of curves as SVG text, one legend for all: the same values give the same bytes everywhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, TOP, PLOT, ROW, LEGEND = 760, 30, 220, 290, 20
SIDES = ((60, 370), (440, 750))
COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c", "#1d4ed8", "#4d7c0f", "#a21caf", "#0e7490", "#92400e", "#475569",
           "#e11d48", "#059669")  # fmt: skip
SQUARE = ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5))
TRIANGLE = ((0.0, -4.5), (4.2, 3.2), (-4.2, 3.2))
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 } .muted { fill: #5f6b7a } .title { font-weight: 600 }
.grid { stroke: #d5dbe2 } polyline { fill: none; stroke-width: 1.8 }
@media (prefers-color-scheme: dark) { text { fill: #e6e9ee } .muted { fill: #9aa5b4 } .grid { stroke: #3a4452 }
polyline, .mark, .bar { filter: brightness(1.5) } }
"""


@dataclass(frozen=True)
class Point:
    """A mean and the seeds' spread about it (0 where there is none) at ``x``."""

    x: float
    mean: float
    spread: float = 0.0


@dataclass(frozen=True)
class Panel:
    """title, the x axis's name, whether it is logarithmic, and curves: label → points."""

    title: str
    axis: str
    curves: Mapping[str, Sequence[Point]]
    log: bool = False


def panels_svg(panels: Sequence[Panel], *, title: str) -> str:
    """Two panels a row; a curve has the same colour and mark in all. Bars: ± the spread.

    Raises: ValueError without any point."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    if not any(points for panel in panels for points in panel.curves.values()):
        raise ValueError("panels must hold at least one point, got none")
    rows, legend = math.ceil(len(panels) / 2), math.ceil(len(labels) / 3)
    height = rows * ROW + legend * LEGEND + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, labels, span=SIDES[index % 2], top=index // 2 * ROW)
    for index, label in enumerate(labels):
        x, y = 60 + index % 3 * 235, rows * ROW + index // 3 * LEGEND + 10
        parts += [_mark(index, x, y), _text(x + 12, y + 4, label)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, labels: Sequence[str], *, span: tuple[int, int], top: int) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    if not points:
        return []
    wide = [math.log10(p.x) if panel.log else p.x for p in points]
    x_range = _padded(min(wide), max(wide))
    y_range = _padded(min(p.mean - p.spread for p in points), max(p.mean + p.spread for p in points))
    low = top + TOP + PLOT

    def place(point: Point, value: float) -> tuple[float, float]:
        x = math.log10(point.x) if panel.log else point.x
        return _scale(x, *x_range, *span), _scale(value, *y_range, low, top + TOP)

    parts = [_text(span[0], top + 18, panel.title, kind="title")]
    parts += _y_axis(y_range, span, low, top + TOP) + _x_axis(panel, x_range, span, low)
    for label, curve in panel.curves.items():
        index, ordered = labels.index(label), sorted(curve, key=lambda p: p.x)
        path = " ".join("{:.1f},{:.1f}".format(*place(p, p.mean)) for p in ordered)
        parts.append(f'<polyline points="{path}" stroke="{COLOURS[index % len(COLOURS)]}"/>')
        for p in ordered:
            (x, y), (_, least), (_, most) = place(p, p.mean), place(p, p.mean - p.spread), place(p, p.mean + p.spread)
            parts += [_line("bar", x, least, x, most, COLOURS[index % len(COLOURS)]), _mark(index, x, y)]
    return parts


def _y_axis(values: tuple[float, float], span: tuple[int, int], low: float, high: float) -> list[str]:
    parts = []
    for value, text in _ticks(*values, most=6):
        y = _scale(value, *values, low, high)
        parts += [_line("grid", span[0], y, span[1], y), _text(span[0] - 6, y + 4, text, kind="muted", anchor="end")]
    return parts


def _x_axis(panel: Panel, values: tuple[float, float], span: tuple[int, int], low: float) -> list[str]:
    ticks = _powers(*values) if panel.log else _ticks(*values, most=6)
    parts = [_text(span[1], low + 34, panel.axis, kind="muted", anchor="end")]
    for value, text in ticks:
        x = _scale(value, *values, *span)
        parts += [_line("grid", x, low, x, low + 4), _text(x, low + 18, text, kind="muted", anchor="middle")]
    return parts


def _ticks(low: float, high: float, *, most: int) -> list[tuple[float, str]]:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:.{decimals}f}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """1, 2 and 5 times powers of ten between 10^low and 10^high, or all digits where those are fewer than three."""
    found: list[float] = []
    for digits in ((1, 2, 5), range(1, 10)):
        values = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
        found = [value for value in values if low <= math.log10(value) <= high]
        if len(found) > 2:
            break
    return [(math.log10(value), _prefixed(value)) for value in found]


def _prefixed(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - pad, high + pad


def _scale(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / (high - low) * (end - start)


def _mark(index: int, x: float, y: float) -> str:
    colour, shape = COLOURS[index % len(COLOURS)], index % 3
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    corners = SQUARE if shape == 1 else TRIANGLE
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{path}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, colour: str | None = None) -> str:
    stroke = "" if colour is None else f' stroke="{colour}"'
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{stroke}/>'
