"""A probe's figures as SVG text, written out here so that the same records give the same bytes everywhere."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from training.study.panels import Point

WIDTH, LABELS, SPAN, ROW = 760, 258, (272, 736), 24
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 } .muted { fill: #5f6b7a } .title { font-weight: 600 }
.grid { stroke: #d5dbe2 } .seed { fill: #0f766e; opacity: .7 } .mean { stroke: #0f766e; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6e9ee } .muted { fill: #9aa5b4 } .grid { stroke: #3a4452 }
.seed { fill: #2dd4bf } .mean { stroke: #2dd4bf } }
"""


@dataclass(frozen=True)
class Dots:
    """Rows of dots on a common axis: label → values by seed."""

    title: str
    rows: Mapping[str, Sequence[float]]


def mean_points(runs: Iterable[Iterable[tuple[float, float]]]) -> list[Point]:
    """(x, y) of each seed's run → a point at each x: mean and sample standard deviation (0 for one seed)."""
    found: dict[float, list[float]] = {}
    for run in runs:
        for x, y in run:
            found.setdefault(x, []).append(y)
    return [
        Point(x, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for x, values in sorted(found.items())
    ]


def dots_svg(title: str, groups: Sequence[Dots]) -> str:
    """Groups one below the other, each on its own scale: a dot a seed, a bar at the mean.

    Raises: ValueError for a group without values.
    """
    parts: list[str] = []
    top = 10.0
    for group in groups:
        parts += _group(group, top)
        top += 60 + ROW * len(group.rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title><style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def _group(group: Dots, top: float) -> list[str]:
    values = [value for row in group.rows.values() for value in row]
    if not values:
        raise ValueError(f"group {group.title!r} must have at least one value, got none")
    pad = 0.06 * (max(values) - min(values)) or 0.01
    low, high = min(values) - pad, max(values) + pad
    bottom = top + 26 + ROW * len(group.rows)
    parts = [_text(SPAN[0], top + 14, group.title, kind="title")]
    for value, text in _ticks(low, high):
        x = _place(value, low, high)
        parts += [_line("grid", x, top + 22, x, bottom), _text(x, bottom + 16, text, kind="muted", anchor="middle")]
    for index, (label, row) in enumerate(group.rows.items()):
        y = top + 26 + ROW * (index + 0.5)
        parts.append(_text(LABELS, y + 4, label, anchor="end"))
        parts += [f'<circle class="seed" cx="{_place(v, low, high):.1f}" cy="{y:.1f}" r="4"/>' for v in row]
        if row:
            x = _place(statistics.fmean(row), low, high)
            parts.append(_line("mean", x, y - 8, x, y + 8))
    return parts


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:.{decimals}f}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _place(value: float, low: float, high: float) -> float:
    return SPAN[0] + (value - low) / (high - low) * (SPAN[1] - SPAN[0])


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
