"""Print the summary at the end of a run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from backmerge.progress import count_text
from backmerge.records import Estimate
from backmerge.reporting.explained import next_steps
from backmerge.reporting.findings import (
    STANDINGS,
    cell_text,
    comparison,
    intervals_cover,
    limiting,
    limits_of,
    losses_text,
    pair_lines,
    pair_test_lines,
    percent,
    points,
    served_text,
    verdict_sentence,
    weak_judge,
    weaknesses,
)
from backmerge.reporting.page import visible
from backmerge.results import ROLES, ComparisonRow, EvaluateResults, JudgesAgreement, Redecision, RestoreResults

JUDGED = ("asr", "over_refusal")  # metrics that depend on the judge


def print_summary(results: RestoreResults, directory: Path) -> None:
    """Print the verdict, a compact table, and the output files."""
    console = Console(highlight=False, markup=False)
    unused = "all prompts, none of which was used to choose λ"
    which = unused if results.is_whole else "prompts that λ was not chosen on"
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
    for line in pair_test_lines(results):
        console.print(f"  {visible(line)}", soft_wrap=True)
    for step in next_steps(results):
        console.print(f"  Next: {step}", soft_wrap=True)
    # the verdict and the next steps are not repeated; the report has the other limits
    for line in (*weaknesses(results, without=limiting(results)), limits_of(results)[0]):
        console.print(f"  Note: {line}", soft_wrap=True)
    for merged in results.merged:
        label = "Merged model:" if merged.confirmed else "Unconfirmed: "
        note = "" if merged.confirmed else " (for study only)"
        console.print(f"  {label} {directory / merged.directory}{note}", soft_wrap=True)
        if text := served_text(merged):
            console.print(f"                {text}", soft_wrap=True)
    console.print(f"  Report:       {directory / 'report.html'}", soft_wrap=True)


def _contender(row: ComparisonRow) -> str:
    """Return the best recipe of a series, in one line."""
    if row.point is None or row.utility is None:
        return f"{row.series}: none passed"
    found = f"loss on {losses_text(row.losses)}"
    if row.asr is not None:
        found = f"attack success rate {percent(row.asr.value)}"
    return f"Best of {row.series}: {row.point}, utility {percent(row.utility.value)}, {found}, {row.verdict}"


def _decision(judge: str, decision: Redecision) -> str:
    """Return the verdict of another judge on the same run."""
    if decision.point is None:
        return f"Verdict by {judge}: not shown; the run chose no λ."
    found = decision.asr_difference
    rise = "no answers to compare" if found is None else f"ASR at most {points(found.upper_bound)} above the base's"
    names = ", ".join(finding.name for finding in decision.findings if finding.severity != "warning")
    verdict = STANDINGS[decision.verdict].words
    if names and decision.verdict == "not shown":
        verdict = f"{STANDINGS['limited'].words} ({names})"
    text = (
        f"Verdict by {judge} on {decision.point}: {verdict} ({rise}, margin "
        f"{decision.margin * 100:g}); before: {STANDINGS[decision.earlier_verdict].words}."
    )
    own = decision.chosen_by_this_judge
    if own == decision.point:
        return f"{text} This judge would choose the same λ."
    if own is None:
        return f"{text} {decision.reason}"
    return f"{text} It would choose {own}: to confirm it, run restore with this judge in the same --out."


def _agreement(row: JudgesAgreement) -> str:
    found = "κ is not defined"
    if row.kappa is not None:
        found = f"κ {row.kappa:.2f} [{row.low:.2f}, {row.high:.2f}]"
    return f"{found}; they differ on {len(row.differ_on):,} of {count_text(row.n + row.unscored, 'answer')}"


def _two_lines(cell: Estimate | None) -> str:
    """Put the rate above its interval, so that three models fit in 80 columns."""
    return cell_text(cell).replace(" % [", " %\n[", 1)


def print_scores(results: EvaluateResults, directory: Path) -> None:
    """Print the scores of one or several models, and the agreement of two judges."""
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
    for line in pair_lines(results):
        console.print(f"  {visible(line)}", soft_wrap=True)
    models = {score.model for score in results.scores}
    for part in results.by_category:
        if len(models) == 1 and part.metric in JUDGED:
            found = f"{part.benchmark}, {part.category}: {cell_text(part.estimate)}, n = {part.n}"
            console.print(f"  {found}", soft_wrap=True)
    for both in results.agreement:
        console.print(f"  Two judges on {both.benchmark} ({both.split}): {_agreement(both)}", soft_wrap=True)
    for finding in results.findings:
        console.print(f"  {visible(finding.sentence)}", soft_wrap=True)
    if results.judge.is_weak and any(score.metric in JUDGED for score in results.scores):
        console.print(f"  Note: {weak_judge(results.judge.name)}", soft_wrap=True)
    if results.decision is not None:
        console.print(f"  {_decision(results.judge.name, results.decision)}", soft_wrap=True)
    console.print(f"  Records and scores: {directory}", soft_wrap=True)


NARROWEST = 26  # columns of a terminal in which an answer is readable
COLOURS = ("green", "red", "blue")
# a terminal's commands: CSI … letter; OSC, DCS and the like … BEL or ST; two-character escapes. If one has no end, only
# its beginning is removed: the rest is text to a reader
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]|\x9b[0-?]*[ -/]*[@-~]"
)
JOINERS = frozenset("\u200c\u200d")  # scripts and emoji need them; other format characters reverse or hide text


class Column(NamedTuple):
    """One model's answer.

    Attributes:
        heading: Name of the model.
        text: As the model wrote it.
        is_finished: Whether it ended before the token limit.
        thought: Its reasoning, of which only the length is shown.
    """

    heading: str
    text: str
    is_finished: bool
    thought: str = ""


def plain_text(text: str) -> str:
    r"""Remove everything from a model's text that moves the cursor, changes colours, reverses text or hides it.

    >>> plain_text("\x1b[31mred\x1b[0m\r\nnext\u202e")
    'red\nnext'
    """
    text = ESCAPES.sub("", text).replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n").expandtabs(4)
    return "".join(c for c in text if c == "\n" or c in JOINERS or not unicodedata.category(c).startswith("C"))


def print_answers(console: Console, columns: Sequence[Column]) -> None:
    """Print side by side if each gets at least 26 columns, else one below the other; plainly without a terminal."""
    if not console.is_terminal:
        for column in columns:
            console.print(Text(f"[{column.heading}]"), soft_wrap=True)
            console.print(Text(_shown(column)), soft_wrap=True)
        return
    if console.width < NARROWEST * len(columns):
        for column, colour in zip(columns, COLOURS, strict=False):
            console.print(Panel(Text(_shown(column)), title=Text(column.heading, style="bold"), border_style=colour))
        return
    table = Table(expand=True, show_lines=False)
    for column, colour in zip(columns, COLOURS, strict=False):
        table.add_column(Text(column.heading, style=f"bold {colour}"), ratio=1, overflow="fold")
    table.add_row(*(Text(_shown(column)) for column in columns))
    console.print(table)


def _shown(column: Column) -> str:
    text = plain_text(column.text).strip("\n") or "(nothing)"
    thought = f"(thought first: {len(column.thought.split()):,} words)\n" if column.thought else ""
    return thought + (text if column.is_finished else f"{text} …")
