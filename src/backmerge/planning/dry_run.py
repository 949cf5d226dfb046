"""A dry run: find what an experiment names, without the hub and without writing, and estimate its cost."""

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
    """The result of a dry run.

    Attributes:
        findings: One or more for each thing that the experiment names.
        cost: The work to do; `None` if there is a fault.
        num_bytes_to_fetch: Size of models that must be downloaded; 0 for those of unknown size.
        rates: Speed of this machine, if an earlier run measured this engine on such a model.
    """

    findings: tuple[Finding, ...]
    cost: Cost | None
    num_bytes_to_fetch: float
    rates: Rates | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the work; empty if there is a fault."""
        return () if self.cost is None else self.cost.stages

    @property
    def num_bytes_to_write(self) -> float:
        """Size of adapters, checkpoints and merged models."""
        return 0.0 if self.cost is None else self.cost.bytes_written

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of all stages; `None` if a model's size is not known."""
        return 0.0 if self.cost is None else self.cost.gpu_hours

    @property
    def seconds(self) -> float | None:
        """Time of all answers on this machine; `None` if its speed has not been measured."""
        answering = [stage for stage in self.stages if stage.num_answers]
        if self.rates is None or not answering:
            return None
        return self.rates.seconds(
            sum(stage.input_tokens for stage in answering), sum(stage.output_tokens for stage in answering)
        )

    @property
    def faults(self) -> list[Finding]:
        """The findings that would end a run."""
        return [finding for finding in self.findings if finding.state == "fault"]


def dry_run(
    experiment: Experiment, permissions: Permissions = NOTHING_ALLOWED, document: Document | None = None
) -> DryRun:
    """Find what an experiment names; write nothing, and do not use the hub.

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
    """Return the rates that earlier runs on this machine measured for the engine and such a base."""
    if looked_up.models.base is None:
        return None
    try:
        engine = made_engine(experiment.evaluate.engine, permissions)
    except BackmergeError:  # it is not installed, which is one of the findings
        return None
    return remembered_speed(speed_key(engine.identity, looked_up.models.base))


def _steps_to_keep(experiment: Experiment, rows: Rows | None) -> Sequence[int]:
    """Return the tuning steps after which a snapshot will be stored."""
    settings = experiment.finetune
    if settings is None or settings.keep_every is None or rows is None or not rows.num_training:
        return ()
    return range(settings.keep_every, num_steps(settings, rows.num_training) + 1, settings.keep_every)


def lines_of(found: DryRun) -> list[str]:
    """Return the lines to print: findings, stages, and the assumptions about hours."""
    width = max(len(finding.what) for finding in found.findings)
    lines = [
        f"  {finding.what:{width}}  {finding.state:10}  " + finding.detail.replace("\n", f"\n{'':{width + 16}}")
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
        f"  In all {at_most}about {_hours(found.gpu_hours)} GPU-hours; about {fetched} of models to download, about "
        f"{written} to write."
    )
    seconds = found.seconds
    lines.append(
        "  On this machine: not measured yet; a run measures it before it starts."
        if seconds is None
        else f"  Estimated time of the answers on this machine: {at_most}about {time_text(seconds)}, as measured in an "
        "earlier run."
    )
    return lines


def assumptions() -> list[str]:
    """Return the assumptions behind hours and tokens, for a person."""
    large = 70.55e9
    read, written = RATES.input / large, RATES.output / large
    return [
        "Counted: models, answers, judged answers, and the tokens of prompts that are on this machine. Assumed, as in "
        f"docs/scale.md: the lengths of answers and of other prompts, {RATES.row_tokens} tokens for a training row, "
        f"and {RATES.judged_tokens} tokens for each judged answer.",
        f"GPU-hours = tokens × parameters / rate / 3600, for one H100 in bfloat16: {written:,.0f} tokens a second "
        f"generated and {read:,.0f} read with a 70B model, and proportionally more with smaller ones; training takes "
        f"6 operations for each token and parameter, at {RATES.training / 1e12:,.0f}e12 a second. Loading, starting "
        "engines, merging, BERTScore and running code are not included.",
    ]


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:,.1f}" if hours >= 0.05 else "0.0"


def total_line(found: Sequence[DryRun]) -> str:
    """Return the total over all experiments of a suite; a model that several need is downloaded once."""
    hours = [one.gpu_hours for one in found]
    known = sum(hour for hour in hours if hour is not None)
    unknown = hours.count(None)
    answers = sum(stage.num_answers for one in found for stage in one.stages)
    fetched = max(one.num_bytes_to_fetch for one in found)
    written = sum(one.num_bytes_to_write for one in found)
    return (
        f"All {len(found)}: {answers:,} answers, about {_hours(known)} GPU-hours"
        f"{f' and unknown hours for {unknown}' if unknown else ''}; at least {size_text(fetched)} to download, "
        f"{size_text(written)} to write."
    )
