"""Table and figure of layer collapse: the loss after training against compression, and where a matrix was empty."""

import math
from html import escape
from statistics import mean

from benchmarks.pruning_figures import COLOURS, STYLE
from benchmarks.readme_tables import Line, table

WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 720, 330, 44, 30, 36, 78
Cell = dict[tuple[str, str, float], list[Line]]  # model, method, compression → one record a seed


def cells(lines: list[Line]) -> Cell:
    """The records of each model, method and compression."""
    found: Cell = {}
    for line in lines:
        if line["name"] == "collapse":
            found.setdefault((line["model"], line["method"], round(line["compression"], 4)), []).append(line)
    return found


def collapse(lines: list[Line]) -> str:
    """Mean loss over the seeds, half its range, and the seeds in which a matrix kept nothing or nothing got through."""
    found = cells(lines)
    compressions = sorted({compression for _, method, compression in found if method != "dense"})
    pairs = dict.fromkeys((model, method) for model, method, _ in found if method != "dense")
    rows = [
        [f"{model}, {method}", *(_cell(found.get((model, method, compression))) for compression in compressions)]
        for model, method in sorted(pairs, key=lambda pair: pair[0])
    ]
    one = next(line for line in lines if line["name"] == "collapse")
    dense = "; ".join(
        f"{model} {mean(line['nats'] for line in some):.2f}, {some[0]['weights']:,} weights in {some[0]['matrices']}"
        for (model, method, _), some in found.items() if method == "dense"
    )  # fmt: skip
    counts = sorted({len(some) for some in found.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return table(["one weight of … stays", *(f"{compression:,.1f}" for compression in compressions)], rows) + (
        f"\n\nHeld-out nats a byte of {one['text']} after {one['steps']} steps, mean of {seeds} seeds and half their "
        f"range. † in so many of them a matrix kept nothing, or no path was left. Dense: {dense}. The best constant: "
        f"{one['constant_nats']:.2f}. Torch {one['torch']}, commit `{one['commit']}`."
    )


def _collapsed(some: list[Line]) -> int:
    return sum(line["empty"] > 0 or line["cut"] for line in some)


def _cell(some: list[Line] | None) -> str:
    if not some:
        return ""
    nats = [line["nats"] for line in some]
    gone = _collapsed(some)
    return f"{mean(nats):.2f} ± {(max(nats) - min(nats)) / 2:.2f}" + (f" †{gone}" if gone else "")


def collapse_figure(lines: list[Line]) -> str:
    """A panel for each model: a line a method, a cross where most seeds had collapsed, grey levels for the
    dense model and for the best constant."""
    found = cells(lines)
    models = sorted({model for model, _, _ in found})
    methods = [method for method in dict.fromkeys(method for _, method, _ in found) if method != "dense"]
    nats = [line["nats"] for some in found.values() for line in some]
    constant = next(iter(found.values()))[0]["constant_nats"]
    low, high = math.floor(2 * min(nats)) / 2, math.ceil(2 * max(*nats, constant)) / 2
    width = (WIDTH - LEFT - GAP * len(models)) / len(models)
    parts = []
    for index, model in enumerate(models):
        left = LEFT + index * (width + GAP)
        curves = {method: _curve(found, model, method) for method in methods}
        dense = mean(line["nats"] for (one, method, _), some in found.items() if (one, method) == (model, "dense")
                     for line in some)  # fmt: skip
        parts += _panel(model, curves, {"dense": dense, "best constant": constant}, left, width, (low, high))
    parts += _legend(methods)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


Curve = list[tuple[float, float, bool]]  # compression, mean nats, whether most seeds had collapsed


def _curve(found: Cell, model: str, method: str) -> Curve:
    at = sorted(compression for one, other, compression in found if (one, other) == (model, method))
    curve = []
    for compression in at:
        seeds = found[model, method, compression]
        curve.append((compression, mean(line["nats"] for line in seeds), 2 * _collapsed(seeds) > len(seeds)))
    return curve


def _panel(
    model: str, curves: dict[str, Curve], levels: dict[str, float], left: float, width: float, ends: tuple[float, float]
) -> list[str]:
    last = max(math.log10(compression) for curve in curves.values() for compression, _, _ in curve)

    def place(compression: float, nats: float) -> tuple[float, float]:
        share = (nats - ends[0]) / (ends[1] - ends[0])
        return left + width * math.log10(compression) / last, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [f'<text class="title" x="{left:.1f}" y="18">{escape(model)}: nats a byte after training</text>']
    for label, nats in levels.items():
        y = place(1, nats)[1]
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left + 2:.1f}" y="{y - 4:.1f}">{label}</text>')
    for step in range(math.ceil(ends[0]), math.floor(ends[1]) + 1):
        x, y = place(1, step)
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{step}</text>')
    for power in range(math.floor(last) + 1):
        x, label = place(10**power, ends[0])[0], f"1/{10**power:,}" if power else "all"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for index, curve in enumerate(curves.values()):
        parts += _drawn(COLOURS[index], [(*place(compression, nats), empty) for compression, nats, empty in curve])
    return parts


def _drawn(colour: str, points: list[tuple[float, float, bool]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for x, y, empty in points:
        if empty:
            cross = f"M{x - 4:.1f} {y - 4:.1f}L{x + 4:.1f} {y + 4:.1f}M{x - 4:.1f} {y + 4:.1f}L{x + 4:.1f} {y - 4:.1f}"
            parts.append(f'<path d="{cross}" stroke="{colour}" stroke-width="2"/>')
        else:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    return parts


def _legend(methods: list[str]) -> list[str]:
    said = "share of the weights that stays; a cross: a matrix keeps none, or no path is left"
    parts = [f'<text x="{LEFT}" y="{HEIGHT - 34}">{said}</text>']
    for index, method in enumerate(methods):
        x, y = LEFT + 4 + index * 120, HEIGHT - 14
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 8}" y="{y}">{escape(method)}</text>')
    return parts
