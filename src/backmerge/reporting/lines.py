"""What was measured along λ, as lines: for figures of several runs and of several methods."""

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
TITLE_WIDTH = 44  # letters over a panel
MOST_BANDS = 4  # more of them hide each other

Measure = Callable[[Pick], Estimate | None]


class Mark(NamedTuple):
    """A point of a line: λ, and what was measured there, which is scored."""

    lam: float
    point: str
    found: Estimate

    @property
    def value(self) -> float:
        """What was measured."""
        assert self.found.value is not None
        return self.found.value


class Line(NamedTuple):
    """A series from the base to its end.

    Attributes:
        label: In the legend.
        marks: By rising λ.
    """

    label: str
    marks: Sequence[Mark]


def line_of(family: Family, series: str, label: str, measure: Measure) -> Line:
    """A series of recipes from the base at λ=0 over its λs to the tuned model, or one merge of all, at λ=1.

    Points that any run lacks, as searches leave some out, are left out.
    """
    points = [row for row in family.runs[0].results.points if row.series == series and row.lam is not None]
    has_end = any(row.lam == 1 for row in points)
    places = [("base", 0.0), *((row.point, row.lam) for row in points), *([] if has_end else [("tuned", 1.0)])]
    found = [(lam, point, measure(at(point))) for point, lam in places if lam is not None]
    marks = [Mark(lam, point, cell) for lam, point, cell in found if cell is not None and cell.value is not None]
    return Line(label, sorted(marks, key=lambda mark: mark.lam))


def series_with_lam(family: Family) -> list[str]:
    """The series that λ varies in, in the order of the experiment."""
    points = family.runs[0].results.points
    return list(dict.fromkeys(row.series for row in points if row.role == "merged" and row.lam is not None))


def score_of(family: Family) -> Measure:
    """The task's score on the prompts that every λ was measured on."""
    return lambda pick: score_at(family, pick, "selection")


def rate_of(benchmark: str, metric: str) -> Callable[[Family], Measure]:
    """A benchmark's metric on those prompts."""
    return lambda family: lambda pick: cell_at(family, pick, benchmark, metric, "selection")


def draw_panel(axes: Axes, lines: Sequence[Line], *, is_utility: bool) -> None:
    """Lines against λ, in percent; says so where nothing was measured."""
    axes.set_xlim(-0.04, 1.04)
    axes.set_xlabel("λ, share of the tuned side")
    _draw_lines(axes, lines)
    percent_axis(axes, "y", 1.0 if is_utility else _highest(lines))
    if not any(line.marks for line in lines):
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)


def panel_title(text: str) -> str:
    """A title on as many lines as a panel's width asks for."""
    return fill(text, TITLE_WIDTH)


def _draw_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Each line with its marks, and with its intervals as a band where there are few."""
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
    """The highest end of an interval that is drawn, or the highest mean where none are."""
    has_bands = len(lines) <= MOST_BANDS
    return max((mark.found.high if has_bands else mark.value for line in lines for mark in line.marks), default=0.0)
