"""Draw utility against attack success rate: every recipe, and the front of the compared methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from backmerge.records import Estimate
from backmerge.reporting.drawing import (
    BAD,
    BASE,
    FAINT,
    INK,
    LONG_NAME,
    PANEL,
    SOFT,
    TUNED,
    legend_below,
    merged_series,
    note,
    percent_axis,
    ring,
    series_colour,
    series_style,
    styled,
)
from backmerge.reporting.findings import percent, place_text
from backmerge.results import PointRow, RestoreResults, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEAR = 0.08  # distance, as a share of both axes, below which two labels become one
TOUCHING = 0.02  # distance below which two marks cover each other, and share a description
REACH = 16  # points; diameter of the touch area around a mark
MOST_LABELS = 8


class Place(NamedTuple):
    """A point of the plot.

    Attributes:
        point: Its name.
        label: Text next to its mark; empty if there are many marks.
        colour: Colour of its series.
        asr, utility: In [0, 1].
        details: A line for each measurement there.
    """

    point: str
    label: str
    colour: str
    asr: float
    utility: float
    details: tuple[str, ...] = ()


class Front(NamedTuple):
    """A candidate of the comparison, with its intervals."""

    name: str
    colour: str
    asr: Estimate
    utility: Estimate

    @property
    def place(self) -> tuple[float, float]:
        """Return ASR and utility, which are scored."""
        assert self.asr.value is not None
        assert self.utility.value is not None
        return self.asr.value, self.utility.value


def pareto(results: RestoreResults) -> Figure:
    """Draw utility against attack success rate on the selection prompts, every point labelled with its λ.

    Around each mark is an invisible touch area, the group `spot-N` of the SVG, where N counts `pareto_places`.
    """
    from matplotlib.figure import Figure

    places = pareto_places(results)
    with styled():
        figure = Figure((PANEL[0] * 1.15, PANEL[1] * 1.15), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Utility against attack success rate", pad=16)
        series = merged_series(results)
        for name, points in _lines(results):
            line = [place for point in points for place in places if place.point == point]
            colour = FAINT if len(series) == 1 else series_colour(series, name)
            axes.plot(
                [p.asr for p in line],
                [p.utility for p in line],
                color=colour,
                linewidth=1,
                linestyle=series_style(series, name),
                zorder=1,
                label=name,
            )
        for number, place in enumerate(places):
            is_chosen = place.point == results.choice.point
            size = 7 if is_chosen else 5 if place.label else 3.5
            axes.plot(place.asr, place.utility, "o", color=place.colour, markersize=size, zorder=3)
            (spot,) = axes.plot(
                place.asr, place.utility, "o", color=place.colour, markersize=REACH, alpha=0.0, zorder=5, clip_on=False
            )
            spot.set_gid(f"spot-{number}")
            if is_chosen:
                ring(axes, place.asr, place.utility, place.colour)
        limits = [place.asr + results.choice.margin for place in places if place.point == "base"]
        percent_axis(axes, "x", max([*limits, *(place.asr for place in places)], default=0.0))
        percent_axis(axes, "y", 1.0)
        for limit in limits:
            axes.axvline(limit, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            note(axes, limit, 1.0, "base + margin", BAD, ha="center", transform=axes.get_xaxis_transform())
        _label(axes, places)
        note(axes, 1.0, 0.02, "↖ better", SOFT, ha="right", transform=axes.transAxes)
        axes.set_xlabel("attack success rate")
        axes.set_ylabel("utility")
        if len(series) > 1:
            legend_below(figure, axes)
    return figure


def _lines(results: RestoreResults) -> Iterator[tuple[str, list[str]]]:
    """Yield the points of each line: a series from the base over its λs to its end, and the tuning's own path."""
    for series in merged_series(results):
        members = [row for row in results.points if row.series == series]
        if all(row.lam is None for row in members) and not all(row.method == "path" for row in members):
            continue
        has_end = any(row.lam == 1 for row in members)
        inside = [row.point for row in members if row.lam is not None or row.method == "path"]
        yield series, ["base", *inside, *(() if has_end else ("tuned",))]


def spots(places: Sequence[Place]) -> dict[str, str]:
    """Return the description of each spot of the plot, by the group's name: everything under it."""
    across = max((place.asr for place in places), default=0.0) or 1.0

    def together(place: Place) -> list[Place]:
        return [
            other
            for other in places
            if abs(other.asr - place.asr) < TOUCHING * across and abs(other.utility - place.utility) < TOUCHING
        ]

    return {
        f"spot-{number}": "\n".join(line for other in together(place) for line in other.details)
        for number, place in enumerate(places)
    }


def pareto_places(results: RestoreResults) -> list[Place]:
    """Return the position of every point on the selection prompts, with benchmarks of a kind combined.

    Utility is the mean over benchmarks; ASR is pooled over prompts, as in the choice of λ.
    """
    places: list[Place] = []
    series = merged_series(results)
    chosen = results.choice.point
    for row in results.points:
        utilities, safety = (_entries(results, kind, row.point) for kind in ("utility", "safety"))
        utility = [entry.mean for entry in utilities if entry.mean is not None]
        num_prompts = sum(entry.n for entry in safety)
        if not utility or len(utility) < len(utilities) or num_prompts == 0:
            continue
        asr = sum(entry.mean * entry.n for entry in safety if entry.n and entry.mean is not None) / num_prompts
        if row.role == "merged":
            colour, label = series_colour(series, row.series), ""
            if row.point == chosen or _is_labelled(results, row, len(series)):
                label = place_text(row.point, row.series, row.lam) or row.series
                if len(series) > 1 and len(row.series) < LONG_NAME:
                    label = f"{row.series} {place_text(row.point, row.series, row.lam)}".strip()
        else:
            colour, label = {"base": BASE, "tuned": TUNED}[row.role], f"{row.lam:g} ({row.role})"
        others = _entries(results, "over_refusal", row.point)
        details = (
            f"{row.point}{' (chosen)' if row.point == chosen else ''}",
            *(_detail(entry) for entry in (*utilities, *safety, *others)),
        )
        places.append(Place(row.point, label, colour, asr, fmean(utility), details))
    return places


def _is_labelled(results: RestoreResults, row: PointRow, num_series: int) -> bool:
    """Return whether to label a point: few recipes all; many in one series every second λ; many in several none."""
    recipes = [point for point in results.points if point.role == "merged"]
    if len(recipes) <= MOST_LABELS:
        return True
    return num_series == 1 and row.lam is not None and recipes.index(row) % 2 == 0


def _detail(entry: SummaryRow) -> str:
    interval = f" [{entry.low * 100:.1f}, {entry.high * 100:.1f}]"
    return f"{entry.benchmark}, {entry.metric.replace('_', ' ')}: {percent(entry.mean)}{interval}"


def _entries(results: RestoreResults, kind: str, point: str, split: str = "selection") -> list[SummaryRow]:
    primary = {(b.name, b.metric) for b in results.benchmarks if b.kind == kind}
    return [
        entry
        for entry in results.summary
        if entry.point == point and entry.split == split and (entry.benchmark, entry.metric) in primary
    ]


def _label(axes: Axes, places: Sequence[Place]) -> None:
    """Write λ next to each point, in its series' colour; overlapping points share a label."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    groups: list[list[Place]] = []
    for place in (place for place in places if place.label):
        for group in groups:
            across, up = (
                (group[0].asr - place.asr) / (right - left),
                (group[0].utility - place.utility) / (top - bottom),
            )
            if max(abs(across), abs(up)) < NEAR:
                group.append(place)
                break
        else:
            groups.append([place])
    for group in groups:
        is_right = (group[0].asr - left) / (right - left) > 0.7
        is_low = (group[0].utility - bottom) / (top - bottom) < 0.1
        label = axes.annotate(
            ", ".join(place.label for place in group),
            (group[0].asr, group[0].utility),
            # right of the line; near the right edge above it, where the label to its left does not reach
            xytext=(-7 if is_right else 9, 9 if is_low or is_right else -11),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            fontsize=9,
            color=group[0].colour if len({place.colour for place in group}) == 1 else INK,
        )
        label.set_in_layout(False)  # a long label may cross the edge, instead of shrinking the plot


def front(results: RestoreResults) -> Figure:
    """Draw base, tuned model and the best of each series on the confirmation prompts, with their Pareto front."""
    from matplotlib.figure import Figure

    contenders = contenders_of(results)
    with styled():
        figure = Figure((PANEL[0] * 1.15, PANEL[1] * 1.15), layout="constrained")
        axes = figure.subplots()
        axes.set_title("The best of each method")
        best = undominated(contenders)
        axes.plot(
            [each.place[0] for each in best],
            [each.place[1] for each in best],
            color=FAINT,
            linewidth=1.2,
            drawstyle="steps-post",
            zorder=1,
        )
        for each in contenders:
            x, y = each.place
            axes.errorbar(
                x,
                y,
                xerr=[[max(0.0, x - each.asr.low)], [max(0.0, each.asr.high - x)]],
                yerr=[[max(0.0, y - each.utility.low)], [max(0.0, each.utility.high - y)]],
                fmt="o",
                color=each.colour,
                markersize=5.5,
                linewidth=1,
                zorder=3,
                label=each.name,
            )
        percent_axis(axes, "x", max((each.asr.high for each in contenders), default=0.0))
        percent_axis(axes, "y", 1.0)
        axes.set_xlabel("attack success rate")
        axes.set_ylabel("utility")
        legend_below(figure, axes)
    return figure


def contenders_of(results: RestoreResults) -> list[Front]:
    """Return the compared candidates; base and tuned model too, if they have one benchmark of each kind."""
    series = merged_series(results)
    assert results.comparison is not None, "the caller asks only where methods were compared"
    rows = {
        row.point: (row.series, row.asr, row.utility)
        for row in results.comparison.rows
        if row.point and row.asr and row.utility
    }
    found = [
        # the tuned model itself, if it is the best of a series, has its own colour
        Front(name, TUNED if name == "tuned" else series_colour(series, of_series), asr, utility)
        for name, (of_series, asr, utility) in rows.items()
    ]
    for role, colour in (("base", BASE), ("tuned", TUNED)):
        levels = [_entries(results, kind, role, "confirmation") for kind in ("safety", "utility")]
        if role not in rows and all(len(entries) == 1 and entries[0].mean is not None for entries in levels):
            found.append(Front(role, colour, levels[0][0].estimate, levels[1][0].estimate))
    return found


def undominated(contenders: Sequence[Front]) -> list[Front]:
    """Return those that no other beats in ASR or utility without being worse in the other, by rising ASR."""

    def is_beaten(each: Front) -> bool:
        ours = each.place[0], -each.place[1]
        others = [(other.place[0], -other.place[1]) for other in contenders]
        return any(a <= ours[0] and u <= ours[1] and (a, u) != ours for a, u in others)

    return sorted((each for each in contenders if not is_beaten(each)), key=lambda each: each.place[0])
