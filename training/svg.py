"""Matplotlib figures as inline SVG that follows the page: its fonts, its colours in light and dark, its width."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Matplotlib wants literal colours; these stand for CSS variables and are replaced in the SVG text.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
FIRST, SECOND, THIRD, FOURTH = "#050505", "#060606", "#070707", "#080808"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--card",
    FIRST: "--first", SECOND: "--second", THIRD: "--third", FOURTH: "--fourth",
}  # fmt: skip
SERIES = (FIRST, SECOND, THIRD, FOURTH)


@dataclass(frozen=True)
class Canvas:
    """One rendering of a figure. ``narrow`` is the phone's. Width and height are in CSS pixels."""

    width: int
    height: int
    narrow: bool


def figure_html(draw: "Callable[[Figure, Canvas], None]", *, name: str, alt: str, wide: int, narrow: int) -> str:
    """A figure drawn twice, for a laptop (720 px wide, ``wide`` high) and a phone (350 px, ``narrow`` high); CSS shows
    the one that fits, so that text never shrinks. ``name`` makes ids unique in the page; ``alt`` is read aloud."""
    drawings = [
        _svg(draw, Canvas(720, wide, narrow=False), name=f"{name}-wide", alt=alt),
        _svg(draw, Canvas(350, narrow, narrow=True), name=f"{name}-narrow", alt=alt),
    ]
    return f'<div class="wide">{drawings[0]}</div><div class="narrow">{drawings[1]}</div>'


def _svg(draw: "Callable[[Figure, Canvas], None]", canvas: Canvas, *, name: str, alt: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's figures need matplotlib: pip install matplotlib") from error
    buffer = StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(canvas.width / 72, canvas.height / 72), layout="constrained")
        draw(figure, canvas)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name=name, alt=alt)


STYLE = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "text.color": INK,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "lines.markersize": 6,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 1.2,
    "legend.frameon": False,
    "legend.borderpad": 0,
    "legend.handlelength": 1.4,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.07,
    "image.interpolation": "none",
}


def _inline(svg: str, *, name: str, alt: str) -> str:
    """Strip what only a file needs, make ids unique in the page, hand fonts and colours to CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", lambda m: _font(m[1], m[2]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1).strip()


def _font(style: str, size: str) -> str:
    weight = "600" if "bold" in style or "700" in style else "400"
    return f"font-size: {size}; font-weight: {weight}; font-family: inherit"
