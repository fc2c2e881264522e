"""Line figures as SVG text, written out here so that the same records give the same bytes everywhere."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 64, 16, 36, 84
COLOURS = ("#8a8f98", "#1f8fbf", "#d9822b", "#8f5bd6", "#2f9e44", "#c2255c", "#0b7285")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.title{fill:#eee}.grid{stroke:#444}}"
)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """low … high, from ``start`` to ``end`` in pixels, logarithmic or not."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = (math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (here - low) / (high - low)

    def ticks(self) -> list[float]:
        """Powers of ten, or at most six round numbers."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
        return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def line_figure(
    lines: Mapping[str, Points], *, title: str, across: str, log_x: bool = False, log_y: bool = True, dots: bool = True
) -> str:
    """One polyline for each name, on axes that hold all points; ``across`` names the horizontal one.

    Raises: ValueError without a point, or for one that a logarithmic axis cannot hold."""
    points = [point for one in lines.values() for point in one]
    if not points:
        raise ValueError("lines must hold at least one point, got none")
    if any((log_x and x <= 0) or (log_y and y <= 0) for x, y in points):
        raise ValueError("points must be positive on a logarithmic axis")
    x_axis = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log=log_x, round_out=False)
    y_axis = _axis([y for _, y in points], HEIGHT - BOTTOM, TOP, log=log_y, round_out=log_y)
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>', *_grid(x_axis, y_axis)]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - BOTTOM + 34}" text-anchor="middle">'
        f"{escape(across)}</text>"
    )
    for index, (name, one) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x_axis.at(x), y_axis.at(y)) for x, y in one]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places if dots]
        parts += _legend(index, name, colour)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def _axis(values: list[float], start: float, end: float, *, log: bool, round_out: bool) -> Axis:
    low, high = min(values), max(values)
    if round_out:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    if high == low:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    return Axis(low, high, start, end, log)


def _grid(x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    return parts


def _legend(index: int, name: str, colour: str) -> list[str]:
    left, y = LEFT + 6 + index % 3 * 215, HEIGHT - 32 + index // 3 * 15
    return [
        f'<circle cx="{left}" cy="{y}" r="4" fill="{colour}"/>',
        f'<text x="{left + 8}" y="{y + 4}">{escape(name)}</text>',
    ]
