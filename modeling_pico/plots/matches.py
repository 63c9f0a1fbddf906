"""Picture of an image and a caption: where each word finds its best patch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .canvas import (
    BLUE,
    DARK,
    LABEL,
    SMALL,
    VERMILION,
    WIDTH,
    NothingToDrawError,
    finite,
    new_figure,
    shorten,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


# Inches.
_CELL, _LEFT, _TOP, _MARGIN = 1.26, 2.9, 0.75, 0.15
# Ordered colours without the grey of the image below them.
_COLORS = "viridis"
_COLUMNS = 5


@dataclass
class PatchWordMatch:
    """
    Similarities of the patches of one image with the words of one caption.

    Attributes:
        image (`np.ndarray` of shape `(height, width, 3)`): The image as the model saw it, values in [0, 1].
        caption (`str`): The caption.
        words (`list[str]`): The caption's tokens that take part in the score.
        similarity (`np.ndarray` of shape `(tokens, words)`): Image tokens in order, special ones first.
        grid (`tuple[int, int]`): Rows and columns of patches.
        score (`float`): Score of the pair.
        special_tokens (`list[str]`): Names of the image tokens before the patches.
        special_words (`list[bool]`): Which of the words are special tokens; none if empty.
        weighted (`bool`): Whether semantic weights are in the similarities.
    """

    image: np.ndarray
    caption: str
    words: list[str]
    similarity: np.ndarray
    grid: tuple[int, int]
    score: float
    special_tokens: list[str] = field(default_factory=list)
    special_words: list[bool] = field(default_factory=list)
    weighted: bool = False


def plot_matches(match: PatchWordMatch, max_words: int = 25) -> Figure:
    r"""
    The image with the patches that words match best, numbered by word; and for each word a map of its similarity with
    every patch, the best one outlined. A word whose best image token is no patch names that token.

    Args:
        match ([`PatchWordMatch`]): The similarities.
        max_words (`int`, *optional*, defaults to 25): The first so many words get a map.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: if the caption has no words.
        ValueError: if the numbers of image tokens or words do not fit together.
    """
    similarity = _checked(match)
    rows, columns = match.grid
    first = len(match.special_tokens)
    best = similarity.argmax(axis=0)
    shown = min(len(match.words), max_words)
    maps = similarity[first:, :shown].reshape(rows, columns, shown)
    row_height = _CELL + 0.42
    height = _TOP + max(math.ceil(shown / _COLUMNS) * row_height, _image_height(match) + 1.5)
    weights = "with semantic weights" if match.weighted else "unweighted"
    title = f"Where does each word find its best patch? (score of the pair {match.score:.2f}, {weights})"
    figure = new_figure(height, title, layout=None)
    caption = f"“{shorten(match.caption, 105)}”"
    figure.text(0.01, 1 - 0.40 / height, caption, fontsize=LABEL, va="top", parse_math=False)
    low, high = float(maps.min()), float(maps.max())
    limits = (low, high) if high > low else (low - 0.5, high + 0.5)
    drawn = []
    for index in range(shown):
        row, column = divmod(index, _COLUMNS)
        left, top = _MARGIN + _LEFT + 0.35 + column * (_CELL + 0.06), _TOP + row * row_height + 0.38
        axes = figure.add_axes(_box(left, top, _CELL, _CELL, height))
        drawn.append(_word_map(axes, match, maps[..., index], limits, best[index] - first))
        special = bool(match.special_words) and match.special_words[index]
        target = "" if best[index] >= first else f" → {match.special_tokens[best[index]]}"
        axes.set_title(
            f"{index + 1} {shorten(match.words[index], 13)}\n{similarity[best[index], index]:.2f}{target}",
            fontsize=SMALL,
            pad=2,
            style="italic" if special else "normal",
            color=BLUE if special else DARK,
            parse_math=False,
        )
    _overview(figure, match, best[:shown] - first, height)
    _key(figure, drawn[0], height, shown, match)
    return figure


def _checked(match: PatchWordMatch) -> np.ndarray:
    """The similarities, if they fit the words and the grid."""
    similarity = finite("similarities", match.similarity)
    if not match.words:
        raise NothingToDrawError("the caption has no words")
    special, (rows, columns), words = len(match.special_tokens), match.grid, len(match.words)
    if similarity.shape != (special + rows * columns, words):
        raise ValueError(
            f"`similarity` has shape {similarity.shape}, but {special} special tokens, a grid of {rows} x {columns} "
            f"patches and {words} words need {(special + rows * columns, words)}."
        )
    return similarity


def _image_height(match: PatchWordMatch) -> float:
    """Height of the large image in inches; very tall images are drawn narrower."""
    return _LEFT * min(match.image.shape[0] / match.image.shape[1], 2)


def _box(left: float, top: float, width: float, height: float, total: float) -> tuple[float, float, float, float]:
    """A rectangle in inches from the upper left corner, as matplotlib's fractions of the figure."""
    return left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total


def _word_map(axes: Axes, match: PatchWordMatch, values: np.ndarray, limits: tuple, best: int) -> AxesImage:
    from matplotlib.patches import Rectangle

    rows, columns = match.grid
    extent = (0, columns, rows, 0)
    aspect = _aspect(match)
    axes.imshow(match.image.mean(axis=2), cmap="gray", vmin=0, vmax=1, extent=extent, aspect=aspect)
    drawn = axes.imshow(
        values,
        cmap=_COLORS,
        vmin=limits[0],
        vmax=limits[1],
        alpha=0.75,
        extent=extent,
        aspect=aspect,
        interpolation="nearest",
    )
    if best >= 0:
        row, column = divmod(int(best), columns)
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=VERMILION, linewidth=2, clip_on=False))
    axes.set_axis_off()
    return drawn


def _aspect(match: PatchWordMatch) -> float:
    # Axes count patches, which need not be squares.
    return (match.image.shape[0] / match.grid[0]) / (match.image.shape[1] / match.grid[1])


def _overview(figure: Figure, match: PatchWordMatch, best: np.ndarray, height: float) -> None:
    """The image with the best patches outlined and the numbers of their words."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    rows, columns = match.grid
    tall = _image_height(match)
    axes = figure.add_axes(_box(_MARGIN, _TOP + 0.12, _LEFT, tall, height))
    axes.imshow(match.image, extent=(0, columns, rows, 0), aspect=_aspect(match), interpolation="nearest")
    side = 72 * min(_LEFT / columns, tall / rows)
    size = min(10.0, max(6.5, side / 2.4))
    room = max(1, int(side / (0.55 * size)))
    for patch in sorted({int(index) for index in best if index >= 0}):
        row, column = divmod(patch, columns)
        numbers = [str(word + 1) for word in np.flatnonzero(best == patch)]
        text = ",".join(numbers)
        if len(text) > room:
            text = f"{numbers[0]}+"
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=VERMILION, linewidth=1.5, clip_on=False))
        axes.text(
            column + 0.5,
            row + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color=DARK,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
    axes.set_axis_off()


def _key(figure: Figure, drawn: AxesImage, height: float, shown: int, match: PatchWordMatch) -> None:
    """The colour scale and what the marks mean, below the image."""
    from matplotlib.ticker import MaxNLocator

    tall = _image_height(match)
    scale = figure.add_axes(_box(_MARGIN + 0.1, _TOP + tall + 0.3, _LEFT - 0.2, 0.14, height))
    bar = figure.colorbar(drawn, cax=scale, orientation="horizontal")
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.set_label("similarity of patch and word", fontsize=SMALL)
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.ax.tick_params(labelsize=SMALL)
    notes = ["number: the word whose best patch this is", "“3+”: word 3 and others after it"]
    if any(match.special_words[:shown]):
        notes.append("italic: special token")
    if shown < len(match.words):
        notes.append(f"the first {shown} of {len(match.words)} tokens are shown")
    figure.text(
        _MARGIN / WIDTH, 1 - (_TOP + tall + 0.92) / height, "\n".join(notes), fontsize=SMALL, va="top", color=DARK
    )


__all__ = ["PatchWordMatch", "plot_matches"]
