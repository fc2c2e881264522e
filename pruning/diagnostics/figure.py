"""The figure that a diagnostic is drawn on."""

from typing import Any


def axes_for(ax: Any) -> Any:
    """``ax``, or the axes of a new figure. Raises: ImportError, with the install line, without matplotlib."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plotting a diagnostic needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")[1]


def labelled(ax: Any, *, x: str, y: str, title: str, legend: bool = False) -> Any:
    """The axes with their labels; returns them."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10)
    if legend:
        ax.legend()
    return ax
