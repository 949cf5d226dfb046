"""What was measured as figures; functions of the results, drawn without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from backmerge.reporting.drawing import BAD, BASE, FAINT, MERGED, SERIES, SOFT, TUNED, styled
from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.9, 3.1)  # inches: a phone's width at the size of its text
NEAR = 0.08  # share of both axes below which two labels of the Pareto plot become one
LABEL_GAP = 0.09  # in λ, between two labels of an axis that do not touch


class Place(NamedTuple):
    """A point of the Pareto plot."""

    point: str
    label: str
    colour: str
    asr: float
    utility: float


def curves(results: Results) -> Figure:
    """Every benchmark's primary metric against λ, a panel each."""
    from matplotlib.figure import Figure

    benchmarks = results["benchmarks"]
    with styled():
        figure = Figure((PANEL[0] * len(benchmarks), PANEL[1]), layout="constrained")
        for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
            _draw_curve(axes, results, benchmark)
    return figure


def curve(results: Results, benchmark: Mapping[str, Any]) -> Figure:
    """One benchmark's primary metric against λ."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(PANEL, layout="constrained")
        _draw_curve(figure.subplots(), results, benchmark)
    return figure


def pareto(results: Results) -> Figure:
    """Utility against attack success rate on the selection prompts, every point labelled by its λ."""
    from matplotlib.figure import Figure

    places = pareto_places(results)
    with styled():
        figure = Figure((PANEL[0] * 1.15, PANEL[1] * 1.15), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Utility against attack success rate", pad=16)
        for series in dict.fromkeys(row["series"] for row in results["points"] if row["role"] == "merged"):
            names = ["base", *(p["point"] for p in results["points"] if p["series"] == series), "tuned"]
            line = [place for name in names for place in places if place.point == name]
            axes.plot([p.asr for p in line], [p.utility for p in line], color=FAINT, linewidth=1, zorder=1)
        for place in places:
            is_chosen = place.point == results["choice"]["point"]
            axes.plot(place.asr, place.utility, "o", color=place.colour, markersize=7 if is_chosen else 5, zorder=3)
            if is_chosen:
                _ring(axes, place.asr, place.utility, place.colour)
        limits = [place.asr + results["choice"]["margin"] for place in places if place.point == "base"]
        _percent_axis(axes, "x", max([*limits, *(place.asr for place in places)], default=0.0))
        _percent_axis(axes, "y", 1.0)
        for limit in limits:
            axes.axvline(limit, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            _note(axes, limit, 1.0, "base + margin", BAD, ha="center", transform=axes.get_xaxis_transform())
        _label(axes, places)
        _note(axes, 1.0, 0.02, "↖ better", SOFT, ha="right", transform=axes.transAxes)
        axes.set_xlabel("attack success rate")
        axes.set_ylabel("utility")
    return figure


def training_loss(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training loss against the step, a line for each tuned model."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure((PANEL[0], PANEL[1]), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Training loss")
        for index, (name, rows) in enumerate(losses.items()):
            colour = (TUNED, *SERIES)[index % (len(SERIES) + 1)]
            axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=colour, linewidth=1.2, label=name)
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("step")
        axes.grid(visible=True, axis="y")
        axes.legend(fontsize=8.5)
    return figure


def pareto_places(results: Results) -> list[Place]:
    """Where every point stands on the selection prompts, benchmarks of a kind taken together.

    Utility is the mean over benchmarks; ASR is pooled over prompts, as in the choice of λ.
    """
    places: list[Place] = []
    series = list(dict.fromkeys(row["series"] for row in results["points"] if row["role"] == "merged"))
    for row in results["points"]:
        utility = [e["mean"] for e in _entries(results, "utility", row["point"])]
        safety = _entries(results, "safety", row["point"])
        num_prompts = sum(entry["n"] for entry in safety)
        if not utility or None in utility or num_prompts == 0:
            continue
        asr = sum(entry["mean"] * entry["n"] for entry in safety if entry["n"]) / num_prompts
        if row["role"] == "merged":
            colour, label = _series_colour(series, row["series"]), f"{row['lam']:g}"
            label = label if len(series) == 1 else f"{row['series']} {label}"
        else:
            colour, label = {"base": BASE, "tuned": TUNED}[row["role"]], f"{row['lam']:g} ({row['role']})"
        places.append(Place(row["point"], label, colour, asr, fmean(utility)))
    return places


def _entries(results: Results, kind: str, point: str) -> list[Mapping[str, Any]]:
    primary = {(b["name"], b["metric"]) for b in results["benchmarks"] if b["kind"] == kind}
    return [
        entry
        for entry in results["summary"]
        if entry["point"] == point
        and entry["split"] == "selection"
        and (entry["benchmark"], entry["metric"]) in primary
    ]


def _draw_curve(axes: Axes, results: Results, benchmark: Mapping[str, Any]) -> None:
    at = _measured(results, benchmark, "selection")
    series = list(dict.fromkeys(row["series"] for row in results["points"] if row["role"] == "merged"))
    for name in series:
        merged = [e for e in at.values() if e["series"] == name]
        line = [entry for entry in at.values() if entry["series"] in {"base", name, "tuned"}]
        colour = _series_colour(series, name)
        lams = [entry["lam"] for entry in line]
        axes.fill_between(
            lams, [e["lowest"] for e in line], [e["highest"] for e in line], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(lams, [e["mean"] for e in line], color=colour, linewidth=1.6, label=name, zorder=2)
        _marks(axes, merged, colour)
    for role, colour in (("base", BASE), ("tuned", TUNED)):
        _marks(axes, [at[role]] if role in at else [], colour)
    highest = max((entry["high"] for entry in at.values()), default=0.0)
    has_limit = benchmark["kind"] == "safety" and "base" in at
    limit = at["base"]["mean"] + results["choice"]["margin"] if has_limit else 0.0
    _percent_axis(axes, "y", 1.0 if benchmark["kind"] == "utility" else max(highest, limit))
    again = _measured(results, benchmark, "confirmation").values()
    axes.plot(
        [e["lam"] for e in again],
        [e["mean"] for e in again],
        "D",
        color=FAINT,
        markerfacecolor="none",
        markersize=8,
        zorder=4,
        clip_on=False,
    )
    if has_limit:
        axes.axhline(limit, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _note(axes, 0.0, limit, "base + margin", BAD)
    if results["choice"]["point"] not in {None, "tuned"}:
        lam = results["choice"]["lam"]
        axes.axvline(lam, color=FAINT, linewidth=1, linestyle=":", zorder=0)
        _note(axes, lam, 1.0, "chosen", SOFT, ha="center", transform=axes.get_xaxis_transform())
    _label_curve(axes, benchmark, [entry["lam"] for entry in at.values()])
    if len(series) > 1:
        axes.legend(fontsize=8.5)


def _label_curve(axes: Axes, benchmark: Mapping[str, Any], lams: Sequence[float]) -> None:
    metric = f" ({benchmark['metric'].replace('_', ' ')})" if benchmark["kind"] == "utility" else ""
    axes.set_title(f"{KINDS[benchmark['kind']][0]}: {benchmark['name']}{metric}", pad=16)
    labelled = _spaced(sorted(set(lams)))
    axes.set_xticks(labelled, labels=[_lam_text(lam) for lam in labelled])
    axes.set_xticks(sorted(set(lams) - set(labelled)), minor=True)
    axes.set_xlim(-0.06, 1.06)
    axes.set_xlabel("λ, share of the tuned side")


def _spaced(lams: Sequence[float]) -> list[float]:
    """Of sorted λs those whose labels do not touch: base and tuned always, others from the left."""
    kept: list[float] = [lam for lam in lams if lam in {0.0, 1.0}]
    for lam in lams:
        if all(abs(lam - other) >= LABEL_GAP for other in kept):
            kept.append(lam)
    return sorted(kept)


def _lam_text(lam: float) -> str:
    return {0.0: "0\nbase", 1.0: "1\ntuned"}.get(lam, f"{lam:g}")


def _measured(results: Results, benchmark: Mapping[str, Any], split: str) -> dict[str, Mapping[str, Any]]:
    """A benchmark's primary metric at each point where it was measured, in the order of λ."""
    found = {
        entry["point"]: entry
        for entry in results["summary"]
        if entry["benchmark"] == benchmark["name"]
        and entry["metric"] == benchmark["metric"]
        and entry["split"] == split
        and entry["mean"] is not None
    }
    return dict(sorted(found.items(), key=lambda item: item[1]["lam"]))


def _marks(axes: Axes, entries: Sequence[Mapping[str, Any]], colour: str) -> None:
    means = [entry["mean"] for entry in entries]
    # rounding may put an interval's end past its own mean by an ulp
    below = [max(0.0, entry["mean"] - entry["low"]) for entry in entries]
    above = [max(0.0, entry["high"] - entry["mean"]) for entry in entries]
    axes.errorbar(
        [entry["lam"] for entry in entries],
        means,
        yerr=[below, above],
        fmt="o",
        color=colour,
        markersize=4.5,
        linewidth=1,
        capsize=2.5,
        zorder=3,
    )


def _percent_axis(axes: Axes, which: Literal["x", "y"], highest: float) -> None:
    """Percent from 0 to a little above the highest value; never above 100 %, but for the marks' own size."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    top = min(1.0, max(highest * 1.15, 0.05))
    axis, set_limits = (axes.xaxis, axes.set_xlim) if which == "x" else (axes.yaxis, axes.set_ylim)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(visible=True)
    set_limits(-0.04 * top, top * 1.06)


def _ring(axes: Axes, x: float, y: float, colour: str) -> None:
    axes.plot(x, y, "o", color=colour, markerfacecolor="none", markersize=13, zorder=3)


def _note(axes: Axes, x: float, y: float, text: str, colour: str, **options: Any) -> None:
    axes.text(x, y, text, color=colour, fontsize=8.5, **{"va": "bottom", "ha": "left", **options})


def _label(axes: Axes, places: Sequence[Place]) -> None:
    """λ beside each point; points that stand on each other share a label."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    groups: list[list[Place]] = []
    for place in places:
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
        axes.annotate(
            ", ".join(place.label for place in group),
            (group[0].asr, group[0].utility),
            # beside the line; next to the right edge above it, where the label to its left does not reach
            xytext=(-7 if is_right else 9, 9 if is_low or is_right else -11),
            textcoords="offset points",
            ha="right" if is_right else "left",
            va="center",
            fontsize=9,
        )


def _series_colour(series: Sequence[str], name: str) -> str:
    return SERIES[series.index(name) % len(SERIES)] if len(series) > 1 else MERGED
