"""A study's figure as SVG text: each seed's bits a byte by arm, and beside it the arm's learning-rate sweep.

Written out here, not by a plotting library: the same records give the same bytes everywhere.
"""

import math
from collections.abc import Sequence
from html import escape

from training.study.summary import ArmResult

WIDTH, TOP, ROW, BOTTOM = 760, 46, 40, 34
LABEL_END, DOTS, SWEEP = 170, (186, 520), (570, 730)
LETTER = 7  # room for one of a label
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 } .muted { fill: #5f6b7a } .title { font-weight: 600 }
.grid { stroke: #d5dbe2 } .reference { stroke: #5f6b7a; stroke-dasharray: 4 3 } .seed { fill: #0f766e; opacity: .75 }
.mean { stroke: #0f766e; stroke-width: 2.5 } .curve { fill: none; stroke: #b45309; stroke-width: 1.8 }
.rate { fill: #b45309 } .best { fill: none; stroke: #b45309; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) { text { fill: #e6e9ee } .muted { fill: #9aa5b4 } .grid { stroke: #3a4452 }
.reference { stroke: #9aa5b4 } .seed { fill: #2dd4bf } .mean { stroke: #2dd4bf } .curve { stroke: #f59e0b }
.rate { fill: #f59e0b } .best { stroke: #f59e0b } }
"""


def study_svg(results: Sequence[ArmResult], *, reference: ArmResult) -> str:
    """One row an arm. Left: a dot for each seed, a bar at their mean, a dashed line at the reference's mean.

    Right: bits a byte of the text that chooses rates, of the first seed, against the learning rate (logarithmic), each
    row on its own scale; the ring is the best rate, a cross on top a loss that was not finite.

    Raises: ValueError if no arm has a result.
    """
    values = [bits for result in results for bits in result.bits.values()]
    if not values:
        raise ValueError("results must hold at least one finished cell, got none")
    low, high = _padded(min(values), max(values))
    height = TOP + ROW * len(results) + BOTTOM
    more = max(0, LETTER * max(len(result.arm.label) for result in results) - LABEL_END)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-more} 0 {WIDTH + more} {height}" role="img">',
        f"<title>Held-out bits per byte of {len(results)} arms</title><style>{STYLE}</style>",
        _text(DOTS[0], 20, "held-out bits per byte, each seed (left is better)", kind="title"),
        _text(SWEEP[0], 20, "learning-rate sweep", kind="title"),
        *_axis(low, high, height),
    ]
    if reference.bits:
        x = _scale(reference.mean, low, high, DOTS)
        parts.append(_line("reference", x, TOP - 8, x, height - BOTTOM))
    for index, result in enumerate(results):
        middle = TOP + ROW * (index + 0.5)
        parts.append(_text(LABEL_END, middle + 4, result.arm.label, anchor="end"))
        parts += _dots(result, middle, low, high) + _sweep(result, middle, _rates(results))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dots(result: ArmResult, y: float, low: float, high: float) -> list[str]:
    if not result.bits:
        return [_text(DOTS[0], y + 4, "no finite result", kind="muted")]
    x = _scale(result.mean, low, high, DOTS)
    circles = [_circle("seed", _scale(bits, low, high, DOTS), y, 4.5) for bits in result.bits.values()]
    return [*circles, _line("mean", x, y - 11, x, y + 11)]


def _sweep(result: ArmResult, y: float, rates: tuple[float, float]) -> list[str]:
    found = {lr: bits for lr, bits in result.sweep.items() if bits is not None}
    if not found:
        return []
    low, high = min(found.values()), max(found.values())
    span = high - low or 1.0
    at = {
        lr: (_scale(math.log(lr), *rates, SWEEP), y + 13 - 26 * (bits - low) / span)
        for lr, bits in sorted(found.items())
    }
    parts = [f'<polyline class="curve" points="{" ".join(f"{x:.1f},{v:.1f}" for x, v in at.values())}"/>']
    parts += [_circle("rate", *place, 2.8) for place in at.values()]
    if result.lr in at:
        parts.append(_circle("best", *at[result.lr], 5.5))
    lost = [lr for lr, bits in result.sweep.items() if bits is None]
    return parts + [_text(_scale(math.log(lr), *rates, SWEEP), y - 9, "×", anchor="middle") for lr in lost]


def _rates(results: Sequence[ArmResult]) -> tuple[float, float]:
    logs = [math.log(lr) for result in results for lr in result.sweep]
    return (min(logs), max(logs)) if max(logs) > min(logs) else (min(logs) - 1, max(logs) + 1)


def _axis(low: float, high: float, height: int) -> list[str]:
    step = 10 ** math.floor(math.log10(high - low))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 6)
    decimals = max(0, -math.floor(math.log10(step)))
    parts = []
    for number in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = _scale(number * step, low, high, DOTS)
        parts.append(_line("grid", x, TOP - 8, x, height - BOTTOM))
        parts.append(_text(x, height - BOTTOM + 18, f"{number * step:.{decimals}f}", kind="muted", anchor="middle"))
    return parts


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.01
    return low - pad, high + pad


def _scale(value: float, low: float, high: float, span: tuple[int, int]) -> float:
    return span[0] + (value - low) / (high - low) * (span[1] - span[0])


def _text(x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _circle(kind: str, x: float, y: float, radius: float) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
