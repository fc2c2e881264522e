"""The report's figures. Each takes records and gives HTML, or None where the records hold nothing to draw."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from training.records import Line, Records, Run
from training.svg import FIRST, FOURTH, GRID, INK, MUTED, PAPER, SECOND, SERIES, THIRD, Canvas, figure_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fixed mid-tones, because a raster cannot follow the page's scheme; uniform load is transparent in both.
OVER_LOADED, UNDER_LOADED = (0.18, 0.50, 0.84), (0.88, 0.48, 0.12)


def loss_figure(records: Records) -> str | None:
    """Held-out bits per byte against tokens seen, one line a run, with the baselines as horizontal lines."""
    runs = [run for run in records.runs if len(run.evaluations) > 1]
    if not runs:
        return None
    baselines = records.all("baseline")

    def draw(figure: "Figure", canvas: Canvas) -> None:
        axes = figure.subplots()
        for colour, run in zip(SERIES, runs, strict=False):
            x, y = _evaluation_curve(run)
            marker = "o" if len(x) <= 40 else ""
            axes.plot(x, y, color=colour, marker=marker, label=records.label(run.name), zorder=3)
        finals = [run.evaluations[-1]["bits_per_byte"] for run in runs]
        levels = [line["bits_per_byte"] for line in baselines]
        # The first evaluations, near the uniform model's, would flatten everything that matters.
        floor, ceiling = min(finals + levels), max([*finals, *levels])
        axes.set_ylim(floor - 0.12 * (ceiling - floor) - 0.05, min(ceiling * 1.6, _highest(runs)) + 0.05)
        _baseline_lines(axes, baselines)
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens seen (millions)")
        axes.set_title("held-out bits per byte (lower is better)")
        axes.legend(loc="upper right", ncols=1 if canvas.narrow else len(runs))

    names = " and ".join(records.label(run.name) for run in runs)
    return figure_html(
        draw, name="loss", alt=f"Held-out bits per byte of {names} during training", wide=380, narrow=320
    )


def _evaluation_curve(run: Run) -> tuple[list[float], list[float]]:
    """Tokens in millions (from the step lines) and bits per byte at each evaluation."""
    tokens = {line["step"]: line["tokens"] for line in run.steps}
    per_step = max((line["tokens"] / line["step"] for line in run.steps if line["step"]), default=1.0)
    x = [tokens.get(line["step"], line["step"] * per_step) / 1e6 for line in run.evaluations]
    return x, [line["bits_per_byte"] for line in run.evaluations]


def _highest(runs: list[Run]) -> float:
    return max(line["bits_per_byte"] for run in runs for line in run.evaluations)


# points from one baseline's label to the next
LABEL_HEIGHT = 13.0


def _baseline_lines(axes: "Axes", baselines: list[Line], *, side: str = "right") -> None:
    """A line at each level, and its name above it, pushed up where it would cover another; limits must be set."""
    for line, style in zip(baselines, ("--", ":", "-."), strict=False):
        axes.axhline(line["bits_per_byte"], color=MUTED, linestyle=style, linewidth=1.4, zorder=2)
    low, high = axes.get_ylim()
    apart = LABEL_HEIGHT / 72 * axes.figure.dpi / axes.get_window_extent().height * (high - low)
    place = -math.inf
    for line in sorted(baselines, key=lambda line: line["bits_per_byte"]):
        place = max(line["bits_per_byte"], place + apart)
        axes.annotate(
            f"{line['name']}  {line['bits_per_byte']:.3f}",
            (0.995 if side == "right" else 0.005, place),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha=side,
            color=MUTED,
            fontsize=10.5,
        )


def training_figure(records: Records) -> str | None:
    """Training loss in nats a token against the step, smoothed over 2% of the run, and the learning rate."""
    runs = [run for run in records.runs if len(run.steps) > 1]
    if not runs:
        return None

    def draw(figure: "Figure", canvas: Canvas) -> None:
        panels = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for colour, run in zip(SERIES, runs, strict=False):
            steps = [line["step"] for line in run.steps]
            losses = np.array([line["loss"] for line in run.steps])
            panels[0].plot(steps, losses, color=colour, alpha=0.25, linewidth=1)
            panels[0].plot(steps, smooth(losses), color=colour, label=records.label(run.name))
            panels[1].plot(steps, [line["lr"] for line in run.steps], color=colour, linewidth=1.6)
        panels[0].set_title("training loss (nats per token)")
        panels[1].set_title("learning rate")
        panels[1].set_xlabel("step")
        panels[1].set_ylim(bottom=0)
        panels[0].legend(loc="upper right")

    return figure_html(draw, name="training", alt="Training loss and learning rate by step", wide=400, narrow=380)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of 2% of the points, shorter at the ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def load_figure(run: Run) -> str | None:
    """Each expert's share of the assignments over training, one panel a layer, against a uniform share."""
    lines = [line for line in run.steps if line.get("loads")]
    if not lines:
        return None
    layers = len(lines[0]["loads"])

    def draw(figure: "Figure", canvas: Canvas) -> None:
        columns = columns_of(layers, narrow=canvas.narrow)
        rows = math.ceil(layers / columns)
        panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).reshape(-1)
        for layer, axes in enumerate(panels):
            if layer >= layers:
                axes.set_visible(False)
                continue
            shares = relative_loads(lines, layer=layer, bins=48 if canvas.narrow else 96)
            _load_panel(axes, shares, steps=(lines[0]["step"], lines[-1]["step"]))
            axes.set_title(f"MoE layer {layer}", fontsize=11)
        figure.supxlabel("step", color=MUTED, fontsize=11.5)
        figure.supylabel("expert", color=MUTED, fontsize=11.5)

    alt = f"Expert load over training steps in {layers} mixture-of-experts layers"
    rows = [math.ceil(layers / columns_of(layers, narrow=narrow)) for narrow in (False, True)]
    return figure_html(draw, name=f"load-{run.name}", alt=alt, wide=60 + 130 * rows[0], narrow=60 + 115 * rows[1])


def columns_of(layers: int, *, narrow: bool) -> int:
    """Panels beside each other: three on a laptop, two on a phone and where three would leave a row half empty."""
    return min(layers, 2 if narrow or layers == 4 else 3)


def relative_loads(lines: list[Line], *, layer: int, bins: int) -> np.ndarray:
    """Load over the uniform load, 1 when balanced: [experts, at most bins], steps averaged within each bin."""
    loads = np.array([line["loads"][layer] for line in lines], dtype=float)
    parts = np.array_split(loads, min(bins, len(loads)))
    sums = np.stack([part.sum(0) for part in parts], axis=1)
    return sums / np.maximum(sums.mean(0, keepdims=True), 1e-12)


def _load_panel(axes: "Axes", shares: np.ndarray, *, steps: tuple[int, int]) -> None:
    pixels = np.zeros((*shares.shape, 4))
    pixels[..., :3] = np.where((shares > 1)[..., None], OVER_LOADED, UNDER_LOADED)
    pixels[..., 3] = np.clip(np.abs(shares - 1), 0, 1)
    axes.imshow(pixels, aspect="auto", extent=(steps[0], max(steps[1], steps[0] + 1), len(shares) - 0.5, -0.5))
    axes.grid(visible=False)
    axes.set_yticks([0, len(shares) - 1])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set(visible=True, color=GRID)


def importance_figure(importance: Line) -> str:
    """Layer × head, darker = more important; crosses mark the heads removed at the recorded fraction."""
    scores = np.array(importance["scores"], dtype=float)
    removed = {(layer, head) for layer, head in importance.get("removed", [])}
    top = scores.max()

    def draw(figure: "Figure", canvas: Canvas) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for layer, head in np.ndindex(*scores.shape):
            share = scores[layer, head] / top if top else 0.0
            cell = Rectangle((head - 0.46, layer - 0.46), 0.92, 0.92, facecolor=FIRST, alpha=0.05 + 0.9 * share, lw=0)
            axes.add_patch(cell)
            if (layer, head) in removed:
                axes.plot(head, layer, marker="x", color=INK, markersize=7, markeredgecolor=INK, markeredgewidth=1.6)
            elif not canvas.narrow:
                axes.text(
                    head,
                    layer,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=10,
                    color=PAPER if share > 0.6 else INK,
                )
        axes.set(xlim=(-0.5, scores.shape[1] - 0.5), ylim=(scores.shape[0] - 0.5, -0.5), xlabel="head", ylabel="layer")
        axes.set(xticks=range(scores.shape[1]), yticks=range(scores.shape[0]))
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)

    height = 70 + 36 * len(scores)
    return figure_html(draw, name="importance", alt="Importance of each head in each layer", wide=height, narrow=height)


def heads_figure(records: Records) -> str | None:
    """Four small curves against the fraction of heads removed: bits per byte, parameters, file size, speed."""
    lines = sorted(records.all("heads"), key=lambda line: line["fraction"])
    if len(lines) < 2:
        return None
    x = [100 * line["fraction"] for line in lines]

    def draw(figure: "Figure", canvas: Canvas) -> None:
        panels = figure.subplots(4, 1) if canvas.narrow else figure.subplots(2, 2)
        quality, parameters, size, speed = panels.reshape(-1)
        _pruning_curves(quality, x, lines)
        _single_curve(parameters, x, [line["parameters"] / 1e6 for line in lines], "parameters (millions)", SECOND)
        _single_curve(size, x, [line["file_bytes"] / 1e6 for line in lines], "file size (MB)", THIRD)
        _single_curve(speed, x, [line["tokens_per_s"] for line in lines], "generation (tokens/s, batch 16)", FOURTH)
        spread = [line["tokens_per_s_iqr"] / 2 for line in lines]
        middle = np.array([line["tokens_per_s"] for line in lines])
        speed.fill_between(x, middle - spread, middle + spread, color=FOURTH, alpha=0.2, linewidth=0)
        for axes in panels.reshape(-1)[-1 if canvas.narrow else -2 :]:
            axes.set_xlabel("heads removed (%)")

    alt = "Bits per byte, parameters, file size and generation speed against the share of heads removed"
    return figure_html(draw, name="heads", alt=alt, wide=500, narrow=880)


def _pruning_curves(axes: "Axes", x: list[float], lines: list[Line]) -> None:
    axes.plot(
        x, [line["bits_per_byte"] for line in lines], color=MUTED, marker="o", linestyle="--", label="just pruned"
    )
    recovered = [line["recovered_bits_per_byte"] for line in lines]
    axes.plot(x, recovered, color=FIRST, marker="o", label="after recovery")
    axes.set_title("held-out bits per byte")
    axes.legend(loc="upper left")


def _single_curve(axes: "Axes", x: list[float], y: list[Any], title: str, colour: str) -> None:
    axes.plot(x, y, color=colour, marker="o")
    axes.set_title(title)
    axes.set_ylim(0, 1.12 * max(y))


def weights_figure(records: Records) -> str | None:
    """Bits per byte against the share of weights set to zero by magnitude."""
    lines = sorted(records.all("weights"), key=lambda line: line["sparsity"])
    if len(lines) < 2:
        return None

    def draw(figure: "Figure", canvas: Canvas) -> None:
        axes = figure.subplots()
        x, y = [100 * line["sparsity"] for line in lines], [line["bits_per_byte"] for line in lines]
        axes.plot(x, y, color=FIRST, marker="o", zorder=3)
        _baseline_lines(axes, [line for line in records.all("baseline") if line["bits_per_byte"] < max(y)], side="left")
        axes.set_title("held-out bits per byte, no retraining")
        axes.set_xlabel("weights set to zero (%)")

    alt = "Held-out bits per byte against the share of weights set to zero"
    return figure_html(draw, name="weights", alt=alt, wide=320, narrow=300)
