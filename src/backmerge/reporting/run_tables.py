"""Make a run's tables for papers and spreadsheets: base, tuned and merged; every point; the best of every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from backmerge.records import Estimate
from backmerge.reporting.findings import METRIC_NAMES, comparison, intervals_cover, weaknesses
from backmerge.reporting.latex import as_latex
from backmerge.reporting.markdown import as_markdown
from backmerge.reporting.report import read_run
from backmerge.reporting.tables import Column, Entry, Named, Table, as_csv, csv_rows
from backmerge.results import ROLES, ComparisonRow, PointRow, RestoreResults
from backmerge.runs import write_whole

INTERVALS = "In percent, with 95 % intervals"
SEEDS = " over prompts, and over seeds too if a standard deviation is given"  # for tables of several runs


def write_tables(directory: Path) -> list[Path]:
    """Write `tables/models`, `tables/points` and, if methods were compared, `tables/methods` of a finished run.

    Each as .csv (not rounded), .md and .tex.

    Returns:
        The files.

    Raises:
        RunError: the run is missing, unfinished or damaged.
    """
    results = read_run(directory).results
    tables = [models_table(results), points_table(results), methods_table(results)]
    return [file for table in tables if table is not None for file in write_table(directory / "tables", table)]


def write_table(directory: Path, table: Table) -> list[Path]:
    """Write a table as .csv, .md and .tex, and return the files."""
    made = {"csv": as_csv(csv_rows(table)), "md": as_markdown(table), "tex": as_latex(table)}
    files = [directory / f"{table.name}.{form}" for form in made]
    for file, text in zip(files, made.values(), strict=True):
        write_whole(file, text)
    return files


def models_table(results: RestoreResults) -> Table:
    """Return base, tuned and chosen merge on every metric of the confirmation."""
    columns = [
        Column("benchmark", "benchmark"),
        Column("metric", "metric"),
        *(Column(role, role, "share") for role in ROLES),
        Column("prompts", "prompts", "number"),
    ]
    sizes = {benchmark.name: benchmark.sizes.confirmation for benchmark in results.benchmarks}
    blocks: dict[str, list[list[Entry]]] = {}
    for row in comparison(results):
        metric = Named(row.metric, metric_name(row.metric))
        line: list[Entry] = [row.benchmark, metric, *(row.cells.get(role) for role in ROLES), sizes[row.benchmark]]
        blocks.setdefault(row.benchmark, []).append(line)
    which = "all prompts" if results.is_whole else "prompts that λ was not chosen on"
    merged = _merged_note(results)
    caption = f"{results.name}: base, tuned and merged model. {INTERVALS} {intervals_cover(results)}, on {which}."
    return Table("models", caption, columns, list(blocks.values()), [merged, *_notes(results)])


def points_table(results: RestoreResults) -> Table:
    """Return every recipe on the primary metrics, base first, tuned last."""
    benchmarks = results.benchmarks
    columns = [
        Column("point", "recipe"),
        Column("lam", "λ", "number"),
        *(Column(b.name, f"{b.name}: {metric_name(b.metric)}", "share") for b in benchmarks),
        Column("chosen", "chosen"),
    ]
    cells = cells_of(results, "selection")
    blocks: dict[str, list[list[Entry]]] = {}
    order = {"base": 0, "merged": 1, "tuned": 2}
    for point in sorted(results.points, key=lambda row: order[row.role]):
        name = point.point
        found = [cells.get((name, b.name, b.metric)) for b in benchmarks]
        chosen = "chosen" if name == results.choice.point else ""
        blocks.setdefault(point.series, []).append([name, point.lam, *found, chosen])
    which = "all prompts" if results.is_whole else "the selection prompts"
    caption = f"{results.name}: every recipe. {INTERVALS} {intervals_cover(results)}, on {which}."
    return Table("points", caption, columns, list(blocks.values()), _notes(results))


def methods_table(results: RestoreResults) -> Table | None:
    """Return the best of each method on the confirmation prompts; `None` if no methods were compared."""
    compared = results.comparison
    if compared is None:
        return None
    columns = [
        Column("series", "method"),
        Column("lam", "λ", "number"),
        Column("num_models", "models", "number"),
        Column("utility", "utility", "level"),
        Column("asr", "ASR", "level"),
        Column("over_refusal", "over-refusal", "level"),
        Column("asr_difference", "ASR minus the base's", "gap"),
        Column("utility_difference", f"utility minus {compared.reference}'s", "gap"),
        Column("p_adjusted", "p (Holm)", "number"),
        Column("verdict", "verdict"),
    ]
    rows: list[list[Entry]] = [
        [
            row.series,
            lam_entry(row),
            row.num_models,
            row.utility,
            row.asr,
            row.over_refusal,
            *(gap and gap.estimate for gap in (row.asr_difference, row.utility_difference)),
            row.p_adjusted,
            row.verdict,
        ]
        for row in compared.rows
    ]
    notes = ["Means over benchmarks; differences are in points."]
    notes += [f"{row.series}: {row.reason}" for row in compared.rows if row.point is None]
    which = "all prompts" if results.is_whole else "prompts that nothing was chosen on"
    caption = f"{results.name}: the best of each method. {INTERVALS} {intervals_cover(results)}, on {which}."
    return Table("methods", caption, columns, [rows], [*notes, *_notes(results)])


def metric_name(metric: str) -> str:
    """Return a metric's name in words."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def cells_of(results: RestoreResults, split: str) -> dict[tuple[str, str, str], Estimate]:
    """Return what was measured on a split, by point, benchmark and metric."""
    return {
        (entry.point, entry.benchmark, entry.metric): entry.estimate
        for entry in results.summary
        if entry.split == split
    }


def lam_entry(row: PointRow | ComparisonRow) -> Entry:
    """Return a point's λ; what sets it, if each part has its own; nothing if it has none."""
    if row.lam is not None or row.setting is None:
        return row.lam
    return json.dumps(row.setting, ensure_ascii=False)


def _merged_note(results: RestoreResults) -> str:
    if results.choice.point is None:
        return "Nothing was merged: no recipe passed."
    return f"Merged: {results.choice.point}. Verdict: {results.confirmation.verdict}."


def _notes(results: RestoreResults) -> Sequence[str]:
    several = f"Means over {len(results.tuned)} tuned models ± their standard deviation."
    return [*([several] if len(results.tuned) > 1 else []), *weaknesses(results)]
