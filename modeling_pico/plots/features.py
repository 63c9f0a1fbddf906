"""Pictures of what a model does with features: scores, patch-word matches, semantic probability, prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .canvas import (
    BLUE,
    DARK,
    DIVERGING,
    LIGHT,
    ORANGE,
    SEQUENTIAL,
    SMALL,
    NothingToDrawError,
    finish,
    finite,
    legend_below,
    new_figure,
    require_matplotlib,
    shorten,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


_SIDES = {"image": "Images", "text": "Texts"}
# Difference of two probabilities that is shown in full colour, at least.
_VISIBLE = 0.1


@dataclass
class PairScores:
    """
    Scores of all pairs of some images and texts.

    Attributes:
        unweighted (`np.ndarray` of shape `(images, texts)`): Scores of the tokens as they are.
        matches (`np.ndarray` of shape `(images, texts)`): True where image and text mean the same.
        weighted (`np.ndarray` of shape `(images, texts)`, *optional*):
            Scores of the same tokens with the semantic weights folded in, where the model has weights.
    """

    unweighted: np.ndarray
    matches: np.ndarray
    weighted: np.ndarray | None = None


def separation(scores: np.ndarray, matches: np.ndarray) -> float:
    """
    Probability that a matched pair scores higher than an unmatched one, both drawn at random; a tie counts half (the
    area under the ROC curve).
    """
    matched, unmatched = scores[matches], np.sort(scores[~matches])
    below = np.searchsorted(unmatched, matched, "left") + np.searchsorted(unmatched, matched, "right")
    return float(below.mean() / (2 * len(unmatched)))


def plot_pair_scores(pairs: PairScores, bins: int = 40) -> Figure:
    r"""
    Distribution of the scores of matched and unmatched pairs, without and with semantic weights.

    Args:
        pairs ([`PairScores`]): The scores.
        bins (`int`, *optional*, defaults to 40): Bins over the range of all scores.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: without a matched or without an unmatched pair.
    """
    require_matplotlib()
    from matplotlib.patches import Patch

    matches = np.asarray(pairs.matches, dtype=bool)
    if matches.all() or not matches.any():
        raise NothingToDrawError("scores need matched and unmatched pairs")
    panels = {"Without weights": finite("scores", pairs.unweighted)}
    if pairs.weighted is not None:
        panels["With semantic weights"] = finite("weighted scores", pairs.weighted)
    else:
        panels = {"Scores, unweighted": panels["Without weights"]}
    edges = np.histogram_bin_edges(np.concatenate([scores.ravel() for scores in panels.values()]), bins)
    figure = new_figure(2.7 * len(panels) + 1.0, "Do matching images and texts score higher than others?")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, scores) in zip(grid, panels.items(), strict=True):
        handles = []
        for name, chosen, color, alpha in (("unmatched", ~matches, BLUE, 0.45), ("matched", matches, ORANGE, 0.65)):
            values = scores[chosen]
            share = np.full(len(values), 100 / len(values))
            axes.hist(values, edges, weights=share, color=color, alpha=alpha)
            axes.hist(values, edges, weights=share, color=color, histtype="step", linewidth=1.5)
            axes.axvline(values.mean(), color=color, linestyle="--", linewidth=1.5)
            handles.append(Patch(facecolor=color, alpha=alpha + 0.2, label=f"{name} pairs ({len(values):,})"))
        area = separation(scores, matches)
        finish(
            axes,
            f"{title}: a matched pair beats an unmatched one in {100 * area:.1f} % of cases",
            "pair score (dashed: means)" if axes is grid[-1] else None,
            "share of pairs per bin (%)",
        )
    legend_below(figure, handles)
    return figure


@dataclass
class SemanticProbability:
    """
    Semantic probability of the feature columns of some samples.

    Attributes:
        probability (`dict[str, np.ndarray]`): Of shape `(samples, dim)`, by side (`"image"`, `"text"`).
        groups (`list[str]`, *optional*): Style of each sample.
    """

    probability: Mapping[str, np.ndarray]
    groups: list[str] | None = None


def plot_semantic_probability(data: SemanticProbability) -> Figure:
    r"""
    Semantic probability per feature column, sorted, with its spread over samples; where styles are known, also how far
    the mean of each style lies from the mean of all.

    Args:
        data ([`SemanticProbability`]): The probabilities.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: if no side has a semantic probability.
    """
    if not data.probability:
        raise NothingToDrawError("the model has no semantic probability")
    names = list(dict.fromkeys(data.groups or []))
    deviations = _style_deviations(data, names)
    heat = 0.22 * len(names) + 0.9 if deviations else 0.0
    ratios = [ratio for _ in data.probability for ratio in (2.1, heat) if ratio]
    figure = new_figure(sum(ratios) + 0.9, "How much meaning does each feature column carry, by the model's estimate?")
    panels = iter(figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0])
    for side, probability in data.probability.items():
        probability = finite(f"semantic probability ({side})", probability)
        order = np.argsort(probability.mean(axis=0), kind="stable")[::-1]
        _sorted_curve(next(panels), probability[:, order], _SIDES[side], labelled=not deviations)
        if deviations:
            _heat_map(next(panels), deviations[side][:, order], names, _SIDES[side])
    return figure


def _style_deviations(data: SemanticProbability, names: list[str]) -> dict[str, np.ndarray]:
    """Mean of each style minus the mean of all styles `(styles, dim)`, by side; empty if styles make no difference."""
    deviations = {}
    for side, probability in data.probability.items() if len(names) > 1 else ():
        members = [np.array(data.groups) == name for name in names]
        means = np.stack([np.asarray(probability)[member].mean(axis=0) for member in members])
        deviations[side] = means - means.mean(axis=0)
    largest = max((np.abs(values).max() for values in deviations.values()), default=0)
    return deviations if largest > 1e-6 else {}


def _sorted_curve(axes: Axes, probability: np.ndarray, side: str, labelled: bool) -> None:
    places = np.arange(probability.shape[1])
    means = probability.mean(axis=0)
    low, high = np.percentile(probability, [10, 90], axis=0)
    axes.fill_between(places, low, high, step="mid", color=BLUE, alpha=0.3, linewidth=0)
    marker = "o" if len(places) == 1 else None
    axes.plot(places, means, color=BLUE, drawstyle="steps-mid", linewidth=1.5, marker=marker)
    axes.set_xlim(-0.5, len(places) - 0.5)
    # All of the range that a probability can have: a narrow one looks narrow.
    axes.set_ylim(0, 1)
    title = f"{side}: mean and 10–90 % range over {len(probability):,} samples; "
    title += f"means from {means.min():.2f} to {means.max():.2f}"
    finish(axes, title, "feature columns, highest mean first" if labelled else None, "probability (0–1)")
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)


def _heat_map(axes: Axes, deviation: np.ndarray, names: list[str], side: str) -> None:
    # The extremes of a few columns would leave all others white, and small differences are to look small.
    limit = max(float(np.percentile(np.abs(deviation), 99)), _VISIBLE)
    image = axes.imshow(deviation, aspect="auto", interpolation="nearest", cmap=DIVERGING, vmin=-limit, vmax=limit)
    axes.set_yticks(range(len(names)), [shorten(name, 28) for name in names], parse_math=False)
    title = f"{side}: mean of each style minus the mean of all styles; at most {np.abs(deviation).max():.2g}"
    finish(axes, title, "feature columns, in the same order", None)
    axes.spines[:].set_visible(False)
    _color_bar(axes, image, "difference")


def _color_bar(axes: Axes, image: AxesImage, label: str) -> Colorbar:
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=14, extend="both")
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


@dataclass
class PrototypeSet:
    """
    Style prototypes of one side.

    Attributes:
        prototypes (`np.ndarray` of shape `(prototypes, length)`): The centroids of feature columns.
        style_rate (`np.ndarray` of shape `(prototypes,)`): Mean pseudo-style probability of each cluster.
        mode (`str`): What a column is: `"moments"` or `"quantile"`.
        assigned (`np.ndarray` of shape `(prototypes,)`, *optional*):
            Number of columns of some samples whose nearest prototype it is.
    """

    prototypes: np.ndarray
    style_rate: np.ndarray
    mode: str
    assigned: np.ndarray | None = None


def plot_prototypes(sides: Mapping[str, PrototypeSet]) -> Figure:
    r"""
    Style prototypes of both sides, sorted by style rate: what their columns look like, the style rates, and how many
    columns are nearest to each.

    Args:
        sides (`dict[str, PrototypeSet]`): By side, `"image"` and `"text"`.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: if there is no side.
    """
    if not sides:
        raise NothingToDrawError("the model has no style prototypes")
    counted = any(item.assigned is not None for item in sides.values())
    ratios = [3.2, 1.5, 1.5][: 3 if counted else 2]
    figure = new_figure(sum(ratios) + 1.2, "Style prototypes: typical feature columns and how often they carry style")
    grid = figure.subplots(len(ratios), len(sides), squeeze=False, height_ratios=ratios)
    handles: list = []
    for column, (side, item) in zip(grid.T, sides.items(), strict=True):
        prototypes, rate = finite("prototypes", item.prototypes), finite("style rates", item.style_rate)
        order = np.argsort(rate, kind="stable")[::-1]
        colors = _rate_colors(rate[order])
        if item.mode == "moments":
            handles = _profiles(column[0], prototypes[order], side)
        else:
            _curves(column[0], prototypes[order], colors, side)
        labels = ("style rate (%)", "columns (%)")
        values = [100 * rate, None]
        titles = ["Style rate: mean pseudo-style probability", ""]
        if item.assigned is not None:
            counts = finite("assigned columns", item.assigned)
            values[1] = 100 * counts / max(counts.sum(), 1)
            titles[1] = f"Share of {int(counts.sum()):,} columns that are nearest to it"
        for axes, title, label, value in zip(column[1:], titles, labels, values, strict=False):
            if value is None:
                axes.remove()
                continue
            axes.bar(range(len(rate)), value[order], color=colors, edgecolor=DARK, linewidth=0.5)
            _prototype_axis(axes, [str(index) for index in order])
            last = axes is column[-1]
            finish(axes, title, "prototype, highest style rate first" if last else None, label)
    if handles:
        legend_below(figure, handles)
    return figure


def _rate_colors(rate: np.ndarray) -> np.ndarray:
    from matplotlib import colormaps

    span = float(np.ptp(rate))
    place = (rate - rate.min()) / span if span > 0 else np.full(len(rate), 0.5)
    return colormaps[SEQUENTIAL](place)


def _prototype_axis(axes: Axes, names: list[str]) -> None:
    """One place for each prototype, with its name as far as there is room."""
    step = -(-len(names) // 16)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlim(-0.6, len(names) - 0.4)


def _profiles(axes: Axes, prototypes: np.ndarray, side: str) -> list:
    """Mean and standard deviation, `(prototypes, 2)`; returns the handles of the legend."""
    places = np.arange(len(prototypes))
    mean, spread = prototypes.T
    width = min(6.0, max(3.0, 150 / len(places)))
    handles = [
        axes.vlines(places, mean - spread, mean + spread, color=BLUE, linewidth=width, label="mean ± spread"),
        axes.plot(places, mean, "o", color=ORANGE, markeredgecolor=DARK, markersize=width, label="mean")[0],
    ]
    axes.axhline(0, color=DARK, linewidth=0.8, linestyle=":")
    _prototype_axis(axes, [""] * len(places))
    finish(axes, f"{_SIDES[side]}: values of a typical column", None, "feature value × √dim")
    return handles


def _curves(axes: Axes, prototypes: np.ndarray, colors: np.ndarray, side: str) -> None:
    """Sorted values `(prototypes, length)` as curves."""
    length = prototypes.shape[1]
    places = np.linspace(0, 100, length)
    # The highest style rate is drawn last, above the others.
    for values, color in list(zip(prototypes, colors, strict=True))[::-1]:
        axes.plot(places, values, color=color, linewidth=1.4, marker="o" if length == 1 else None)
    axes.axhline(0, color=DARK, linewidth=0.8, linestyle=":")
    axes.set_xlim(-3, 103)
    title = f"{_SIDES[side]}: a typical column (colour: style rate)"
    finish(axes, title, "tokens of the sample, sorted by value (%)", "feature value × √dim")


__all__ = [
    "PairScores",
    "PrototypeSet",
    "SemanticProbability",
    "plot_pair_scores",
    "plot_prototypes",
    "plot_semantic_probability",
    "separation",
]
