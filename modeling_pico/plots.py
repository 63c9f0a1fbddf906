"""
Pictures of a model and its training: each `plot_*` turns plain data into a figure, and [`save_plots`] draws all that
fit. They need matplotlib: `pip install modeling-pico[plots]`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging

from .data import CaptionedImageDataset, PicoDataCollator
from .evaluation.evaluator import EncodedRetrieval, RetrievalEvaluator, encode_batches
from .evaluation.uncertainty_reranking import RetrievalUncertainty, RiskCoverage
from .markdown import signed_number
from .model.backbones_pico import num_prefix_tokens
from .model.modeling_pico import PicoModel
from .model.prototypes_pico import squared_distances


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .training import PicoTrainer


logger = logging.get_logger(__name__)

FOLDER = "plots"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_DARK, _GREY, _LIGHT = "#222222", "#767676", "#D9D9D9"
_LINES = (_BLUE, _VERMILION, _GREEN, _PURPLE, _ORANGE, _SKY)
# Ten inches at this resolution are 1000 pixels.
_WIDTH, _DPI = 10.0, 100
_TITLE, _LABEL, _SMALL = 13, 11, 9
_SIDES = {"image": "Images", "text": "Texts"}
_STAGES = (("plain alignment", "#F0F0F0"), ("first prototypes", "#CFE8F7"), ("updated prototypes", "#D5EFE3"))
_CURVES = {
    "loss": ("Loss", "loss"),
    "rsum": ("Validation retrieval", "rSum (points of 600)"),
    "learning_rate": ("Learning rate of new layers", "learning rate"),
    "logit_scale": ("Logit scale (inverse temperature)", "logit scale"),
}
_CONSTRUCTIONS = {
    "prototype_feedback_gain": ("Gain of each prototype construction", "validation rSum (points)", signed_number),
    "prototype_feedback_weight": ("Feedback weight of the new prototypes", "weight (0–1)", "{:.2g}".format),
}
# Difference of two probabilities that is shown in full colour, at least: small ones are to look small.
_VISIBLE = 0.1
# Rows of a heat map, and maps of words, that stay readable.
_MAX_STYLES, _MAX_WORDS, _WORD_COLUMNS = 20, 25, 5
_BATCH = 32


class NothingToDrawError(ValueError):
    """A picture has no subject: the model lacks the part it shows, or nothing has been recorded yet."""


def has_matplotlib() -> bool:
    """Whether matplotlib, which draws the pictures, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """ImportError that names the extra to install, unless matplotlib is installed."""
    if not has_matplotlib():
        raise ImportError("Pictures are drawn by matplotlib, which is not installed: pip install modeling-pico[plots]")


def _new_figure(height: float, title: str) -> Figure:
    """An empty figure of `height` inches with a canvas of its own; the state of pyplot is not touched."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=_TITLE, x=0.01, ha="left", parse_math=False)
    return figure


def _finish(axes: Axes, title: str, x_label: str | None, y_label: str | None) -> None:
    """Labels one panel and takes away what carries no information."""
    axes.set_title(title, fontsize=_LABEL, loc="left")
    axes.set_xlabel(x_label or "", fontsize=_LABEL)
    axes.set_ylabel(y_label or "", fontsize=_LABEL)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: Figure, handles: Iterable[Any]) -> None:
    """A legend below all panels, where it covers nothing, in as many columns as fit."""
    of_label = {_shorten(handle.get_label(), 60): handle for handle in handles}
    # A letter takes about 7.5 pixels, the sample and the gaps beside it about 55.
    columns = max(1, min(4, int(_WIDTH * _DPI / (7.5 * max(map(len, of_label)) + 55))))
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": columns, "frameon": False}
    for text in figure.legend([*of_label.values()], [*of_label], fontsize=_SMALL + 1, **place).get_texts():
        text.set_parse_math(False)


def _shorten(text: str, length: int) -> str:
    """`text` on one line, cut to `length` characters with an ellipsis."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def _array(name: str, values: Any) -> np.ndarray:
    """`values` as an array of floats; ValueError if one of them is not a finite number."""
    array = torch.as_tensor(values).detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite.")
    return array


def plot_training_curves(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    r"""
    Loss, validation rSum beside that of a random ranking, learning rate and logit scale over the training, with the
    stages of the prototypes shaded; for every construction of prototypes its gain in rSum and its feedback weight.

    A panel without at least two values is left out. So are values that are not finite, and evaluations after the end
    of the training, for instance of the best checkpoint.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.

    Raises [`NothingToDrawError`] if no training was logged.
    """
    rows = list(itertools.takewhile(lambda row: "train_runtime" not in row, log_history))
    unit = "epoch" if all(row.get("epoch") is not None for row in rows) else "step"
    curves: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    starts, chance = {0: 0.0}, None
    for row in rows:
        x = float(row.get(unit, 0.0))
        for key, value in row.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            evaluated = re.fullmatch(r"eval_(?:(.+)_)?(rsum|loss)", key)
            if key == "prototype_stage":
                starts.setdefault(int(value), x)
            elif key.endswith("chance_rsum"):
                chance = float(value) if chance is None else chance
            elif evaluated is not None:
                name = "validation" if evaluated[1] is None else f"validation: {evaluated[1]}"
                curves[evaluated[2]][name].append((x, float(value)))
            elif key in _CURVES or key in _CONSTRUCTIONS:
                curves[key]["training"].append((x, float(value)))
    shown = [key for key in _CURVES if any(len(curve) > 1 for curve in curves[key].values())]
    if not shown:
        raise NothingToDrawError("no training was logged")
    shown += [key for key in _CONSTRUCTIONS if curves[key]]
    end = max(x for curve in curves.values() for points in curve.values() for x, _ in points)
    names = dict.fromkeys(["training", *(name for key in _CURVES for name in curves[key])])
    colors = {name: _LINES[index % len(_LINES)] for index, name in enumerate(names)}
    figure = _new_figure(2.6 * math.ceil(len(shown) / 2) + 0.8, "How the training went")
    grid = figure.subplots(math.ceil(len(shown) / 2), min(2, len(shown)), squeeze=False).ravel()
    handles: list[Any] = []
    for axes, key in zip(grid, shown, strict=False):
        for (stage, start), (_, stop) in itertools.pairwise([*starts.items(), (len(_STAGES), 1.04 * end)]):
            name, color = _STAGES[min(stage, 2)]
            if len(starts) > 1:
                handles.append(axes.axvspan(start, stop, color=color, linewidth=0, zorder=0, label=f"stage: {name}"))
        if key in _CURVES:
            for name, curve in curves[key].items():
                style: dict[str, Any] = {
                    "color": colors[name],
                    "marker": "o" if len(curve) <= 40 else None,
                    "markersize": 4,
                }
                handles += axes.plot(*zip(*curve, strict=True), label=name, zorder=3, **style)
            axes.grid(axis="y", color=_LIGHT, linewidth=0.6, zorder=0)
            title, label = _CURVES[key]
        else:
            title, label, form = _CONSTRUCTIONS[key]
            _bars(axes, curves[key]["training"], end, form)
        if key == "rsum":
            # From zero on, so that a difference looks as large as it is.
            axes.set_ylim(0, 1.1 * max(y for curve in curves[key].values() for _, y in curve) or 1)
            if chance is not None:
                handles.append(axes.axhline(chance, color=_GREY, linestyle="--", label="rSum of a random ranking"))
        axes.set_xlim(0, 1.04 * end)
        _finish(axes, title, unit, label)
    for axes in grid[len(shown) :]:
        axes.remove()
    _legend_below(figure, sorted(handles, key=lambda handle: handle.get_label().startswith("stage")))
    return figure


def _bars(axes: Axes, points: list[tuple[float, float]], end: float, form: Callable) -> None:
    """Bars from zero, with their numbers where there is room; falling ones differ in colour."""
    places, heights = (list(values) for values in zip(*points, strict=True))
    width = 0.6 * min([end / 12, *(b - a for a, b in zip(places, places[1:], strict=False) if b > a)])
    colors = [_GREEN if height >= 0 else _VERMILION for height in heights]
    bars = axes.bar(places, heights, width=width, color=colors, edgecolor=_DARK, linewidth=0.6, zorder=3)
    axes.axhline(0, color=_DARK, linewidth=0.8, zorder=2)
    if len(points) <= 12:
        axes.bar_label(bars, [form(height) for height in heights], padding=2, fontsize=_SMALL, zorder=4)
    # A gain of much less than a point is to look like that.
    axes.set_ylim(1.4 * min(-1, *heights) if form is signed_number else 0, 1.3 * max(1, *heights))


def plot_pair_scores(scores: Mapping[str, Tensor], matches: Tensor) -> Figure:
    r"""
    Distribution of the scores of matched and unmatched pairs, and how often a matched pair scores higher than an
    unmatched one, both drawn at random (a tie counts half: the area under the ROC curve).

    Args:
        scores (`dict[str, torch.Tensor]`): By the title of a panel, scores of shape `(images, texts)`.
        matches (`torch.Tensor` of shape `(images, texts)`): True where image and text mean the same.

    Raises [`NothingToDrawError`] without a matched or without an unmatched pair.
    """
    matched = matches.cpu().numpy().astype(bool)
    if matched.all() or not matched.any():
        raise NothingToDrawError("scores need matched and unmatched pairs")
    panels = {title: _array("scores", values) for title, values in scores.items()}
    edges = np.histogram_bin_edges(np.concatenate([values.ravel() for values in panels.values()]), 40)
    figure = _new_figure(2.6 * len(panels) + 0.9, "Do matching images and texts score higher than others?")
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, values) in zip(grid, panels.items(), strict=True):
        handles = []
        for name, chosen, color, alpha in (("unmatched", ~matched, _BLUE, 0.45), ("matched", matched, _ORANGE, 0.65)):
            share = np.full(int(chosen.sum()), 100 / chosen.sum())
            label = f"{name} pairs ({chosen.sum():,})"
            *_, bars = axes.hist(values[chosen], edges, weights=share, color=color, alpha=alpha, label=label)
            axes.hist(values[chosen], edges, weights=share, color=color, histtype="step", linewidth=1.5)
            axes.axvline(values[chosen].mean(), color=color, linestyle="--", linewidth=1.5)
            handles.append(bars[0])
        lower = np.sort(values[~matched])
        places = np.searchsorted(lower, values[matched], "left") + np.searchsorted(lower, values[matched], "right")
        area = 50 * places.mean() / len(lower)
        beats = f"a matched pair beats an unmatched one in {area:.1f} % of cases"
        _finish(
            axes, f"{title}: {beats}", "pair score (dashed: means)" if axes is grid[-1] else None, "share of pairs (%)"
        )
    _legend_below(figure, handles)
    return figure


def plot_risk_coverage(curves: Mapping[str, RiskCoverage]) -> Figure:
    r"""
    Recall over the share of queries kept, the most certain first, beside what a random order and the best order
    reach; the area under the curve of the risk (100 minus recall) in the titles.

    Args:
        curves (`dict[str, RiskCoverage]`): By direction, what [`risk_coverage`] gives of the same pairs.

    Raises [`NothingToDrawError`] without a curve, or if all queries fail or none does.
    """
    if not any(0 < curve.recall[-1] < 100 for curve in curves.values()):
        raise NothingToDrawError("every order of the queries keeps the same recall")
    queries = len(next(iter(curves.values())).coverage)
    title = f"Are the queries that the model is uncertain of the ones that fail? ({queries} images and texts)"
    figure = _new_figure(4.4, title)
    grid = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, curve) in zip(grid, curves.items(), strict=True):
        coverage, recall = _array("coverage", curve.coverage), _array("recall", curve.recall)
        best: dict[str, Any] = {"color": _GREEN, "linestyle": "-.", "label": "failures left out first"}
        handles = [
            *axes.plot(coverage, recall, color=_BLUE, linewidth=1.8, label="most certain kept first", zorder=4),
            *axes.plot(coverage, _array("best recall", curve.best_recall), zorder=3, **best),
            axes.axhline(recall[-1], color=_GREY, linestyle="--", linewidth=1.2, label="random order", zorder=2),
        ]
        axes.grid(axis="y", color=_LIGHT, linewidth=0.6, zorder=0)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 104)
        areas = f"AURC {curve.aurc:.1f} (random {curve.chance_aurc:.1f}, best {curve.best_aurc:.1f})"
        direction = name.replace("_", " ").capitalize()
        _finish(axes, f"{direction}: {areas}", "queries kept (%)", "recall at 1 (%)" if axes is grid[0] else None)
    _legend_below(figure, handles)
    return figure


def plot_semantic_probability(probability: Mapping[str, Tensor], styles: Sequence[str] | None = None) -> Figure:
    r"""
    Semantic probability per feature column, sorted, with its spread over samples; where styles are known, also how far
    the mean of the images of each style lies from the mean of all styles.

    Args:
        probability (`dict[str, torch.Tensor]`): Of shape `(samples, dim)`, by side (`"image"`, `"text"`).
        styles (`list[str]`, *optional*): Style of each image.

    Raises [`NothingToDrawError`] if no side has a semantic probability.
    """
    if not probability:
        raise NothingToDrawError("the model has no semantic probability")
    sides = {side: _array(f"semantic probability ({side})", values) for side, values in probability.items()}
    orders = {side: np.argsort(values.mean(axis=0), kind="stable")[::-1] for side, values in sides.items()}
    names, deviation = list(dict.fromkeys(styles or [])), np.zeros((0, 0))
    if styles and "image" in sides:
        means = np.stack([sides["image"][np.array(styles) == name].mean(axis=0) for name in names])
        deviation = (means - means.mean(axis=0))[:, orders["image"]]
    # Styles that make no difference get no map.
    compared = bool(len(names) > 1 and np.abs(deviation).max() > 1e-6)
    heights = [2.6, 0.22 * len(names) + 0.9] if compared else [2.6]
    layout = [list(sides)] + [["styles"] * len(sides)] * compared
    samples = len(next(iter(sides.values())))
    title = f"How much meaning does each feature column carry? (mean and 10–90 % range of {samples:,} samples)"
    figure = _new_figure(sum(heights) + 0.5, title)
    panels: Any = figure.subplot_mosaic(layout, height_ratios=heights)  # type: ignore[arg-type]
    for side, values in sides.items():
        axes, values = panels[side], values[:, orders[side]]
        places, means = np.arange(values.shape[1]), values.mean(axis=0)
        axes.fill_between(places, *np.percentile(values, [10, 90], axis=0), step="mid", color=_SKY, linewidth=0)
        marker = "o" if len(places) == 1 else None
        axes.plot(places, means, color=_BLUE, drawstyle="steps-mid", linewidth=1.5, marker=marker)
        axes.set_xlim(-0.5, len(places) - 0.5)
        # All of the range that a probability can have: a narrow one looks narrow.
        axes.set_ylim(0, 1)
        axes.grid(axis="y", color=_LIGHT, linewidth=0.6)
        title = f"{_SIDES[side]}: means from {means.min():.2f} to {means.max():.2f}"
        _finish(axes, title, "feature columns, highest mean first", "probability (0–1)")
    if compared:
        axes = panels["styles"]
        # The extremes of a few columns would leave all others white.
        limit = max(float(np.percentile(np.abs(deviation), 99)), _VISIBLE)
        image = axes.imshow(deviation, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_yticks(range(len(names)), [_shorten(name, 28) for name in names], parse_math=False)
        title = f"Images: mean of each style minus the mean of all styles; at most {np.abs(deviation).max():.2g}"
        _finish(axes, title, "feature columns, in the order of the images' curve", None)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=14, extend="both")
        bar.set_label("difference", fontsize=_SMALL)
        bar.ax.tick_params(labelsize=_SMALL)
    return figure


def plot_prototypes(sides: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    r"""
    Style prototypes of both sides, sorted by style rate: the values of the feature columns they stand for, the style
    rates, and how many columns of some samples are nearest to each.

    Args:
        sides (`dict[str, dict[str, torch.Tensor]]`):
            By side, `"image"` and `"text"`: `center`, `low` and `high` of the values of a typical column, `style_rate`
            (the mean pseudo-style probability) and `columns` (the number of columns), each of shape `(prototypes,)`.

    Raises [`NothingToDrawError`] if there is no side.
    """
    if not sides:
        raise NothingToDrawError("the model has no style prototypes, or none has been built yet")
    figure = _new_figure(6.6, "Style prototypes: typical feature columns and how often they carry style")
    grid = figure.subplots(3, len(sides), squeeze=False, sharex="col", sharey="row", height_ratios=[3.0, 1.6, 1.6])
    for (values, rates, shares), (side, tensors) in zip(grid.T, sides.items(), strict=True):
        item = {name: _array(f"prototypes, {name}", tensor) for name, tensor in tensors.items()}
        order = np.argsort(item["style_rate"], kind="stable")[::-1]
        center, low, high = (item[name][order] for name in ("center", "low", "high"))
        places, left = np.arange(len(order)), grid[0, 0] is values
        width = min(6.0, max(2.0, 150 / len(places)))
        handles = [
            values.vlines(places, low, high, color=_BLUE, linewidth=width, label="spread over tokens"),
            *values.plot(places, center, "o", color=_ORANGE, markeredgecolor=_DARK, markersize=width, label="center"),
        ]
        values.axhline(0, color=_DARK, linewidth=0.8, linestyle=":")
        _finish(values, f"{_SIDES[side]}: values of a typical column", None, "feature value × √dim" if left else None)
        total = max(item["columns"].sum(), 1)
        for axes, heights in ((rates, item["style_rate"]), (shares, item["columns"] / total)):
            axes.bar(places, 100 * heights[order], color=_SKY, edgecolor=_DARK, linewidth=0.5)
        _finish(rates, "Style rate: mean pseudo-style probability", None, "rate (%)" if left else None)
        step = -(-len(order) // 16)
        shares.set_xticks(places[::step], [str(index) for index in order[::step]])
        shares.set_xlim(-0.6, len(order) - 0.4)
        title = f"Share of {int(total):,} columns that are nearest to it"
        _finish(shares, title, "prototype, highest style rate first", "columns (%)" if left else None)
    _legend_below(figure, handles)
    return figure


def plot_matches(
    image: Tensor, words: Sequence[str], similarity: Tensor, grid: tuple[int, int], *, caption: str, score: float
) -> Figure:
    r"""
    An image with the patches that the words of a caption match best, numbered by word; and for each of the first 25
    words a map of its similarity with every patch, the best one outlined.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): The image as the model saw it, values in [0, 1].
        words (`list[str]`): The caption's tokens that take part in the score.
        similarity (`torch.Tensor` of shape `(image tokens, words)`): Special image tokens first, then the patches.
        grid (`tuple[int, int]`): Rows and columns of patches.
        caption (`str`): The caption.
        score (`float`): Score of the pair.

    Raises [`NothingToDrawError`] if the caption has no words.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values, pixels, (rows, columns) = _array("similarities", similarity), _array("image", image), grid
    special = len(values) - rows * columns
    if not words:
        raise NothingToDrawError("the caption has no words")
    pixels, best, shown = pixels.transpose(1, 2, 0), values.argmax(axis=0), min(len(words), _MAX_WORDS)
    lines, tall = math.ceil(shown / _WORD_COLUMNS), min(pixels.shape[0] / pixels.shape[1], 2.0)
    height = max(lines * (1.3 * min(tall, 1.0) + 0.42), 2.9 * tall + 1.5)
    figure = _new_figure(height + 0.4, f"“{_shorten(caption, 95)}”")
    left, right = figure.subfigures(1, 2, width_ratios=[3, 6.8])  # type: ignore[misc]
    # Patches are the unit of the axes, and need not be squares.
    place: dict[str, Any] = {"extent": (0, columns, rows, 0)}
    place["aspect"] = (pixels.shape[0] / rows) / (pixels.shape[1] / columns)
    maps = values[special:, :shown]
    colors: dict[str, Any] = {"cmap": "viridis", "vmin": maps.min(), "vmax": max(maps.max(), maps.min() + 1e-6)}
    panels = right.subplots(lines, _WORD_COLUMNS, squeeze=False).ravel()
    for axes in panels:
        axes.set(frame_on=False, xticks=[], yticks=[], anchor="N")
    for index, axes in enumerate(panels[:shown]):
        axes.imshow(pixels.mean(axis=2), cmap="gray", vmin=0, vmax=1, **place)
        axes.imshow(maps[:, index].reshape(grid), interpolation="nearest", alpha=0.75, **colors, **place)
        target = "" if best[index] >= special else " (no patch)"
        title = f"{index + 1} {_shorten(words[index], 13)}\n{values[best[index], index]:.2f}{target}"
        axes.set_title(title, fontsize=_SMALL, pad=2, parse_math=False)
        _outline(axes, [int(best[index])], special, columns)
    overview, scale, rest = left.subplots(3, 1, height_ratios=[2.9 * tall + 0.5, 0.12, height - 2.9 * tall - 0.6])
    overview.imshow(pixels, interpolation="nearest", **place)
    overview.set_axis_off()
    title = f"score {score:.2f}; best patches, numbered by\nword (“3+”: word 3 and later ones)"
    overview.set_title(title, fontsize=_SMALL + 1, loc="left")
    _outline(overview, best[:shown].tolist(), special, columns, numbered=True)
    rest.set_axis_off()
    shades = ScalarMappable(Normalize(colors["vmin"], colors["vmax"]), colors["cmap"])
    left.colorbar(shades, scale, orientation="horizontal")
    left_out = f"\nthe first {shown} of {len(words)} tokens are shown" if shown < len(words) else ""
    scale.set_xlabel(f"similarity of patch and word{left_out}", fontsize=_SMALL)
    scale.tick_params(labelsize=_SMALL)
    return figure


def _outline(axes: Axes, best: list[int], special: int, columns: int, numbered: bool = False) -> None:
    """Outlines the best patches of words, on request with the numbers of the words."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    for token in sorted({token for token in best if token >= special}):
        row, column = divmod(token - special, columns)
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=_VERMILION, linewidth=1.5, clip_on=False))
        numbers = [str(index + 1) for index, other in enumerate(best) if other == token]
        if numbered:
            text = ",".join(numbers) if len(numbers) < 3 else f"{numbers[0]}+"
            drawn = axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=_SMALL)
            drawn.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _spread(length: int, count: int) -> list[int]:
    """At most `count` rows, evenly spaced from the first on."""
    return [index * length // min(length, count) for index in range(min(length, count))]


def _encode(
    model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, rows: Sequence[int]
) -> EncodedRetrieval:
    """Some rows, each with its first caption, in this process alone."""

    def batches() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(rows), _BATCH):
            samples = (dataset[row] for row in rows[start : start + _BATCH])
            yield collator([{**sample, "captions": sample["captions"][:1]} for sample in samples])

    return encode_batches(model, batches())


def _prototypes_in_use(model: PicoModel) -> Any | None:
    prototypes: Any = model.style_prototypes
    return None if prototypes is None or prototypes["image"].stage == 0 else prototypes


def _draw_pair_scores(model: PicoModel, encoded: EncodedRetrieval) -> Figure:
    panels = {"Scores": RetrievalEvaluator().score(model, encoded)}
    if _prototypes_in_use(model) is not None:
        masks = encoded.image_mask, encoded.text_mask
        unweighted = model.score(encoded.image_tokens, encoded.text_tokens, *masks)
        panels = {"Without weights": unweighted, "With semantic weights": panels["Scores"]}
    return plot_pair_scores(panels, encoded.image_ids[:, None] == encoded.text_ids)


def _draw_risk_coverage(model: PicoModel, encoded: EncodedRetrieval) -> Figure:
    uncertainty = RetrievalUncertainty.measure(model, encoded)
    if uncertainty is None:
        raise NothingToDrawError("the model has no uncertainty")
    return plot_risk_coverage(uncertainty.risk_coverage(RetrievalEvaluator().ranks(model, encoded)))


@torch.no_grad()
def _draw_prototypes(model: PicoModel, encoded: EncodedRetrieval) -> Figure:
    sides = {}
    for side, held in (_prototypes_in_use(model) or {}).items():
        centroids, scale = held.prototypes.float(), held.column_scale.float()
        columns = held.columns(getattr(encoded, f"{side}_tokens"), getattr(encoded, f"{side}_mask"))
        nearest = squared_distances(columns, centroids, scale).argmin(dim=-1)
        if model.config.column_mode == "moments":
            center, spread = centroids.unbind(dim=1)
            low, high = center - spread, center + spread
        else:
            low, center, high = centroids.quantile(torch.tensor([0.1, 0.5, 0.9]).to(centroids), dim=1)
        counts = torch.bincount(nearest.flatten(), minlength=len(centroids))
        sides[side] = {"center": center, "low": low, "high": high, "style_rate": held.style_rate, "columns": counts}
    return plot_prototypes(sides)


@torch.no_grad()
def _draw_semantic_probability(
    model: PicoModel, collator: PicoDataCollator, splits: Mapping[str, CaptionedImageDataset], num_samples: int
) -> Figure:
    """Each style, up to the first twenty, in the first split that shows it; without styles, the first split."""
    if _prototypes_in_use(model) is None:
        return plot_semantic_probability({})
    of_style: dict[str, tuple[CaptionedImageDataset, list[int]]] = {}
    for dataset in splits.values():
        for row, style in enumerate(dataset.styles or []):
            if style is not None and of_style.setdefault(str(style), (dataset, []))[0] is dataset:
                of_style[str(style)][1].append(row)
    groups = list(of_style.items())[:_MAX_STYLES]
    size, styles, encoded = max(4, num_samples // max(1, len(groups))), [], []
    for style, (dataset, rows) in groups:
        chosen = [rows[index] for index in _spread(len(rows), size)]
        encoded.append(_encode(model, collator, dataset, chosen))
        styles += [style] * len(chosen)
    if not encoded:
        dataset = next(iter(splits.values()))
        encoded.append(_encode(model, collator, dataset, _spread(len(dataset), num_samples)))
    probability: dict[str, Any] = {side: [] for side in _SIDES}
    for some, side in itertools.product(encoded, _SIDES):
        tokens, mask = getattr(some, f"{side}_tokens"), getattr(some, f"{side}_mask")
        probability[side].append(model.alignment_head.weight(tokens, mask, side)[1])
    probability = {side: torch.cat(parts) for side, parts in probability.items()}
    return plot_semantic_probability(probability, styles or None)


@torch.no_grad()
def _draw_matches(model: PicoModel, collator: PicoDataCollator, dataset: CaptionedImageDataset, row: int) -> Figure:
    if model.config.method == "clip_style":
        raise NothingToDrawError("the model scores pooled vectors and matches no patches with words")
    sample = dataset[row]
    pair = {"image": sample["image"], "caption": sample["captions"][0], "image_id": sample["image_id"]}
    batch = {name: tensor.to(model.device) for name, tensor in collator([pair]).items() if name != "image_ids"}
    outputs = model.eval()(**batch)
    taking_part = outputs.text_mask[0]
    similarity = outputs.image_embeds[0].float() @ outputs.text_embeds[0, taking_part].float().T
    return plot_matches(
        shown_image(batch["pixel_values"][0], collator.processor.image_processor),
        token_names(collator.processor.tokenizer, batch["input_ids"][0, taking_part].tolist()),
        similarity,
        patch_grid(model, len(similarity), batch["pixel_values"].shape[-2:]),
        caption=pair["caption"],
        score=float(outputs.logits_per_image / outputs.logit_scale),
    )


def token_names(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Tokens as text; what decodes to nothing goes by its name in the vocabulary."""
    return [tokenizer.decode([token]).strip() or tokenizer.convert_ids_to_tokens(token) for token in tokens]


def patch_grid(model: PicoModel, tokens: int, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the patches among `tokens` of an image of `size` `(height, width)`."""
    special = num_prefix_tokens(model.config.vision_config) if model.config.vision_special_tokens else 0
    (height, width), patches = size, tokens - special
    rows = max(1, round((patches * height / width) ** 0.5))
    if patches < 1 or patches % rows:
        raise NothingToDrawError(f"{patches} image tokens are no grid of an image of {height} x {width} pixels")
    return rows, patches // rows


def shown_image(pixels: Tensor, image_processor: Any) -> Tensor:
    """The model's own input `(3, height, width)` with values in [0, 1]."""
    options = image_processor.to_dict()
    pixels = pixels.float().cpu()
    if options.get("do_normalize"):
        mean, spread = (torch.tensor(options[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * spread + mean
    return (pixels if options.get("do_rescale", True) else pixels / 255).clamp(0, 1)


def save_plots(
    folder: str | os.PathLike,
    *,
    model: PicoModel | None = None,
    collator: PicoDataCollator | None = None,
    splits: Mapping[str, CaptionedImageDataset] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    num_samples: int = 200,
    num_matches: int = 4,
) -> list[str]:
    r"""
    Draws every picture that what is given allows, as `{folder}/{name}.png`, 1000 pixels wide.

    A picture that would say nothing (prototypes of a model that has none) is left out with a log line; one that fails
    is left out with a warning that says why.

    Args:
        folder (`str`): Made if it does not exist.
        model ([`PicoModel`], *optional*): The model, unwrapped, for the pictures of what it does with samples.
        collator ([`PicoDataCollator`], *optional*): Makes batches; needed with `model`.
        splits (`dict[str, CaptionedImageDataset]`, *optional*):
            Data by name; needed with `model`. Pairs are scored and matches drawn on the first; styles of all are
            compared.
        log_history (`list[dict]`, *optional*): `trainer.state.log_history`, for the picture of the training.
        num_samples (`int`, *optional*, defaults to 200): Images, each with its first caption, behind the statistics.
        num_matches (`int`, *optional*, defaults to 4): Images whose patch-word matches are drawn.

    Returns the paths of the pictures. Raises ImportError without matplotlib, and ValueError with a model but without
    data or collator.
    """
    require_matplotlib()
    drawings: dict[str, Callable[[], Figure]] = {}
    if log_history:
        drawings["training_curves"] = partial(plot_training_curves, log_history)
    if model is not None:
        if not splits or collator is None:
            raise ValueError("Pictures of a model need `collator` and at least one data set in `splits`.")
        dataset = next(iter(splits.values()))
        encoded = cache(lambda: _encode(model, collator, dataset, _spread(len(dataset), num_samples)))
        drawings["pair_scores"] = lambda: _draw_pair_scores(model, encoded())
        drawings["risk_coverage"] = lambda: _draw_risk_coverage(model, encoded())
        drawings["prototypes"] = lambda: _draw_prototypes(model, encoded())
        drawings["semantic_probability"] = partial(_draw_semantic_probability, model, collator, splits, num_samples)
        for row in _spread(len(dataset), num_matches):
            drawings[f"matches_{row}"] = partial(_draw_matches, model, collator, dataset, row)
    os.makedirs(folder, exist_ok=True)
    paths = []
    for name, draw in logging.tqdm(drawings.items(), desc="Pictures", unit="picture"):
        path = os.path.join(folder, f"{name}.png")
        try:
            draw().savefig(path)
            paths.append(path)
        except NothingToDrawError as reason:
            logger.info(f"Picture {name} is left out: {reason}.")
        except Exception as error:  # A run must not fail because of a picture.
            logger.warning(f"Picture {name} failed: {type(error).__name__}: {error}")
    return paths


def save_run_plots(
    trainer: PicoTrainer, splits: Mapping[str, CaptionedImageDataset], main: str | None = None
) -> list[str]:
    r"""
    Draws all pictures of a run into `{output_dir}/plots` and, where the run reports to TensorBoard, logs them there.

    Only the main process draws. Sharded models (FSDP, DeepSpeed) get the picture of their training alone, since one
    process cannot run them.

    Args:
        trainer ([`PicoTrainer`]): After its training or evaluation.
        splits (`dict[str, CaptionedImageDataset]`): Data by name.
        main (`str`, *optional*): The split on which pairs are scored and matches drawn; the first one by default.

    Returns the paths of the pictures.
    """
    if not trainer.is_world_process_zero():
        return []
    subjects: dict[str, Any] = {}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.info("The model is sharded, so that pictures of what it does with samples are left out.")
    elif splits:
        first = {main: splits[main]} if main is not None and main in splits else {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        subjects = {"model": model, "collator": trainer.data_collator, "splits": {**first, **splits}}
    with trainer.accelerator.autocast():
        folder = os.path.join(str(trainer.args.output_dir), FOLDER)
        paths = save_plots(folder, log_history=trainer.state.log_history, **subjects)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            # It closes its writer at the end of training and opens one again when something is logged.
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={})
            for path in paths:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                tag = f"{FOLDER}/{Path(path).stem}"
                callback.tb_writer.add_image(tag, pixels, trainer.state.global_step, dataformats="HWC")
            callback.tb_writer.flush()
    logger.info(f"{len(paths)} pictures are in {folder}.")
    return paths


__all__ = [
    "NothingToDrawError",
    "has_matplotlib",
    "plot_matches",
    "plot_pair_scores",
    "plot_prototypes",
    "plot_risk_coverage",
    "plot_semantic_probability",
    "plot_training_curves",
    "require_matplotlib",
    "save_plots",
    "save_run_plots",
]
