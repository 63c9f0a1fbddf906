"""The risk-coverage curve: recall of the queries that are kept when uncertain ones are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..evaluation.uncertainty_reranking import RiskCoverage
from .canvas import BLUE, GREEN, GREY, LIGHT, NothingToDrawError, finish, finite, legend_below, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_risk_coverage(curves: Mapping[str, RiskCoverage]) -> Figure:
    r"""
    Recall over the share of queries kept, the most certain first, beside what an order by lot and the best order
    reach; the area under the curve of the risk (100 minus recall) in the titles.

    Args:
        curves (`dict[str, RiskCoverage]`): By name of a panel, what [`risk_coverage`] gives of the same pairs.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        NothingToDrawError: without a curve.
    """
    if not curves:
        raise NothingToDrawError("there is no curve of risk and coverage")
    pairs = len(next(iter(curves.values())).coverage)
    figure = new_figure(
        4.6, f"Among {pairs} pairs, are the queries that the model is uncertain of the ones that fail?"
    )
    grid = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (name, curve) in zip(grid, curves.items(), strict=True):
        coverage = finite("coverage", curve.coverage.numpy())
        recall, best = finite("recall", curve.recall.numpy()), finite("best_recall", curve.best_recall.numpy())
        handles = [
            axes.plot(coverage, recall, color=BLUE, linewidth=1.8, label="most certain kept first", zorder=4)[0],
            axes.plot(
                coverage, best, color=GREEN, linewidth=1.4, linestyle="-.", label="failures left out first", zorder=3
            )[0],
            axes.axhline(recall[-1], color=GREY, linestyle="--", linewidth=1.2, label="order by lot", zorder=2),
        ]
        axes.grid(axis="y", color=LIGHT, linewidth=0.6, zorder=0)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 104)
        areas = f"AURC {curve.aurc:.1f} (by lot {curve.chance_aurc:.1f}, best {curve.best_aurc:.1f})"
        finish(axes, f"{name}: {areas}", "queries kept (%)", "recall at 1 (%)" if axes is grid[0] else None)
    legend_below(figure, handles)
    return figure


__all__ = ["plot_risk_coverage"]
