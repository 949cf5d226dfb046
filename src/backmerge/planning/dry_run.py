"""A dry run: what an experiment names is looked up without the hub and without writing, and its cost is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from backmerge.config import Document
from backmerge.errors import BackmergeError
from backmerge.finetuning.settings import num_steps
from backmerge.generation.protocol import made_engine
from backmerge.planning.estimate import (
    RATES,
    Cost,
    Stage,
    cost_of,
    needs_of,
    remembered_speed,
    speed_key,
)
from backmerge.planning.findings import Finding, Findings, Rows, offline
from backmerge.planning.points import path_points
from backmerge.planning.prepare import LookedUp, look_up
from backmerge.planning.settings import Experiment
from backmerge.progress import Rates, size_text, time_text
from backmerge.registry import NOTHING_ALLOWED, Permissions


class DryRun(NamedTuple):
    """What was found of an experiment.

    Attributes:
        findings: Of each thing that it names.
        cost: What there is to do; `None` if there is a fault.
        num_bytes_to_fetch: Of models that are not here; 0 for those of unknown size.
        rates: Of this machine, if an earlier run measured this engine on such a model.
    """

    findings: tuple[Finding, ...]
    cost: Cost | None
    num_bytes_to_fetch: float
    rates: Rates | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What there is to do; nothing if there is a fault."""
        return () if self.cost is None else self.cost.stages

    @property
    def num_bytes_to_write(self) -> float:
        """Of adapters, checkpoints and merged models."""
        return 0.0 if self.cost is None else self.cost.bytes_written

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages; `None` if a model's size is not known."""
        return 0.0 if self.cost is None else self.cost.gpu_hours

    @property
    def seconds(self) -> float | None:
        """Of all answers on this machine; `None` if its speed was not measured yet."""
        answering = [stage for stage in self.stages if stage.num_answers]
        if self.rates is None or not answering:
            return None
        return self.rates.seconds(
            sum(stage.input_tokens for stage in answering), sum(stage.output_tokens for stage in answering)
        )

    @property
    def faults(self) -> list[Finding]:
        """What a run would end with."""
        return [finding for finding in self.findings if finding.state == "fault"]


def dry_run(
    experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED, document: Document | None = None
) -> DryRun:
    """Look an experiment up; writes nothing, and asks no hub.

    Args:
        experiment: The resolved settings.
        permissions: What may be run.
        document: Where the settings come from, for the places of faults.
    """
    found = Findings(document, is_dry_run=True)
    with offline():
        looked_up = look_up(experiment, found, permissions)
        if found.found:
            return DryRun(tuple(found.all), None, found.num_bytes_to_fetch)
        points = [*looked_up.points, *path_points(experiment.path, _steps_to_keep(experiment, looked_up.rows))]
        cost = cost_of(experiment, needs_of(looked_up, experiment, points), points)
        rates = _rates(experiment, looked_up, permissions)
    return DryRun(tuple(found.all), cost, found.num_bytes_to_fetch, rates)


def _rates(experiment: Experiment, looked_up: LookedUp, permissions: Permissions) -> Rates | None:
    """Return what earlier runs on this machine measured of the engine and such a base."""
    if looked_up.models.base is None:
        return None
    try:
        engine = made_engine(experiment.evaluate.engine, permissions)
    except BackmergeError:  # it is not installed here, which is among the findings
        return None
    return remembered_speed(speed_key(engine.identity, looked_up.models.base))


def _steps_to_keep(experiment: Experiment, rows: Rows | None) -> Sequence[int]:
    """Return the steps of the tuning after which a snapshot will be kept."""
    settings = experiment.finetune
    if settings is None or settings.keep_every is None or rows is None or not rows.num_training:
        return ()
    return range(settings.keep_every, num_steps(settings, rows.num_training) + 1, settings.keep_every)


def lines_of(found: DryRun) -> list[str]:
    """Return what a person reads: findings, stages, and what the hours are."""
    width = max(len(finding.what) for finding in found.findings)
    lines = [
        f"  {finding.what:{width}}  {finding.state:8}  " + finding.detail.replace("\n", f"\n{'':{width + 14}}")
        for finding in found.findings
    ]
    if found.cost is None:
        return lines
    name = max(len(stage.name) for stage in found.stages)
    lines.append(f"  {'':{name}}  models     answers      tokens in     tokens out   judged  GPU-hours")
    lines += [
        f"  {stage.name:{name}}  {stage.num_models:6,}  {stage.num_answers:10,}  {stage.input_tokens:13,.0f}  "
        f"{stage.output_tokens:13,.0f}  {stage.num_judged:7,}  {_hours(stage.gpu_hours):>9}"
        for stage in found.stages
    ]
    at_most = "at most " if found.cost.is_at_most else ""
    fetched, written = size_text(found.num_bytes_to_fetch), size_text(found.num_bytes_to_write)
    lines.append(
        f"  In all {at_most}about {_hours(found.gpu_hours)} GPU-hours; models of about {fetched} to fetch, about "
        f"{written} to write."
    )
    seconds = found.seconds
    lines.append(
        "  On this machine: not measured yet; a run measures it before it begins."
        if seconds is None
        else f"  Estimated time of the answers on this machine: {at_most}about {time_text(seconds)}, as measured in an "
        "earlier run."
    )
    return lines


def assumptions() -> list[str]:
    """Return what hours and tokens are based on, for a person."""
    large = 70.55e9
    read, written = RATES.input / large, RATES.output / large
    return [
        "Counted: models, answers and judged answers, and tokens of prompts that are here. Assumed, as docs/scale.md "
        f"has it: how long answers are, and prompts that are not here; {RATES.row_tokens} tokens of a row to tune on; "
        f"{RATES.judged_tokens} for a judge to read of an answer.",
        f"GPU-hours = tokens × parameters / rate / 3600, for one H100 in bfloat16: {written:,.0f} tokens a second "
        f"written and {read:,.0f} read of a 70B model, and so many times more of a smaller one; training takes 6 "
        f"operations for a token and a parameter, at {RATES.training / 1e12:,.0f}e12 a second. Loading, the engines' "
        "start, merging, BERTScore and running code are not in it.",
    ]


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.1f}" if hours >= 0.05 else "0.0"


def total_line(found: Sequence[DryRun]) -> str:
    """Return all experiments of a suite together; a model that several need is fetched once."""
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
