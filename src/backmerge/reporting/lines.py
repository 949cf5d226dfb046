"""Draw measurements over λ as lines: for figures of several runs and of several methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

from backmerge.records import Estimate
from backmerge.reporting.drawing import BASE, SERIES, TUNED, percent_axis
from backmerge.reporting.families import Family, Pick, at, cell_at, score_at

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (*SERIES, BASE, TUNED)
STYLES = ("-", "--", ":", "-.")
TITLE_WIDTH = 44  # letters of a panel's title
MOST_BANDS = 4  # more would hide each other

Measure = Callable[[Pick], Estimate | None]


class Mark(NamedTuple):
    """A scored point of a line: λ, and the value measured there."""

    lam: float
    point: str
    found: Estimate

    @property
    def value(self) -> float:
        """Return the measured value."""
        assert self.found.value is not None
        return self.found.value


class Line(NamedTuple):
    """A series from the base to its end.

    Attributes:
        label: Its name in the legend.
        marks: Sorted by λ.
    """

    label: str
    marks: Sequence[Mark]


def line_of(family: Family, series: str, label: str, measure: Measure) -> Line:
    """Return a series of recipes: the base at λ=0, its λs, and at λ=1 the tuned model or one merge of all.

    Points that some run lacks, since searches skip some, are omitted.
    """
    points = [row for row in family.runs[0].results.points if row.series == series and row.lam is not None]
    has_end = any(row.lam == 1 for row in points)
    places = [("base", 0.0), *((row.point, row.lam) for row in points), *([] if has_end else [("tuned", 1.0)])]
    found = [(lam, point, measure(at(point))) for point, lam in places if lam is not None]
    marks = [Mark(lam, point, cell) for lam, point, cell in found if cell is not None and cell.value is not None]
    return Line(label, sorted(marks, key=lambda mark: mark.lam))


def series_with_lam(family: Family) -> list[str]:
    """Return the series with several λs, in the order of the experiment."""
    points = family.runs[0].results.points
    return list(dict.fromkeys(row.series for row in points if row.role == "merged" and row.lam is not None))


def score_of(family: Family) -> Measure:
    """Return the task's score on the prompts on which every λ was measured."""
    return lambda pick: score_at(family, pick, "selection")


def rate_of(benchmark: str, metric: str) -> Callable[[Family], Measure]:
    """Return a benchmark's metric on those prompts."""
    return lambda family: lambda pick: cell_at(family, pick, benchmark, metric, "selection")


def draw_panel(axes: Axes, lines: Sequence[Line], *, is_utility: bool) -> None:
    """Draw lines over λ, in percent; writes a note if nothing was measured."""
    axes.set_xlim(-0.04, 1.04)
    axes.set_xlabel("λ, share of the tuned side")
    _draw_lines(axes, lines)
    percent_axis(axes, "y", 1.0 if is_utility else _highest(lines))
    if not any(line.marks for line in lines):
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def panel_title(text: str) -> str:
    """Wrap a title to the width of a panel."""
    return fill(text, TITLE_WIDTH)


def _draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw each line with its marks, and with its intervals as a band if there are few lines."""
    for index, line in enumerate(lines):
        if not line.marks:
            continue
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        lams = [mark.lam for mark in line.marks]
        if len(lines) <= MOST_BANDS:
            low, high = [mark.found.low for mark in line.marks], [mark.found.high for mark in line.marks]
            axes.fill_between(lams, low, high, color=colour, alpha=0.13, linewidth=0)
        means = [mark.value for mark in line.marks]
        axes.plot(lams, means, style, marker="o", color=colour, markersize=3.5, linewidth=1.4, label=line.label)


def _highest(lines: Sequence[Line]) -> float:
    """Return the highest end of a drawn interval, or the highest mean if no intervals are drawn."""
    has_bands = len(lines) <= MOST_BANDS
    return max((mark.found.high if has_bands else mark.value for line in lines for mark in line.marks), default=0.0)
