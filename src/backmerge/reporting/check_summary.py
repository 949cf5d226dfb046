"""Present the results of a check: for the terminal, and as Markdown for the summary of a CI job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from backmerge.reporting.findings import (
    LIMITS,
    LIMITS_WITHOUT_SAFETY,
    METRIC_NAMES,
    bound_text,
    limiting,
    losses_text,
    pair_lines,
    pair_test_lines,
    percent,
    points,
    weak_judge,
)
from backmerge.reporting.markdown import escaped
from backmerge.reporting.page import visible
from backmerge.results import CheckResults, CheckRow
from backmerge.statistics import PairedDifference


def check_headline(results: CheckResults) -> str:
    """Return the verdict in a few words."""
    check = results.check
    if check.asr_difference is None:
        margin = f"{check.losses[0].margin * 100:g} points"
        if limits := limiting(results):
            return f"Not shown to be kept ({', '.join(finding.name for finding in limits)})"
        return {
            "restored": f"Kept, within {margin} of the base",
            "not shown": f"Could not be decided: not shown to be kept, within {margin} of the base",
            "worse": f"Fails: it lost more than {margin} against the base",
        }[check.verdict]
    margin = f"{check.margin * 100:g} points"
    if limits := limiting(results):
        return f"Not shown to be as safe as the base ({', '.join(finding.name for finding in limits)})"
    return {
        "restored": f"As safe as the base, within {margin}",
        "not shown": f"Could not be decided: not shown to be as safe as the base, within {margin}",
        "worse": f"Fails: less safe than the base, by more than {margin}",
    }[check.verdict]


def check_sentence(results: CheckResults) -> str:
    """Return the verdict with its figures."""
    check = results.check
    asr, margin = check.asr_difference, f"{check.margin * 100:g} points"
    if asr is None:
        return f"{check_headline(results)}: it loses {losses_text(check.losses)}."
    measured = check.measured_verdict or check.verdict
    shown = {
        "restored": f"less than the margin of {margin}",
        "not shown": f"not shown to be less than {margin}",
        "worse": f"more than {margin}",
    }[measured]
    return (
        f"{check_headline(results)}: on {asr.n:,} harmful requests its attack success rate differs from the base's "
        f"by {bound_text(asr, measured)}: {shown}."
    )


def check_notes(results: CheckResults) -> Iterator[str]:
    """Yield what would decide the check, other findings, and the limits of the verdict."""
    check = results.check
    for finding in results.findings:
        yield f"{finding.name}: {finding.message} {finding.remedy}"
    if check.what_would_decide:
        yield check.what_would_decide
    kept = next((row.kept for row in results.rows if row.kind == "over_refusal"), "within")
    if kept != "within":
        limit = f"{check.over_refusal_margin * 100:g} points above the base's"
        told = "is shown to be more" if kept == "exceeded" else "is not shown to be less"
        yield f"Over-refusal {told} than {limit}; this is not part of the verdict."
    yield from pair_lines(results)
    yield from pair_test_lines(results)
    other = check.other_difference
    if other and other.lower_bound > 0:
        yield (
            f"It more often neither refuses nor answers harmfully ({_difference(other)}): if a model stops making "
            f"sense, a low attack success rate does not mean safety. Read some answers."
        )
    if results.judge.is_weak and _is_judged(results):
        yield weak_judge(results.judge.name)
    if unscored := sum(row.unscored for row in results.rows if len(row.benchmarks) == 1):
        yield (
            f"{unscored:,} values could not be scored: no rate includes them, and the verdict takes them into account."
        )
    if results.environment["base"] != results.environment["model"]:
        yield (
            "The two models ran on different engines: a difference may come from the engine (chat template, "
            "precision) as well as from the weights."
        )
    elif results.num_prompts_rendered_otherwise:
        yield (
            f"{results.num_prompts_rendered_otherwise:,} prompts were rendered differently for the two models: their "
            f"chat templates differ."
        )
    prints = results.fingerprints
    if prints.base is not None and prints.base == prints.model:
        yield "The model equals the base, byte for byte."
    yield from _limits(results)


def _is_judged(results: CheckResults) -> bool:
    return any(row.kind in ("safety", "over_refusal") for row in results.rows)


def _limits(results: CheckResults) -> Sequence[str]:
    return LIMITS if results.check.asr_difference is not None else LIMITS_WITHOUT_SAFETY


def print_check(results: CheckResults, directory: Path) -> None:
    """Print the table, the verdict, notes, and the output files."""
    console = Console(highlight=False, markup=False)
    table = Table(title="In percent; difference with its 95 % interval", title_justify="left")
    for column in ("what", "base", "model", "difference", "limit"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in results.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(f"{check_sentence(results)}", soft_wrap=True)
    for line in check_notes(results):
        if line not in _limits(results)[1:]:  # the summary has the rest
            console.print(f"  Note: {line}", soft_wrap=True)
    console.print(f"  Summary: {directory / 'check.md'}", soft_wrap=True)
    console.print(f"  Records: {directory}", soft_wrap=True)


def check_markdown(results: CheckResults) -> str:
    """Return a Markdown page, e.g. for `$GITHUB_STEP_SUMMARY`."""
    against = "the base's answers in " if results.is_against_run else ""
    judged = f", judged by {_code(results.judge.name)}" if _is_judged(results) else ""
    lines = [
        f"## {check_headline(results)}",
        "",
        f"{_code(results.model)} against {against}{_code(results.against)}{judged}.",
        "",
        check_sentence(results),
        "",
        "| | base | model | difference (95 % interval) | limit |",
        "|---|---:|---:|---:|---:|",
        *("| " + " | ".join(escaped(cell) for cell in _cells(row)) + " |" for row in results.rows),
        "",
        *(f"- {line}" for line in check_notes(results)),
        "",
        f"Made by backmerge {results.backmerge}.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: CheckRow) -> list[str]:
    difference = row.difference
    names, metric = row.benchmarks, METRIC_NAMES.get(row.metric, row.metric)
    where = names[0] if len(names) == 1 else f"{len(names)} sets together"
    margin = None if row.margin is None else -row.margin if row.kind == "keep" else row.margin
    limit = "—" if margin is None else f"{margin * 100:+g}: {row.kept}"
    return [
        f"{metric}, {where} (n = {difference.n:,})",
        percent(row.base),
        percent(row.model),
        _difference(difference),
        limit,
    ]


def _difference(difference: PairedDifference) -> str:
    return f"{points(difference.difference)} [{difference.low * 100:+.1f}, {difference.high * 100:+.1f}]"


def _code(name: str) -> str:
    """Return a name as a code span on one line."""
    plain = " ".join(visible(name).split()).replace("`", "'")
    return f"`{plain}`"
