"""The curves of several runs in one figure: what λ does in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from backmerge.reporting.axes import PANEL
from backmerge.reporting.drawing import styled
from backmerge.reporting.families import Family, benchmarks_of
from backmerge.reporting.finished_runs import Run
from backmerge.reporting.lines import (
    Line,
    Measure,
    draw_panel,
    line_of,
    panel_title,
    rate_of,
    score_of,
    series_with_lam,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGEND = 0.19  # inches of height that a line of a legend takes
MOST_NAMED = 40  # lines of a row, beyond which a legend would be longer than a page


class Panel(NamedTuple):
    """A panel: its title, and its lines; `is_utility` where more is better."""

    title: str
    is_utility: bool
    lines: Sequence[Line]


def compared_curves(runs: Sequence[Run]) -> Figure:
    """A row for each base and task; in it the task's score and every safety and over-refusal benchmark against λ."""
    from matplotlib.figure import Figure

    rows = [list(_panels(group, runs)) for group in _groups(runs)]
    heights = [PANEL[1] + LEGEND * min(len(row[0].lines), MOST_NAMED) for row in rows]
    with styled():
        figure = Figure((PANEL[0] * len(rows[0]), sum(heights)), layout="constrained")
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
        for places, panels in zip(grid, rows, strict=True):
            for axes, panel in zip(places, panels, strict=True):
                axes.set_title(panel_title(panel.title))
                draw_panel(axes, panel.lines, is_utility=panel.is_utility)
            handles, labels = places[0].get_legend_handles_labels()
            if handles:
                where = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.2)}
                places[0].legend(handles[:MOST_NAMED], labels[:MOST_NAMED], fontsize=8, **where)
    return figure


def _groups(runs: Sequence[Run]) -> list[list[Family]]:
    """Runs of one base and task, each by itself."""
    found: dict[tuple[str, str], list[Family]] = {}
    for run in runs:
        found.setdefault((run.model, run.task), []).append(Family((run,)))
    return list(found.values())


def _panels(group: Sequence[Family], runs: Sequence[Run]) -> Iterator[Panel]:
    first = group[0].runs[0]
    yield Panel(f"Score: {first.task} ({first.model})", True, _lines(group, score_of))
    for kind, words in (("safety", "ASR"), ("over_refusal", "Over-refusal")):
        # those of all runs, so that the rows stand under each other
        for name, metric in dict.fromkeys(pair for run in runs for pair in benchmarks_of(Family((run,)), kind)):
            yield Panel(f"{words}: {name}", False, _lines(group, rate_of(name, metric)))


def _lines(group: Sequence[Family], measure_of: Callable[[Family], Measure]) -> list[Line]:
    return [
        line_of(family, series, f"{family.name}: {series}", measure_of(family))
        for family in group
        for series in series_with_lam(family)
    ]
