"""The figures of the page of pruned SmolLM2: perplexity against what was removed, one line a way."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import mean

from benchmarks.readme_tables import Line

CHANCE, ZEROS = "chance", "as many weights, SparseGPT"
COLOURS = ("#1f8fbf", "#8f5bd6", "#d9822b", "#3a9a5b", "#c2455c", "#8a8f98", "#b8a21f", "#2f4b9c", "#e377c2", "#17a398",
           "#7a4a21", "#9acd32", "#111111")  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 340, 60, 16, 34, 78
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}.title{fill:#eee}.grid{stroke:#444}}"
)
Curves = Mapping[str, Mapping[float, float]]  # label → what was removed → perplexity


def heads_before(lines: list[Line]) -> list[Line]:
    """The records of removed heads, before any recovery."""
    return [line for line in lines if line["name"] == "heads" and "recovered_steps" not in line]


def head_curves(lines: list[Line]) -> dict[str, dict[float, float]]:
    """Label → fraction of heads → perplexity, chance as the mean of its seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in heads_before(lines):
        label = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        found.setdefault(label, {}).setdefault(line["fraction"], []).append(line["perplexity"])
        if "zeros_perplexity" in line:
            found.setdefault(ZEROS, {}).setdefault(line["fraction"], []).append(line["zeros_perplexity"])
    return _averaged(found)


def parameter_curves(lines: list[Line]) -> dict[str, dict[float, float]]:
    """Label → share of the model's parameters that went → perplexity: heads by gradient, by the best importance and by
    chance (means of its seeds), and as many single weights."""
    rows = heads_before(lines)
    whole = _whole_parameters(rows)
    curves = {label: curve for label, curve in head_curves(lines).items() if label != ZEROS}
    # where most heads went
    best = min(curves, key=lambda label: curves[label].get(max(curves["gradient"]), math.inf))
    chosen = {name: f"heads, by {name}" for name in ("gradient", best, CHANCE)}
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for line in rows:
        importance = CHANCE if line["importance"].startswith(CHANCE) else line["importance"]
        gone = 1 - line["parameters"] / whole
        if importance in chosen:
            found.setdefault(chosen[importance], {}).setdefault(line["fraction"], []).append((gone, line["perplexity"]))
        if "zeros_perplexity" in line:
            zeros = found.setdefault("single weights, SparseGPT", {})
            zeros.setdefault(line["fraction"], []).append((gone, line["zeros_perplexity"]))
    return {
        label: {round(mean(gone for gone, _ in at), 4): mean(value for _, value in at) for at in by.values()}
        for label, by in found.items()
    }


def _whole_parameters(rows: Sequence[Line]) -> float:
    """Parameters before anything went: what is left and the share of zeros at equal parameters lie on a line."""
    ends = sorted((line["zeros_sparsity"], line["parameters"]) for line in rows if "zeros_sparsity" in line)
    if len(ends) < 2:
        raise ValueError(f"records must hold zeros at 2 fractions or more, got {len(ends)}")
    (first, most), (last, least) = ends[0], ends[-1]
    return most + first * (most - least) / (last - first)


def _averaged(found: Mapping[str, Mapping[float, Sequence[float]]]) -> dict[str, dict[float, float]]:
    return {label: {at: mean(values) for at, values in curve.items()} for label, curve in found.items()}


def chart(title: str, curves: Curves, *, dense: float, ticks: Sequence[float]) -> str:
    """Perplexity on a logarithmic axis; every line begins at the dense model's."""
    every = [value for curve in curves.values() for value in curve.values()] + [dense]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    end = max(*ticks, *(at for curve in curves.values() for at in curve))

    def place(at: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * at / end, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>']
    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    for tick in ticks:
        x = place(tick, 10.0**low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.0%}</text>')
    for index, (label, curve) in enumerate(curves.items()):
        points = [place(0, dense), *(place(at, value) for at, value in sorted(curve.items()))]
        parts += _line(index, label, points)
    # three labels a row, below the ticks
    height = HEIGHT + max(0, 14 * math.ceil(len(curves) / 3) - 26)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def _line(index: int, label: str, points: Sequence[tuple[float, float]]) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    left, top = LEFT + 6 + index % 3 * 215, HEIGHT - 34 + index // 3 * 14
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{left}" cy="{top}" r="4" fill="{colour}"/>',
        f'<text x="{left + 8}" y="{top + 4}">{escape(label)}</text>',
    ]


def heads_figure(lines: list[Line]) -> str:
    """Perplexity over the share of heads removed, by importance."""
    curves, rows = head_curves(lines), heads_before(lines)
    ticks = sorted({at for curve in curves.values() for at in curve} | {0.0})
    return chart("perplexity by share of heads removed", curves, dense=rows[-1]["dense_perplexity"], ticks=ticks)


def parameters_figure(lines: list[Line]) -> str:
    """Heads against single weights at equal parameters removed."""
    curves, dense = parameter_curves(lines), heads_before(lines)[-1]["dense_perplexity"]
    steps = math.ceil(max(at for curve in curves.values() for at in curve) * 50)
    title = "perplexity by share of all parameters removed: whole heads against single weights"
    return chart(title, curves, dense=dense, ticks=[step / 50 for step in range(steps + 1)])
