"""Compare several runs: the choice and result of each, with those that differ only in seeds combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backmerge import __version__
from backmerge.records import Estimate
from backmerge.reporting.drawing import PANEL, inline_svg, styled, write_figure
from backmerge.reporting.families import (
    Family,
    Pick,
    at,
    benchmarks_of,
    cell_at,
    chosen,
    families_of,
    gap_to_base,
    lams_of,
    remarks,
    score_at,
    verdict_of,
)
from backmerge.reporting.findings import LIMITS, standing, verdict_sentence, weaknesses
from backmerge.reporting.finished_runs import Run
from backmerge.reporting.latex import as_latex
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
from backmerge.reporting.markdown import as_markdown
from backmerge.reporting.page import environment
from backmerge.reporting.run_tables import INTERVALS, SEEDS, metric_name
from backmerge.reporting.tables import Column, Entry, Table, as_csv, shown
from backmerge.runs import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PICKS: Mapping[str, Pick] = {"base": at("base"), "tuned": at("tuned"), "merged": chosen}


class Benchmarks(NamedTuple):
    """The runs' benchmarks other than their tasks, by name and primary metric."""

    safety: Sequence[tuple[str, str]]
    over_refusal: Sequence[tuple[str, str]]
    keep: Sequence[tuple[str, str]]

    @property
    def all(self) -> list[tuple[str, str]]:
        """Return the benchmarks of all kinds."""
        return [*self.safety, *self.over_refusal, *self.keep]


def write_comparison(runs: Sequence[Run], out: Path, title: str = "Runs compared") -> list[Path]:
    """Write `compared.html`, `.csv`, `.md` and `.tex`, and the curves of all runs as PNG, SVG and PDF.

    Args:
        runs: Finished runs.
        out: A folder; made if absent.
        title: Title of the page and the tables.

    Returns:
        The files, the page first.
    """
    families = families_of(runs)
    table = comparison_table(families, title)
    write_whole(out / "compared.csv", as_csv(comparison_rows(families)))
    write_whole(out / "compared.md", as_markdown(table))
    write_whole(out / "compared.tex", as_latex(table))
    figure = compared_curves(runs)
    figures = write_figure(out / "compared_curves", figure)
    # written last, so that an existing page has everything else next to it
    write_whole(out / "compared.html", page(runs, table, inline_svg(figure, "curves", "Every run against λ"), title))
    return [*(out / f"compared.{form}" for form in ("html", "csv", "md", "tex")), *figures]


def comparison_table(families: Sequence[Family], title: str = "Runs compared") -> Table:
    """Return a row for each run, and below several that differ only in seeds, one for all of them."""
    benchmarks = Benchmarks(*(_everywhere(families, kind) for kind in ("safety", "over_refusal", "keep")))
    columns = [
        Column("run", "run"),
        Column("base", "base"),
        Column("task", "task"),
        Column("num_tuned", "tuned models", "number"),
        Column("lam", "λ", "number"),
        Column("verdict", "verdict"),
        Column("asr_difference", "ASR minus the base's", "gap"),
        *(Column(f"score_{role}", role, "share", "score") for role in PICKS),
        *(
            Column(
                f"{metric}_{name}_{role}", role, "share", f"{name}: {'ASR' if metric == 'asr' else metric_name(metric)}"
            )
            for name, metric in benchmarks.all
            for role in PICKS
        ),
    ]
    blocks = []
    for family in families:
        block = [_row(Family((run,)), run.name, benchmarks) for run in family.runs]
        if len(family.runs) > 1:
            block.append(_row(family, f"all {len(family.runs)}", benchmarks))
        blocks.append(block)
    runs = [run for family in families for run in family.runs]
    caption = f"{title}. {INTERVALS}{SEEDS}; base, tuned and chosen merge on the confirmation's prompts."
    return Table("compared", caption, columns, blocks, list(_notes(families, runs)))


def comparison_rows(families: Sequence[Family]) -> list[dict[str, Any]]:
    """Return the same figures, one per row, not rounded; the aggregate's `run` is empty."""
    rows = []
    for family in families:
        members = [(run.name, Family((run,))) for run in family.runs]
        members += [("", family)] if len(family.runs) > 1 else []
        for name, member in members:
            place = {
                "family": family.name,
                "run": name,
                "base": family.runs[0].results.base.name,
                "task": family.runs[0].task,
                "num_runs": len(member.runs),
                "chosen": ", ".join(dict.fromkeys(chosen(run) or "" for run in member.runs)),
                "lam": lams_of(member, chosen),
                "verdict": verdict_of(member),
            }
            rows += [{**place, **figure} for figure in _figures(member)]
    return rows


def page(runs: Sequence[Run], table: Table, curves: str, title: str) -> str:
    """Return the comparison as one self-contained HTML page."""
    from markupsafe import Markup

    return (
        environment()
        .get_template("compared.html.j2")
        .render(
            version=__version__,
            title=title,
            table=table,
            shown=shown,
            verdicts=[(run, verdict_sentence(run.results)) for run in runs],
            standing=standing,
            # matplotlib has escaped every text in it
            curves=Markup(curves),  # noqa: S704
            limits=LIMITS,
        )
    )


def _row(family: Family, name: str, benchmarks: Benchmarks) -> list[Entry]:
    first = family.runs[0]
    own = {name for kind in ("safety", "over_refusal", "keep") for name, _ in benchmarks_of(family, kind)}
    return [
        name,
        first.model,
        f"{first.task} ({', '.join(f'{name}, {metric_name(m)}' for name, m in benchmarks_of(family, 'utility'))})",
        family.num_tuned,
        lams_of(family, chosen),
        verdict_of(family),
        gap_to_base(family),
        *(score_at(family, pick) for pick in PICKS.values()),
        *(
            cell_at(family, pick, benchmark, metric) if benchmark in own else None
            for benchmark, metric in benchmarks.all
            for pick in PICKS.values()
        ),
    ]


def _figures(family: Family) -> Iterator[dict[str, Any]]:
    for kind in ("utility", "safety", "over_refusal", "keep"):
        for name, metric in benchmarks_of(family, kind):
            for role, pick in PICKS.items():
                cell = cell_at(family, pick, name, metric)
                if cell is not None:
                    yield _figure(kind, name, metric, role, cell)
    gaps = (("tuned less base", gap_to_base(family, "tuned_asr_difference")), ("merged less base", gap_to_base(family)))
    for role, gap in gaps:
        if gap is not None:
            of_models = _figure("safety", "all safety benchmarks", "asr", role, gap)
            yield {**of_models, "unscored": None, "num_models": None}


def _figure(kind: str, benchmark: str, metric: str, role: str, found: Estimate) -> dict[str, Any]:
    figures = {
        "mean": found.value,
        "low": found.low,
        "high": found.high,
        "spread": found.spread,
        "n": found.n or None,  # a mean over benchmarks has no n
        "unscored": found.unscored,
        "num_models": found.num_models,
    }
    return {"kind": kind, "benchmark": benchmark, "metric": metric, "role": role, **figures}


def _everywhere(families: Sequence[Family], kind: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for family in families for pair in benchmarks_of(family, kind)))


def _notes(families: Sequence[Family], runs: Sequence[Run]) -> Iterator[str]:
    if any(len(family.runs) > 1 for family in families):
        yield (
            "Rows “all” are over runs that differ only in seeds: the mean over their models ± its standard deviation, "
            "with Student's interval over models or that over prompts, whichever reaches further."
        )
    yield (
        "Runs are not tested against each other. If a run chose its own λ, its figures are for it; “–”: not measured."
    )
    for what, of_run in (
        ("judge", _judges),
        (
            "rule for λ",
            lambda run: f"{run.results.choice.rule}, margin {run.results.choice.margin * 100:g}",
        ),
        ("prompts", lambda run: "all" if run.results.is_whole else "half"),
    ):
        told = {of_run(run): [other.name for other in runs if of_run(other) == of_run(run)] for run in runs}
        if len(told) > 1:
            listed = "; ".join(f"{value} ({', '.join(names)})" for value, names in told.items())
            yield f"The runs differ in {what}, so compare them with care: {listed}."
    yield from remarks(runs, lambda run: weaknesses(run.results))


def _judges(run: Run) -> str:
    return ", ".join(dict.fromkeys(b.judge for b in run.results.benchmarks if b.judge))


LEGEND = 0.19  # inches, height of a legend's line
MOST_NAMED = 40  # most lines in a row of panels with a legend; more would not fit a page


class Panel(NamedTuple):
    """A panel: its title and its lines; `is_utility` if more is better."""

    title: str
    is_utility: bool
    lines: Sequence[Line]


def compared_curves(runs: Sequence[Run]) -> Figure:
    """Draw a row for each base and task: its score and every safety and over-refusal benchmark over λ."""
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
    """Return the runs of each base and task."""
    found: dict[tuple[str, str], list[Family]] = {}
    for run in runs:
        found.setdefault((run.model, run.task), []).append(Family((run,)))
    return list(found.values())


def _panels(group: Sequence[Family], runs: Sequence[Run]) -> Iterator[Panel]:
    first = group[0].runs[0]
    yield Panel(f"Score: {first.task} ({first.model})", True, _lines(group, score_of))
    for kind, words in (("safety", "ASR"), ("over_refusal", "Over-refusal")):
        # benchmarks of all runs, so that the rows are aligned
        for name, metric in dict.fromkeys(pair for run in runs for pair in benchmarks_of(Family((run,)), kind)):
            yield Panel(f"{words}: {name}", False, _lines(group, rate_of(name, metric)))


def _lines(group: Sequence[Family], measure_of: Callable[[Family], Measure]) -> list[Line]:
    return [
        line_of(family, series, f"{family.name}: {series}", measure_of(family))
        for family in group
        for series in series_with_lam(family)
    ]
