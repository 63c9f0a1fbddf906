"""Pictures of a training: its curves, and the stages of the prototypes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..markdown import signed_number
from .canvas import (
    DARK,
    GREEN,
    GREY,
    LIGHT,
    LINES,
    SMALL,
    VERMILION,
    WIDTH,
    NothingToDrawError,
    finish,
    legend_below,
    new_figure,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Name and background of each stage.
_STAGES = (("plain alignment", "#F0F0F0"), ("first prototypes", "#CFE8F7"), ("updated prototypes", "#D5EFE3"))
# Inches between bars that a number needs, lying and standing.
_LYING, _STANDING = 0.5, 0.16


@dataclass
class Construction:
    """
    One construction of prototypes.

    Attributes:
        x (`float`): When, in the unit of the history.
        stage (`int`): Stage that begins with it: 1 for the first construction, 2 for later ones.
        weight (`float`): Feedback weight of the new prototypes, in [0, 1].
        gain (`float`, *optional*): Gain in validation rSum, where the feedback measures one.
    """

    x: float
    stage: int
    weight: float
    gain: float | None = None


@dataclass
class TrainingHistory:
    """
    What a training logged, as curves. A curve is a list of `(x, value)`.

    Attributes:
        unit (`str`): What `x` counts: `"epoch"` or `"step"`.
        loss, learning_rate, logit_scale: Curves of the training.
        eval_loss, rsum (`dict` of curves): Of each validation set; the name is empty where there is only one.
        chance_rsum (`float`, *optional*): The rSum of a random ranking of the first validation set.
        constructions (`list[Construction]`): In order.
    """

    unit: str = "epoch"
    loss: list[tuple[float, float]] = field(default_factory=list)
    learning_rate: list[tuple[float, float]] = field(default_factory=list)
    logit_scale: list[tuple[float, float]] = field(default_factory=list)
    eval_loss: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    rsum: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    chance_rsum: float | None = None
    constructions: list[Construction] = field(default_factory=list)

    @property
    def end(self) -> float:
        """The last `x` of anything."""
        curves = [self.loss, self.learning_rate, self.logit_scale, *self.eval_loss.values(), *self.rsum.values()]
        places = [x for curve in curves for x, _ in curve] + [item.x for item in self.constructions]
        return max(places, default=0.0)


def read_history(log_history: Sequence[Mapping[str, Any]]) -> TrainingHistory:
    r"""
    Reads `trainer.state.log_history`.

    Evaluations after the end of the training, for instance of the best checkpoint, are left out. So are values that
    are not finite.

    Args:
        log_history (`list[dict]`): Rows as `Trainer` logs them.

    Returns:
        [`TrainingHistory`]
    """
    rows = list(log_history)
    ends = [index for index, row in enumerate(rows) if "train_runtime" in row]
    rows = rows[: ends[0]] if ends else rows
    unit = "epoch" if all(row.get("epoch") is not None for row in rows) else "step"
    history = TrainingHistory(unit=unit)
    for row in rows:
        x = float(row.get(unit, 0.0))
        for name in ("loss", "learning_rate", "logit_scale"):
            if _is_number(row.get(name)):
                getattr(history, name).append((x, float(row[name])))
        for key, value in row.items():
            match = re.fullmatch(r"eval_(?:(.+)_)?(rsum|loss)", key)
            if match is None or not _is_number(value):
                continue
            if key.endswith("chance_rsum"):
                history.chance_rsum = float(value) if history.chance_rsum is None else history.chance_rsum
                continue
            curves = history.rsum if match[2] == "rsum" else history.eval_loss
            curves.setdefault(match[1] or "", []).append((x, float(value)))
        if _is_number(row.get("prototype_stage")):
            gain = row.get("prototype_feedback_gain")
            weight = float(row.get("prototype_feedback_weight", 1.0))
            stage = int(row["prototype_stage"])
            history.constructions.append(Construction(x, stage, weight, gain if _is_number(gain) else None))
    return history


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def plot_training_curves(history: TrainingHistory) -> Figure:
    r"""
    Loss, learning rate, validation rSum and logit scale over the training; a panel without values is left out.

    Args:
        history ([`TrainingHistory`]): What was logged.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: if nothing was logged.
    """
    losses = {"training": history.loss, **{_validation(name): curve for name, curve in history.eval_loss.items()}}
    panels = [
        ("Loss", "loss (nats)", losses),
        ("Validation retrieval", "rSum (points of 600)", {_validation(n): c for n, c in history.rsum.items()}),
        ("Learning rate of new layers", "learning rate", {"training": history.learning_rate}),
        ("Logit scale (inverse temperature)", "logit scale", {"training": history.logit_scale}),
    ]
    panels = [panel for panel in panels if any(panel[2].values())]
    if not panels or history.end == 0:
        raise NothingToDrawError("no training was logged")
    colors = dict(zip(names := _names(panels), _cycle(len(names)), strict=True))
    figure = new_figure(3.1 * math.ceil(len(panels) / 2) + 0.7, "How the training went")
    grid = figure.subplots(math.ceil(len(panels) / 2), min(2, len(panels)), squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (title, label, curves) in zip(grid, panels, strict=False):
        for name, curve in curves.items():
            if curve:
                handles[name] = _line(axes, curve, colors[name], name)
        if title == "Validation retrieval":
            _from_zero(axes, curves)
        if title == "Validation retrieval" and history.chance_rsum is not None:
            handles["chance"] = axes.axhline(
                history.chance_rsum, color=GREY, linestyle="--", linewidth=1.2, label="rSum of a random ranking"
            )
        finish(axes, title, history.unit, label)
        axes.set_xlim(0, history.end * 1.03 or 1)
    for axes in grid[len(panels) :]:
        axes.remove()
    legend_below(figure, list(handles.values()))
    return figure


def _names(panels: list[tuple[str, str, dict[str, list]]]) -> list[str]:
    """Names of all curves, each once."""
    return list(dict.fromkeys(name for _, _, curves in panels for name, curve in curves.items() if curve))


def plot_stage_timeline(history: TrainingHistory) -> Figure:
    r"""
    Validation rSum over the training with the stages shaded, and below it, for every construction of prototypes, its
    gain in rSum and the weight with which it entered.

    Args:
        history ([`TrainingHistory`]): What was logged.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: if neither an evaluation nor a construction was logged.
    """
    constructions = history.constructions
    if history.end == 0 or not (history.rsum or constructions):
        raise NothingToDrawError("no evaluation and no construction of prototypes was logged")
    gains = [(item.x, item.gain) for item in constructions if item.gain is not None]
    kinds = [kind for kind, shown in (("rsum", history.rsum), ("gain", gains), ("weight", constructions)) if shown]
    title = "Stages of the prototypes, and what each construction gained"
    if not constructions:
        title = "Stages of the prototypes: none were built in this training"
    ratios = [{"rsum": 3.0, "gain": 1.6, "weight": 1.6}[kind] for kind in kinds]
    figure = new_figure(1.25 * sum(ratios) + 1.3, title)
    panels = list(figure.subplots(len(kinds), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
    spans = _shade(panels, history)
    lines = []
    for axes, kind in zip(panels, kinds, strict=True):
        label = history.unit if axes is panels[-1] else None
        if kind == "rsum":
            # The first colour is the training's, in the picture of the curves.
            for color, (name, curve) in zip(_cycle(len(history.rsum) + 1)[1:], history.rsum.items(), strict=True):
                lines.append(_line(axes, curve, color, f"rSum, {_validation(name)}"))
            _from_zero(axes, history.rsum)
            finish(axes, "Validation retrieval (rSum)", label, "points of 600")
        elif kind == "gain":
            _bars(axes, gains, history, signed_number)
            # Of a gain that is much less than a point nothing is to be seen.
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, -1), max(high, 1))
            finish(axes, "Gain Δ of each construction in validation rSum", label, "points")
        else:
            _bars(axes, [(item.x, item.weight) for item in constructions], history, "{:.2g}".format)
            axes.set_ylim(0, 1.4)
            axes.set_yticks([0, 0.5, 1])
            finish(axes, "Feedback weight of the new prototypes; the old ones keep the rest", label, "weight (0–1)")
    legend_below(figure, [*spans, *lines])
    return figure


def _shade(panels: Sequence[Axes], history: TrainingHistory) -> list:
    """Shades the stages in all panels; returns one patch per stage for the legend."""
    from matplotlib.patches import Patch

    end = history.end * 1.04 or 1.0
    starts = {0: 0.0}
    for item in history.constructions:
        starts.setdefault(item.stage, item.x)
    order = sorted(starts.items(), key=lambda pair: pair[1])
    handles = []
    for (stage, start), (_, stop) in zip(order, [*order[1:], (None, end)], strict=True):
        name, color = _STAGES[min(stage, len(_STAGES) - 1)]
        for axes in panels:
            axes.axvspan(start, stop, color=color, linewidth=0, zorder=0)
            axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        handles.append(Patch(facecolor=color, edgecolor=GREY, linewidth=0.6, label=f"stage: {name}"))
    for axes in panels:
        axes.set_xlim(0, end)
    return handles


def _bars(axes: Axes, points: list[tuple[float, float]], history: TrainingHistory, form: Callable) -> None:
    """Bars from zero, with their numbers where there is room; falling ones differ in colour."""
    gaps = [b - a for (a, _), (b, _) in zip(points, points[1:], strict=False) if b > a]
    gap = min([*gaps, history.end / 12])
    width = 0.6 * gap
    places, heights = [x for x, _ in points], [y for _, y in points]
    colors = [GREEN if height >= 0 else VERMILION for height in heights]
    axes.bar(places, heights, width=width, color=colors, edgecolor=DARK, linewidth=0.6, zorder=3)
    axes.axhline(0, color=DARK, linewidth=0.8, zorder=2)
    # Numbers stand beyond the bars, on the side of zero as well.
    axes.use_sticky_edges = False
    axes.margins(y=0.3)
    room = 0.9 * WIDTH * gap / history.end
    if room < _STANDING:
        return
    rotation = 0 if room >= _LYING else 90
    for x, y in points:
        offset, side = ((0, 3), "bottom") if y >= 0 else ((0, -3), "top")
        axes.annotate(
            form(y),
            (x, y),
            offset,
            textcoords="offset points",
            ha="center",
            va=side,
            rotation=rotation,
            fontsize=SMALL,
            zorder=4,
        )


def _line(axes: Axes, curve: list[tuple[float, float]], color: str, name: str) -> Any:
    marker = "o" if len(curve) <= 40 else None
    (line,) = axes.plot(*zip(*curve, strict=True), color=color, marker=marker, markersize=4, label=name, zorder=3)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6, zorder=0)
    return line


def _from_zero(axes: Axes, curves: Mapping[str, list[tuple[float, float]]]) -> None:
    """Shows sums of recalls from zero on, so that a difference looks as large as it is."""
    axes.set_ylim(0, 1.1 * max(value for curve in curves.values() for _, value in curve) or 1)


def _cycle(count: int) -> list[str]:
    return [LINES[index % len(LINES)] for index in range(count)]


def _validation(name: str) -> str:
    return f"validation: {name}" if name else "validation"


__all__ = ["Construction", "TrainingHistory", "plot_stage_timeline", "plot_training_curves", "read_history"]
