"""What a dry run tells a person: findings, a table of the work, and what its hours rest on."""

from __future__ import annotations

from collections.abc import Sequence

from backmerge.pipeline.dry_run import DryRun
from backmerge.pipeline.workload import RATES
from backmerge.progress import size_text, time_text


def lines_of(found: DryRun) -> list[str]:
    """What a person is told: findings, stages, and what the hours rest on."""
    width = max(len(finding.what) for finding in found.findings)
    lines = [
        f"  {finding.what:{width}}  {finding.state:8}  " + finding.told.replace("\n", f"\n{'':{width + 14}}")
        for finding in found.findings
    ]
    if not found.stages:
        return lines
    name = max(len(stage.name) for stage in found.stages)
    lines.append(f"  {'':{name}}  models     answers      tokens in     tokens out   judged  GPU-hours")
    lines += [
        f"  {stage.name:{name}}  {stage.num_models:6,}  {stage.num_answers:10,}  {stage.input_tokens:13,.0f}  "
        f"{stage.output_tokens:13,.0f}  {stage.num_judged:7,}  {_hours(stage.gpu_hours):>9}"
        for stage in found.stages
    ]
    at_most = "at most " if found.is_at_most else ""
    lines.append(f"  In all {at_most}about {_hours(found.gpu_hours)} GPU-hours; {bytes_text(found)}.")
    seconds = found.seconds
    lines.append(
        "  On this machine: not measured yet; a run measures it before it begins."
        if seconds is None
        else f"  Estimated time of the answers on this machine: {at_most}about {time_text(seconds)}, as measured in an "
        "earlier run."
    )
    return lines


def bytes_text(found: DryRun) -> str:
    """What is to be fetched and written."""
    fetched, written = size_text(found.num_bytes_to_fetch), size_text(found.num_bytes_to_write)
    return f"models of about {fetched} to fetch, about {written} to write"


def assumptions() -> list[str]:
    """What hours and tokens rest on, for a person."""
    large = 70.55e9
    read, written = RATES.input / large, RATES.output / large
    return [
        "Counted: models, answers and judged answers. Assumed, as docs/scale.md has it: how long answers are, and "
        f"prompts that are not here; {RATES.row_tokens} tokens of a row to tune on; {RATES.judged_tokens} for a judge "
        "to read of an answer.",
        f"GPU-hours = tokens × parameters / rate / 3600, for one H100 in bfloat16: {written:,.0f} tokens a second "
        f"written and {read:,.0f} read of a 70B model, and so many times more of a smaller one; training takes 6 "
        f"operations for a token and a parameter, at {RATES.training / 1e12:,.0f}e12 a second. Loading, the engines' "
        "start, merging, BERTScore and running code are not in it.",
    ]


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.1f}" if hours >= 0.05 else "0.0"


def total_line(found: Sequence[DryRun]) -> str:
    """All experiments of a suite together; a model that several need is fetched once."""
    hours = [one.gpu_hours for one in found]
    known = sum(hour for hour in hours if hour is not None)
    unknown = hours.count(None)
    answers = sum(stage.num_answers for one in found for stage in one.stages)
    fetched = max(one.num_bytes_to_fetch for one in found)
    written = sum(one.num_bytes_to_write for one in found)
    return (
        f"All {len(found)}: {answers:,} answers, about {_hours(known)} GPU-hours"
        f"{f' and those of {unknown} that are not known' if unknown else ''}; at least {size_text(fetched)} to fetch, "
        f"{size_text(written)} to write."
    )
