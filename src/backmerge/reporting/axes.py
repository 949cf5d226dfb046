"""What all our plots share: axes in percent, notes, rings, and the colours of series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from backmerge.reporting.drawing import MERGED, SERIES
from backmerge.results import RestoreResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.9, 3.1)  # inches: a phone's width at the size of its text
LINE = 0.19  # inches, of a legend
LONG_NAME = 14  # characters, from which names stand below each other


def percent_axis(axes: Axes, which: Literal["x", "y"], highest: float) -> None:
    """Percent from 0 to a little above the highest value; never above 100 %, but for the marks' own size."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    top = min(1.0, max(highest * 1.15, 0.05))
    axis, set_limits = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(visible=True)
    set_limits(-0.04 * top, top * 1.06)


def ring(axes: Axes, x: float, y: float, colour: str) -> None:
    """A ring around a mark."""
    axes.plot(x, y, "o", color=colour, markerfacecolor="none", markersize=13, zorder=3)


def note(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    """A few small words."""
    axes.text(x, y, text, color=colour, fontsize=8.5, **{"va": "bottom", "ha": "left", **options})


def merged_series(results: RestoreResults) -> list[str]:
    """The series of the recipes, in the order of the experiment."""
    return list(dict.fromkeys(row.series for row in results.points if row.role == "merged"))


def series_style(series: Sequence[str], name: str) -> str:
    """Of a series' line: whole, and dashed or dotted where the colours have gone round."""
    return ("-", "--", ":")[min(series.index(name) // len(SERIES), 2)]


def legend_below(figure: Figure, axes: Axes) -> None:
    """The names of what was drawn, under the plot, where they cover nothing however long they are."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > LONG_NAME else max(1, min(len(labels), 3))
    figure.set_figheight(figure.get_figheight() + LINE * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5)


def series_colour(series: Sequence[str], name: str) -> str:
    """A series' own colour; of a single one, that of merged models."""
    return SERIES[series.index(name) % len(SERIES)] if len(series) > 1 else MERGED
