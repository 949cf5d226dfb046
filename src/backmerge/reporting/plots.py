"""Draw measurements as figures; functions of the results, without pyplot and its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from backmerge.reporting.drawing import (
    BAD,
    BASE,
    FAINT,
    PANEL,
    SERIES,
    SOFT,
    TUNED,
    legend_below,
    merged_series,
    note,
    percent_axis,
    series_colour,
    series_style,
    styled,
)
from backmerge.reporting.explained import KINDS
from backmerge.results import BenchmarkRow, RestoreResults, Results, SummaryRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL_GAP = 0.09  # in λ; labels of an axis that are farther apart do not touch
MOST_STEPS = 400  # most steps of a training that are drawn


def curves(results: RestoreResults) -> Figure:
    """Draw every benchmark's primary metric over λ, one panel each."""
    from matplotlib.figure import Figure

    benchmarks = results.benchmarks
    with styled():
        figure = Figure((PANEL[0] * len(benchmarks), PANEL[1]), layout="constrained")
        for axes, benchmark in zip(figure.subplots(1, len(benchmarks), squeeze=False)[0], benchmarks, strict=True):
            _draw_curve(axes, results, benchmark)
        if len(merged_series(results)) > 1:
            legend_below(figure, axes)
    return figure


def scores(results: Results) -> Figure:
    """Draw each metric of each benchmark with its 95 % interval, one row each, for every model."""
    from matplotlib.figure import Figure

    found = [score for score in results.scores if score.value is not None]
    rows = list(dict.fromkeys((score.benchmark, score.metric) for score in found))
    models = list(dict.fromkeys(score.model for score in found))
    with styled():
        figure = Figure((2 * PANEL[0], 0.8 + 0.45 * max(1, len(rows))), layout="constrained")
        axes = figure.subplots()
        for index, model in enumerate(models):
            own = [score for score in found if score.model == model]
            values = [score.estimate.value or 0.0 for score in own]
            # models of one row are drawn below each other
            places = [rows.index((s.benchmark, s.metric)) + 0.5 * (index + 1) / (len(models) + 1) for s in own]
            below = [max(0.0, value - score.estimate.low) for value, score in zip(values, own, strict=True)]
            above = [max(0.0, score.estimate.high - value) for value, score in zip(values, own, strict=True)]
            colour = (BASE, TUNED, *SERIES)[index % (len(SERIES) + 2)]
            axes.errorbar(values, places, xerr=[below, above], fmt="o", color=colour, capsize=2.5, label=model)
        axes.set_yticks([row + 0.25 for row in range(len(rows))], labels=[f"{name}: {metric}" for name, metric in rows])
        axes.invert_yaxis()
        percent_axis(axes, "x", 1.0)
        if len(models) > 1:
            legend_below(figure, axes)
    return figure


def curve(results: RestoreResults, benchmark: BenchmarkRow) -> Figure:
    """Draw one benchmark's primary metric over λ."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(PANEL, layout="constrained")
        axes = figure.subplots()
        _draw_curve(axes, results, benchmark)
        if len(merged_series(results)) > 1:
            legend_below(figure, axes)
    return figure


def training_loss(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw the training loss over the steps, a line for each tuned model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with styled():
        figure = Figure(PANEL, layout="constrained")
        axes = figure.subplots()
        axes.set_title("Training loss")
        for index, (name, every) in enumerate(losses.items()):
            rows = every[:: -(-len(every) // MOST_STEPS) or 1]
            colour = (TUNED, *SERIES)[index % (len(SERIES) + 1)]
            axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], color=colour, linewidth=1.2, label=name)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.grid(visible=True, axis="y")
        axes.legend(fontsize=8.5)
    return figure


def _draw_curve(axes: Axes, results: RestoreResults, benchmark: BenchmarkRow) -> None:
    at = _measured(results, benchmark, "selection")
    chosen = results.choice.point
    series = merged_series(results)
    for name in series:
        merged = [e for e in at.values() if e.series == name]
        colour = series_colour(series, name)
        if any(entry.lam is not None for entry in merged):
            _draw_line(axes, at, [e for e in merged if e.lam is not None], name, series)
        # of many recipes without a λ, such as those of a search by layer, only the chosen one
        levels = [e for e in merged if e.lam is None]
        for entry in levels if len(levels) == 1 else [e for e in levels if e.point == chosen]:
            axes.axhline(_mean(entry), color=colour, linewidth=1.4, linestyle="-.", label=entry.point, zorder=2)
    for role, colour in (("base", BASE), ("tuned", TUNED)):
        _marks(axes, [at[role]] if role in at else [], colour)
    again = [e for e in _measured(results, benchmark, "confirmation").values() if e.lam is not None]
    # a mark outside the axes would leave no room for them in the layout
    highest = max((entry.high for entry in (*at.values(), *again)), default=0.0)
    limit = _limit(results, benchmark, at)
    percent_axis(axes, "y", 1.0 if benchmark.kind in ("utility", "keep") else max(highest, limit.at if limit else 0.0))
    axes.plot(
        [_lam(e) for e in again],
        [_mean(e) for e in again],
        "D",
        color=FAINT,
        markerfacecolor="none",
        markersize=8,
        zorder=4,
        clip_on=False,
    )
    if limit:
        axes.axhline(limit.at, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        note(axes, 0.0, limit.at, limit.words, BAD)
    if chosen not in {None, "tuned"} and results.choice.lam is not None:
        lam = results.choice.lam
        axes.axvline(lam, color=FAINT, linewidth=1, linestyle=":", zorder=0)
        note(axes, lam, 1.0, "chosen", SOFT, ha="center", transform=axes.get_xaxis_transform())
    _label_curve(axes, benchmark, [entry.lam for entry in at.values() if entry.lam is not None])


class _Limit(NamedTuple):
    """The end of a benchmark's margin, and its label."""

    at: float
    words: str


def _limit(results: RestoreResults, benchmark: BenchmarkRow, at: Mapping[str, SummaryRow]) -> _Limit | None:
    choice = results.choice
    if benchmark.kind == "safety" and "base" in at:
        return _Limit(_mean(at["base"]) + choice.margin, "base + margin")
    losses = [row.against for row in results.confirmation.losses if row.benchmark == benchmark.name]
    against = losses[0] if losses else "base"
    if benchmark.kind == "keep" and choice.keep_margin is not None and against in at:
        return _Limit(_mean(at[against]) - choice.keep_margin, f"{against} − margin")
    return None


def _draw_line(
    axes: Axes,
    at: Mapping[str, SummaryRow],
    merged: Sequence[SummaryRow],
    name: str,
    series: Sequence[str],
) -> None:
    """Draw a series from the base over its λs to its end: the tuned model, or one merge of all of them."""
    colour, style = series_colour(series, name), series_style(series, name)
    has_end = any(entry.lam == 1 for entry in merged)
    ends = [at[role] for role in ("base", *(() if has_end else ("tuned",))) if role in at]
    line = sorted([*ends, *merged], key=_lam)
    lams = [_lam(entry) for entry in line]
    low, high = [entry.low for entry in line], [entry.high for entry in line]
    axes.fill_between(lams, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(lams, [_mean(e) for e in line], color=colour, linewidth=1.6, linestyle=style, label=name, zorder=2)
    axes.plot([_lam(e) for e in merged], [_mean(e) for e in merged], "o", color=colour, markersize=4.5, zorder=3)


def _label_curve(axes: Axes, benchmark: BenchmarkRow, lams: Sequence[float]) -> None:
    metric = f" ({benchmark.metric.replace('_', ' ')})" if benchmark.kind in ("utility", "keep") else ""
    axes.set_title(f"{KINDS[benchmark.kind][0]}: {benchmark.name}{metric}", pad=16)
    labelled = _spaced(sorted(set(lams)))
    axes.set_xticks(labelled, labels=[_lam_text(lam) for lam in labelled])
    axes.set_xticks(sorted(set(lams) - set(labelled)), minor=True)
    axes.set_xlim(-0.06, 1.06)
    axes.set_xlabel("λ, share of the tuned side")


def _spaced(lams: Sequence[float]) -> list[float]:
    """Return the sorted λs whose labels do not touch: base and tuned always, others from the left."""
    kept: list[float] = [lam for lam in lams if lam in {0.0, 1.0}]
    for lam in lams:
        if all(abs(lam - other) >= LABEL_GAP for other in kept):
            kept.append(lam)
    return sorted(kept)


def _lam_text(lam: float) -> str:
    return {0.0: "0\nbase", 1.0: "1\ntuned"}.get(lam, f"{lam:g}")


def _measured(results: RestoreResults, benchmark: BenchmarkRow, split: str) -> dict[str, SummaryRow]:
    """Return a benchmark's primary metric at each measured point, sorted by λ; points without λ last."""
    found = {
        entry.point: entry
        for entry in results.summary
        if entry.benchmark == benchmark.name
        and entry.metric == benchmark.metric
        and entry.split == split
        and entry.mean is not None
    }
    return dict(sorted(found.items(), key=lambda item: (item[1].lam is None, item[1].lam or 0.0)))


def _mean(entry: SummaryRow) -> float:
    assert entry.mean is not None, "only what was scored is drawn"
    return entry.mean


def _lam(entry: SummaryRow) -> float:
    assert entry.lam is not None, "only points with a λ lie on a line"
    return entry.lam


def _marks(axes: Axes, entries: Sequence[SummaryRow], colour: str) -> None:
    means = [_mean(entry) for entry in entries]
    # rounding may put an interval's end beyond its own mean by one ulp
    below = [max(0.0, _mean(entry) - entry.low) for entry in entries]
    above = [max(0.0, entry.high - _mean(entry)) for entry in entries]
    axes.errorbar(
        [_lam(entry) for entry in entries],
        means,
        yerr=[below, above],
        fmt="o",
        color=colour,
        markersize=4.5,
        linewidth=1,
        capsize=2.5,
        zorder=3,
    )
