"""What all pictures share: the canvas, the colours, and the import of matplotlib, which is optional."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
DARK, GREY, LIGHT = "#222222", "#767676", "#D9D9D9"
LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
# Ordered colours: from dark to bright, and from one colour over white to another.
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
# Ten inches at this resolution are 1000 pixels.
WIDTH, DPI = 10.0, 100
TITLE, LABEL, SMALL = 13, 11, 9

INSTALL = "pip install modeling-pico[plots]"


class NothingToDrawError(ValueError):
    """A picture has no subject: the model lacks the part it shows, or nothing has been recorded yet."""


def has_matplotlib() -> bool:
    """Whether matplotlib, which draws the pictures, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """ImportError that names the extra to install, unless matplotlib is installed."""
    if not has_matplotlib():
        raise ImportError(f"Pictures are drawn by matplotlib, which is not installed: {INSTALL}")


def new_figure(height: float, title: str, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of [`WIDTH`] by `height` inches with a canvas of its own; the state of pyplot is not touched."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    # A layout engine finds the place of the title itself.
    place = {} if layout else {"y": 1 - 0.12 / height, "va": "top"}
    figure.suptitle(title, fontsize=TITLE, x=0.01, ha="left", **place)
    return figure


def finish(axes: Axes, title: str, x_label: str | None, y_label: str | None) -> None:
    """Labels one panel and takes away what carries no information."""
    axes.set_title(title, fontsize=LABEL, loc="left")
    if x_label is not None:
        axes.set_xlabel(x_label, fontsize=LABEL)
    if y_label is not None:
        axes.set_ylabel(y_label, fontsize=LABEL)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, handles: list) -> None:
    """A legend below all panels, where it covers nothing, in as many columns as fit."""
    labels = [shorten(handle.get_label(), 60) for handle in handles]
    # A letter takes about 7.5 pixels, the sample and the gaps beside it about 55.
    columns = max(1, min(4, int(WIDTH * DPI / (7.5 * max(map(len, labels)) + 55))))
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=SMALL + 1)
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(text: str, length: int) -> str:
    """`text` on one line, cut to `length` characters with an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """`values` as an array of floats; ValueError if one of them is not a finite number."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite.")
    return values


__all__ = ["NothingToDrawError", "has_matplotlib", "require_matplotlib"]
