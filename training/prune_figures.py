"""Figures of a pruned model by layer and matrix; each takes numbers by name and gives HTML, or None with none to draw.

A parameter's name gives its layer (its first number) and its kind (what follows it); experts of a stack are averaged.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from training.svg import FIRST, INK, MUTED, PAPER, SECOND, Canvas, figure_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ANNOTATED = 12  # most columns whose cells hold their number on a laptop
LABELS = 16


def place_of(name: str) -> tuple[int, str] | None:
    """(layer, kind) of a parameter's name; None outside the layers.

    >>> place_of("model.layers.3.mlp.down_proj.weight"), place_of("layers.0.experts.up[5]")
    ((3, 'mlp.down_proj'), (0, 'experts.up'))
    """
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return None if found is None else (int(found[1]), re.sub(r"(\.weight)?(\[\d+\])?$", "", found[2]))


def grid_of(values: Mapping[str, float | None]) -> tuple[list[str], list[int], np.ndarray]:
    """Kinds, layers and the mean value [kind, layer] (NaN where there is none)."""
    cells: dict[tuple[int, str], list[float]] = {}
    for name, value in values.items():
        place = place_of(name)
        if place is not None and value is not None:
            cells.setdefault(place, []).append(value)
    kinds, layers = list(dict.fromkeys(kind for _, kind in cells)), sorted({layer for layer, _ in cells})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (layer, kind), held in cells.items():
        grid[kinds.index(kind), layers.index(layer)] = sum(held) / len(held)
    return kinds, layers, grid


def layer_figure(counts: Mapping[str, Sequence[int]]) -> str | None:
    """Bars: the share of zeros of each layer; dots: of each of its matrices. counts: (zeros, weights) by name."""
    kinds, layers, grid = grid_of({name: zeros / max(total, 1) for name, (zeros, total) in counts.items()})
    if not kinds:
        return None
    sums = np.zeros((2, len(layers)))
    for name, pair in counts.items():
        place = place_of(name)
        if place is not None:
            sums[:, layers.index(place[0])] += pair

    def draw(figure: "Figure", canvas: Canvas) -> None:
        axes = figure.subplots()
        axes.bar(range(len(layers)), 100 * sums[0] / np.maximum(sums[1], 1), color=FIRST, alpha=0.35, width=0.8)
        for row in grid:
            axes.plot(range(len(layers)), 100 * row, color=FIRST, marker="o", markersize=5, markeredgewidth=0, lw=0)
        _layer_ticks(axes, layers, narrow=canvas.narrow)
        axes.set_ylim(0, max(5.0, 108 * float(np.nanmax(grid))))
        axes.set_title("zeros in each layer (%); dots are its matrices")

    return figure_html(draw, name="zeros", alt="Share of zeros in each layer and matrix", wide=280, narrow=260)


def heat_figure(
    values: Mapping[str, float | None], *, name: str, title: str, alt: str, show: Callable[[float], str]
) -> str | None:
    """Kind × layer, darker = larger; `show` writes a value."""
    kinds, layers, grid = grid_of(values)
    if not kinds or not np.isfinite(grid).any():
        return None
    top = float(np.nanmax(np.maximum(grid, 0)))

    def draw(figure: "Figure", canvas: Canvas) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for row, column in np.ndindex(*grid.shape):
            value = float(grid[row, column])
            if math.isnan(value):
                continue
            share = max(value, 0.0) / top if top else 0.0
            cell = Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, facecolor=FIRST, alpha=0.06 + 0.9 * share, lw=0)
            axes.add_patch(cell)
            if len(layers) <= ANNOTATED // (2 if canvas.narrow else 1):
                axes.text(column, row, show(value), ha="center", va="center", fontsize=9.5,
                          color=PAPER if share > 0.6 else INK)  # fmt: skip
        axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(len(kinds) - 0.5, -0.5))
        axes.set_yticks(range(len(kinds)), kinds)
        _layer_ticks(axes, layers, narrow=canvas.narrow)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(f"{title}, at most {show(top)}")

    height = 90 + 28 * len(kinds)
    return figure_html(draw, name=name, alt=alt, wide=height, narrow=height)


def units_figure(report: Mapping[str, Any]) -> str | None:
    """Units that stay and go in each layer; None where all lie on one axis."""
    names = list(report["kept"])
    if len(names) < 2:
        return None
    kept = np.array([len(report["kept"][name]) for name in names])
    gone = np.array([len(report["removed"][name]) for name in names])
    layers = [(place_of(f"{name}.x") or (index, ""))[0] for index, name in enumerate(names)]
    kind = report["kind"]

    def draw(figure: "Figure", canvas: Canvas) -> None:
        axes = figure.subplots()
        axes.bar(range(len(names)), kept, color=FIRST, width=0.8, label="kept")
        axes.bar(range(len(names)), gone, bottom=kept, color=SECOND, alpha=0.45, width=0.8, label="removed")
        _layer_ticks(axes, layers, narrow=canvas.narrow)
        axes.set_title(f"{kind.replace('_', ' ')}s of each layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1.22 * int((kept + gone).max()))
        axes.legend(loc="upper right", ncols=2)

    alt = f"Number of {kind}s kept and removed in each layer"
    return figure_html(draw, name=f"units-{kind}", alt=alt, wide=250, narrow=240)


def line_figure(values: Sequence[float], drawn: Sequence[float], *, name: str, title: str, alt: str) -> str:
    """A line over steps: `values` faint, `drawn` (the same, smoothed) on top."""

    def draw(figure: "Figure", canvas: Canvas) -> None:
        axes = figure.subplots()
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=FIRST, alpha=0.25, lw=1)
        axes.plot(steps, drawn, color=FIRST, lw=2)
        axes.set_ylim(0, 1.08 * max(values))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step", color=MUTED)
        axes.set_title(title)

    return figure_html(draw, name=name, alt=alt, wide=250, narrow=240)


def _layer_ticks(axes: "Axes", layers: Sequence[int], *, narrow: bool) -> None:
    step = math.ceil(len(layers) / (LABELS // (2 if narrow else 1)))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer", color=MUTED)
