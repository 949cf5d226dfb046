"""The summary at the end of a run, for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from backmerge.progress import count_text
from backmerge.records import Estimate
from backmerge.reporting.findings import (
    LIMITS,
    STANDINGS,
    cell_text,
    comparison,
    handed_over,
    intervals_cover,
    limiting,
    percent,
    points,
    served_text,
    verdict_sentence,
    weak_judge,
    weaknesses,
)
from backmerge.reporting.next_steps import next_steps
from backmerge.results import ROLES, ComparisonRow, EvaluateResults, JudgesAgreement, Redecision, RestoreResults

JUDGED = ("asr", "over_refusal")  # metrics that rest on the judge


def print_summary(results: RestoreResults, directory: Path) -> None:
    """The verdict, a compact table, and where things are."""
    console = Console(highlight=False, markup=False)
    which = "all prompts, λ chosen on none of them" if results.is_whole else "prompts that λ was not chosen on"
    table = Table(title=f"In percent, on {which}; 95 % intervals {intervals_cover(results)}", title_justify="left")
    table.add_column("benchmark")
    table.add_column("metric")
    for role in ROLES:
        table.add_column(role, justify="right")
    for row in comparison(results):
        table.add_row(row.benchmark, row.metric, *(_two_lines(row.cells.get(role)) for role in ROLES))
    console.print(table)
    console.print(verdict_sentence(results), soft_wrap=True)
    if results.choice.point is None:
        console.print(f"  {results.choice.reason}", soft_wrap=True)
    for contender in results.comparison.rows if results.comparison else ():
        console.print(f"  {_contender(contender)}", soft_wrap=True)
    for step in next_steps(results):
        console.print(f"  Next: {step}", soft_wrap=True)
    # what the verdict and the next steps say already is not repeated, and the report has the rest of the limits
    for line in (*weaknesses(results, without=limiting(results)), LIMITS[0]):
        console.print(f"  Note: {line}", soft_wrap=True)
    for merged in handed_over(results):
        console.print(f"  Merged model: {directory / merged.directory}", soft_wrap=True)
        if text := served_text(merged):
            console.print(f"                {text}", soft_wrap=True)
    console.print(f"  Report:       {directory / 'report.html'}", soft_wrap=True)


def _contender(row: ComparisonRow) -> str:
    """A series at its best, in a line."""
    if row.point is None or row.utility is None or row.asr is None:
        return f"{row.series}: none passed"
    return (
        f"{row.series} at its best, {row.point}: utility {percent(row.utility.value)}, attack success rate "
        f"{percent(row.asr.value)}, {row.verdict}"
    )


def _decision(judge: str, decision: Redecision) -> str:
    """What another judge's findings make of the run that it looked at again."""
    if decision.point is None:
        return f"Verdict by {judge}: not shown; the run chose no λ."
    found = decision.asr_difference
    rise = "no answers to compare" if found is None else f"ASR at most {points(found.upper_bound)} above the base's"
    text = (
        f"Verdict by {judge} on {decision.point}: {STANDINGS[decision.verdict].words} ({rise}, margin "
        f"{decision.margin * 100:g}); before: {STANDINGS[decision.earlier_verdict].words}."
    )
    own = decision.chosen_by_this_judge
    if own == decision.point:
        return f"{text} It chooses the same λ."
    return f"{text} It would choose {own or 'none of the λs'}: restore with this judge in the same --out confirms it."


def _agreement(row: JudgesAgreement) -> str:
    found = "κ is not defined"
    if row.kappa is not None:
        found = f"κ {row.kappa:.2f} [{row.low:.2f}, {row.high:.2f}]"
    return f"{found}; they differ on {len(row.differ_on):,} of {count_text(row.n + row.unscored, 'answer')}"


def _two_lines(cell: Estimate | None) -> str:
    """The rate above its interval: three models fit in 80 columns."""
    return cell_text(cell).replace(" % [", " %\n[", 1)


def print_scores(results: EvaluateResults, directory: Path) -> None:
    """The scores of one model, or of several, and how far two judges agree."""
    console = Console(highlight=False, markup=False)
    title = f"{results.model} on its base {results.base_name}" if results.base_name else results.model
    table = Table(title=f"{title} (95 % intervals)", title_justify="left")
    several = len({score.model for score in results.scores}) > 1
    for column in (*(["model"] if several else []), "benchmark", "metric", "value", "n"):
        table.add_column(column, justify="right" if column in {"value", "n"} else "left")
    for score in results.scores:
        cell = score.estimate
        row = (score.benchmark, score.metric, cell_text(cell), str(score.n))
        table.add_row(*([score.model] if several else []), *row)
    console.print(table)
    models = {score.model for score in results.scores}
    for part in results.by_category:
        if len(models) == 1 and part.metric in JUDGED:
            found = f"{part.benchmark}, {part.category}: {cell_text(part.estimate)}, n = {part.n}"
            console.print(f"  {found}", soft_wrap=True)
    for both in results.agreement:
        console.print(f"  Two judges on {both.benchmark} ({both.split}): {_agreement(both)}", soft_wrap=True)
    if results.judge.is_weak and any(score.metric in JUDGED for score in results.scores):
        console.print(f"  Note: {weak_judge(results.judge.name)}", soft_wrap=True)
    if results.decision is not None:
        console.print(f"  {_decision(results.judge.name, results.decision)}", soft_wrap=True)
    console.print(f"  Records and scores: {directory}", soft_wrap=True)
